//! A base model with an adapter added into its weights, as a Hugging Face directory.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::Path;

use ::safetensors::tensor::{Metadata, TensorInfo};
use tunesmith_core::weights::{
    ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, FloatType, LoraFactors, LoraPair, PeftConfig,
    merge_lora_rows, pair_lora_tensors,
};

use super::safetensors::{TensorShape, read, read_header, write_streamed};
use super::say_f32;
use crate::error::EngineError;
use crate::model_directory::{
    CONFIG, WEIGHTS_INDEX, carry_over_all_but_weights, carry_over_present, weight_files,
};

/// The adapter of a run, in memory.
struct Adapter {
    pairs: BTreeMap<String, LoraPair>,
    tensors: BTreeMap<String, Vec<f32>>,
    rank: usize,
    scale: f64,
}

/// Writes the model in `base_dir`, merged with the PEFT adapter in `adapter_dir`, into `out_dir`,
/// which is made where it is missing. Numbers are f32, which loses nothing of either; files are the
/// base model's, and one tensor is in memory at a time.
///
/// # Errors
/// [`EngineError::Adapter`] for an adapter of another model or of another kind than LoRA,
/// [`EngineError::Model`] for a base model that cannot be read, [`EngineError::Io`] for files.
pub fn export_merged(
    base_dir: &Path,
    adapter_dir: &Path,
    out_dir: &Path,
) -> Result<(), EngineError> {
    fs::create_dir_all(out_dir).map_err(EngineError::io(out_dir))?;
    let files = weight_files(base_dir)?;
    let mut base_tensors = BTreeSet::new();
    for name in &files {
        let path = base_dir.join(name);
        let mut file = File::open(&path).map_err(EngineError::io(&path))?;
        base_tensors.extend(read_header(&path, &mut file)?.1.tensors().into_keys());
    }
    let adapter = Adapter::read(adapter_dir, &base_tensors)?;
    for name in &files {
        adapter.merge_file(&base_dir.join(name), &out_dir.join(name))?;
    }
    carry_over_present(base_dir, out_dir, &[WEIGHTS_INDEX])?;
    carry_over_all_but_weights(base_dir, out_dir)?;
    say_f32(&out_dir.join(CONFIG))
}

impl Adapter {
    fn read(dir: &Path, base_tensors: &BTreeSet<String>) -> Result<Self, EngineError> {
        let refuse = |error: &dyn std::fmt::Display| {
            EngineError::Adapter(format!("{}: {error}", dir.display()))
        };
        let path = dir.join(ADAPTER_CONFIG_NAME);
        let text = fs::read(&path).map_err(EngineError::io(&path))?;
        let adapter = PeftConfig::parse(&text).map_err(|error| refuse(&error))?.adapter;
        let tensors: BTreeMap<String, Vec<f32>> = read(&dir.join(ADAPTER_WEIGHTS_NAME))?
            .into_iter()
            .map(|tensor| (tensor.name, tensor.data))
            .collect();
        let names = tensors.keys().map(String::as_str);
        let pairs = pair_lora_tensors(names, |name| base_tensors.contains(name), adapter.use_dora)
            .map_err(|error| refuse(&error))?;
        Ok(Self { pairs, tensors, rank: adapter.r, scale: adapter.scale() })
    }

    /// Writes a file of weights anew, adding B·A on the way.
    fn merge_file(&self, from: &Path, to: &Path) -> Result<(), EngineError> {
        let file = File::open(from).map_err(EngineError::io(from))?;
        let mut reader = BufReader::with_capacity(1 << 20, file);
        let (_, metadata) = read_header(from, &mut reader)?;
        let tensors = in_file_order(&metadata);
        let shapes: Vec<TensorShape> = tensors
            .iter()
            .map(|(name, info)| TensorShape { name: name.clone(), shape: info.shape.clone() })
            .collect();
        write_streamed(to, &shapes, |index| {
            let (name, info) = &tensors[index];
            let mut bytes = vec![0; info.data_offsets.1 - info.data_offsets.0];
            reader.read_exact(&mut bytes).map_err(EngineError::io(from))?;
            let float = FloatType::parse(&info.dtype.to_string()).ok_or_else(|| {
                EngineError::Model(format!(
                    "tensor {name} is {}: only F32, BF16 and F16 can be trained",
                    info.dtype
                ))
            })?;
            let mut values = float.decode(&bytes);
            if let Some(pair) = self.pairs.get(name) {
                self.merge(name, &info.shape, pair, &mut values)?;
            }
            Ok(values)
        })
    }

    fn merge(
        &self,
        name: &str,
        shape: &[usize],
        pair: &LoraPair,
        values: &mut [f32],
    ) -> Result<(), EngineError> {
        let &[_, inputs] = shape else {
            return Err(EngineError::Model(format!(
                "tensor {name} has the shape {shape:?}: an adapter is merged into a matrix"
            )));
        };
        let factors = LoraFactors {
            a: &self.tensors[&pair.a],
            b: &self.tensors[&pair.b],
            rank: self.rank,
            scale: self.scale as f32,
            magnitude: pair.magnitude.as_ref().map(|name| self.tensors[name].as_slice()),
        };
        merge_lora_rows(values, inputs, &factors)
            .map_err(|error| EngineError::Adapter(format!("tensor {name}: {error}")))
    }
}

fn in_file_order(metadata: &Metadata) -> Vec<(String, TensorInfo)> {
    let mut tensors: Vec<_> =
        metadata.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    tensors
}
