//! Safetensors files of a model directory, mapped into memory and read as f32.

#![expect(
    unsafe_code,
    reason = "mapping a file is unsafe because another process could change it while it is read"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;

use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::error::EngineError;

/// A file of one model, and a file that lists several.
const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

/// All weights of a directory, each to be taken once.
pub(crate) struct WeightFiles {
    files: Vec<Mmap>,
    /// By name; in order, so that errors are the same from run to run.
    tensors: BTreeMap<String, Location>,
}

struct Location {
    file: usize,
    /// Bytes from the start of the file.
    start: usize,
    end: usize,
    dtype: Dtype,
    shape: Vec<usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl WeightFiles {
    /// Maps `model.safetensors`, or else the files that `model.safetensors.index.json` lists.
    ///
    /// # Errors
    /// [`EngineError::Io`] for a file that cannot be read; [`EngineError::Model`] for one that is
    /// malformed, or when neither is there.
    pub(crate) fn open(dir: &Path) -> Result<Self, EngineError> {
        let mut weights = Self { files: Vec::new(), tensors: BTreeMap::new() };
        if dir.join(SINGLE_FILE).exists() {
            weights.map(&dir.join(SINGLE_FILE))?;
            return Ok(weights);
        }
        let index_path = dir.join(INDEX_FILE);
        if !index_path.exists() {
            return Err(EngineError::Model(format!(
                "{} holds neither {SINGLE_FILE} nor {INDEX_FILE}",
                dir.display()
            )));
        }
        let text = std::fs::read_to_string(&index_path).map_err(EngineError::io(&index_path))?;
        let index: Index =
            serde_json::from_str(&text).map_err(|error| malformed(&index_path, &error))?;
        let names: BTreeSet<&String> = index.weight_map.values().collect();
        for name in names {
            // The index comes from outside: a path in it must not lead out of the directory.
            if name.contains(['/', '\\']) {
                return Err(malformed(&index_path, &format!("{name:?} is no file name")));
            }
            weights.map(&dir.join(name))?;
        }
        if let Some(name) =
            index.weight_map.keys().find(|name| !weights.tensors.contains_key(*name))
        {
            return Err(malformed(&index_path, &format!("weight {name} is in none of its files")));
        }
        Ok(weights)
    }

    fn map(&mut self, path: &Path) -> Result<(), EngineError> {
        let file = File::open(path).map_err(EngineError::io(path))?;
        // SAFETY: the service writes model files once, under a name that appears when they are
        // complete, and never changes them. Bytes are only read, into numbers of which every bit
        // pattern is valid.
        let bytes = unsafe { Mmap::map(&file) }.map_err(EngineError::io(path))?;
        let (header, metadata) =
            SafeTensors::read_metadata(&bytes).map_err(|error| malformed(path, &error))?;
        // Behind the header's length, which is a u64, and the header.
        let data = size_of::<u64>() + header;
        for (name, info) in metadata.tensors() {
            let location = Location {
                file: self.files.len(),
                start: data + info.data_offsets.0,
                end: data + info.data_offsets.1,
                dtype: info.dtype,
                shape: info.shape.clone(),
            };
            if location.end > bytes.len() {
                return Err(malformed(path, &format!("weight {name} is cut off")));
            }
            if self.tensors.insert(name.clone(), location).is_some() {
                return Err(malformed(path, &format!("weight {name} is there twice")));
            }
        }
        self.files.push(bytes);
        Ok(())
    }

    /// The values of `name`, which must have `shape`.
    ///
    /// # Errors
    /// [`EngineError::Model`] when it is missing, misshapen, or of a type that is not a float.
    pub(crate) fn take(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, EngineError> {
        let location = self
            .tensors
            .remove(name)
            .ok_or_else(|| EngineError::Model(format!("weight {name} is missing")))?;
        if location.shape != shape {
            return Err(EngineError::Model(format!(
                "weight {name} has shape {:?}, but config.json asks for {shape:?}",
                location.shape
            )));
        }
        let bytes = &self.files[location.file][location.start..location.end];
        match location.dtype {
            Dtype::F32 => Ok(widen(bytes, f32::from_le_bytes)),
            Dtype::BF16 => Ok(widen(bytes, |b| bf16::from_le_bytes(b).to_f32())),
            Dtype::F16 => Ok(widen(bytes, |b| f16::from_le_bytes(b).to_f32())),
            other => Err(EngineError::Model(format!(
                "weight {name} is of type {other:?}: use f32, bf16 or f16"
            ))),
        }
    }

    /// Whether `name` has not been taken.
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Checks that every weight was used.
    ///
    /// # Errors
    /// [`EngineError::Model`] naming one that was not: the model has a part that this engine does
    /// not compute.
    pub(crate) fn finish(self) -> Result<(), EngineError> {
        // Old checkpoints store the rotary frequencies, which follow from config.json.
        match self.tensors.keys().find(|name| !name.ends_with("rotary_emb.inv_freq")) {
            Some(name) => Err(EngineError::Model(format!(
                "weight {name} has no place in the architecture of config.json"
            ))),
            None => Ok(()),
        }
    }
}

/// Little-endian numbers of N bytes to f32, on all threads.
fn widen<const N: usize>(bytes: &[u8], convert: impl Fn([u8; N]) -> f32 + Sync) -> Vec<f32> {
    bytes
        .as_chunks::<N>()
        .0
        .par_iter()
        .with_min_len(1 << 16)
        .map(|&number| convert(number))
        .collect()
}

fn malformed(path: &Path, error: &dyn std::fmt::Display) -> EngineError {
    EngineError::Model(format!("{}: {error}", path.display()))
}
