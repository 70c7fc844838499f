//! A frozen base model, and the adapters that are used with it.

use std::fs;
use std::path::{Path, PathBuf};

use tunesmith_core::hyperparameters::{Precision, target_modules_of};
use tunesmith_core::weights::{ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, PeftConfig};

use crate::adapters::lora::{Lora, magnitude_name, tensor_name};
use crate::device::Device;
use crate::error::EngineError;
use crate::export::safetensors;
use crate::models::decoder::{Adaptation, Decoder, KeyValueCache, RotaryTables, Sequence};
use crate::models::load::load_frozen;
use crate::ops::row_linear::RowUpdate;
use crate::parameter::{NamedRows, NamedSource, ParameterId, Parameters, read};
use crate::pool::on_pool;

use burn::tensor::{Tensor, TensorData};

/// A base model that answers and does not learn.
#[derive(Debug)]
pub struct ServedModel {
    decoder: Decoder,
    parameters: Parameters,
    device: Device,
    rotary: RotaryTables,
    dir: PathBuf,
}

impl ServedModel {
    /// Loads the Hugging Face directory `dir`. With [`Precision::Auto`], a matrix is stored in bf16
    /// where that loses nothing.
    ///
    /// # Errors
    /// [`EngineError::Model`] for a directory that is not a model.
    pub fn load(dir: &Path, device: &Device, precision: Precision) -> Result<Self, EngineError> {
        let (decoder, parameters) = load_frozen(dir, device, precision)?;
        let rotary = decoder.rotary_tables(0);
        Ok(Self { decoder, parameters, device: device.clone(), rotary, dir: dir.to_owned() })
    }

    /// The directory that it was loaded from.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Tokens of the longest sequence that the model was made for.
    #[must_use]
    pub fn context_length(&self) -> usize {
        let config = self.decoder.config();
        let longest = config.rope.longest_sequence().unwrap_or(usize::MAX);
        config.max_position_embeddings.min(longest)
    }

    /// Bytes of the keys and values of a token.
    pub(super) fn cache_bytes_per_token(&self) -> usize {
        let config = self.decoder.config();
        let width = config.num_key_value_heads * config.head_dim;
        2 * width * config.num_hidden_layers * size_of::<f32>()
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.decoder.config().vocab_size
    }

    /// The logits after every token of `ids`.
    ///
    /// # Errors
    /// [`EngineError::Data`] for ids that the model does not know, or too many.
    pub(super) fn logits(
        &mut self,
        ids: &[u32],
        adaptation: Option<&Adaptation>,
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        if ids.is_empty() || ids.len() > self.context_length() {
            return Err(EngineError::Data(format!(
                "a text of {} tokens: use 1 to {}, the model's context",
                ids.len(),
                self.context_length()
            )));
        }
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.vocab_size()) {
            let size = self.vocab_size();
            return Err(EngineError::Data(format!("token {id} lies outside of {size}")));
        }
        let mut cache = KeyValueCache::default();
        let mut sequences = [Sequence { ids, cache: &mut cache, adaptation }];
        let all: Vec<usize> = (0..ids.len()).collect();
        let logits = self.compute(&mut sequences, &all)?;
        Ok(logits.chunks_exact(self.vocab_size()).map(<[f32]>::to_vec).collect())
    }

    /// Computes new tokens of some sequences, which are added to their caches: the logits of the
    /// token after each sequence's last, sequence by sequence.
    pub(super) fn extend(
        &mut self,
        sequences: &mut [Sequence<'_>],
    ) -> Result<Vec<f32>, EngineError> {
        let last: Vec<usize> = sequences
            .iter()
            .scan(0, |end, sequence| {
                *end += sequence.ids.len();
                Some(*end - 1)
            })
            .collect();
        self.compute(sequences, &last)
    }

    /// Computes new tokens of some sequences: the logits after those at `positions`, counted over
    /// all new tokens.
    fn compute(
        &mut self,
        sequences: &mut [Sequence<'_>],
        positions: &[usize],
    ) -> Result<Vec<f32>, EngineError> {
        let longest = sequences.iter().map(|s| s.cache.tokens() + s.ids.len()).max().unwrap_or(0);
        if self.rotary.positions < longest {
            self.rotary = self.decoder.rotary_tables(longest.next_power_of_two());
        }
        on_pool(|| {
            let hidden = self.decoder.extend(&self.parameters, sequences, &self.rotary);
            read(self.decoder.next_logits(&self.parameters, hidden, positions))
        })
    }

    /// Reads the PEFT adapter in `dir`.
    ///
    /// # Errors
    /// [`EngineError::Adapter`] or [`EngineError::Checkpoint`] for one that does not fit the model,
    /// [`EngineError::Io`] for a file that cannot be read.
    pub(crate) fn read_adapter(&self, dir: &Path) -> Result<Adaptation, EngineError> {
        let path = dir.join(ADAPTER_CONFIG_NAME);
        let text = fs::read(&path).map_err(EngineError::io(&path))?;
        let config = PeftConfig::parse(&text)
            .map_err(|error| EngineError::Adapter(format!("{}: {error}", path.display())))?
            .adapter;
        let lora = Lora::new(&config, 0)?;
        let first_layer = config.first_trained_layer(self.decoder.config().num_hidden_layers);
        let mut tensors = NamedSource::new(safetensors::read(&dir.join(ADAPTER_WEIGHTS_NAME))?)?;
        let mut adaptation = Adaptation::default();
        for (layer, projection) in self.decoder.projections() {
            if layer < first_layer {
                continue;
            }
            if let Some(update) = self.update(&lora, projection.weight, &mut tensors)? {
                adaptation.0.insert(projection.weight, update);
            }
        }
        tensors.finish()?;
        Ok(adaptation)
    }

    /// The adapter of the projection by `weight`.
    fn update(
        &self,
        lora: &Lora,
        weight: ParameterId,
        tensors: &mut NamedSource,
    ) -> Result<Option<RowUpdate>, EngineError> {
        let (mut a, mut b, mut magnitudes) = (Vec::new(), Vec::new(), Vec::new());
        let mut outputs = Vec::new();
        let mut inputs = 0;
        for NamedRows { name, rows, shape } in self.parameters.names(weight) {
            let path = name.strip_suffix(".weight").unwrap_or(name);
            let module = path.rsplit('.').next().unwrap_or(path);
            if !lora.adapts_all(target_modules_of(module), module)? {
                continue;
            }
            inputs = shape[1];
            a.extend(tensors.take(&tensor_name(path, 'A'), &[lora.rank, inputs])?);
            b.extend(tensors.take(&tensor_name(path, 'B'), &[rows.len(), lora.rank])?);
            if lora.dora {
                magnitudes.extend(tensors.take(&magnitude_name(path), &[rows.len()])?);
            }
            outputs.push(rows.clone());
        }
        if outputs.is_empty() {
            return Ok(None);
        }
        let tensor = |values: Vec<f32>, columns: usize| -> Tensor<2> {
            let shape = [values.len() / columns, columns];
            Tensor::from_data(TensorData::new(values, shape), self.device.burn()).autodiff()
        };
        let dora = lora.dora.then(|| [tensor(magnitudes, 1), self.parameters.weight(weight)]);
        let (a, b) = (tensor(a, inputs), tensor(b, lora.rank));
        Ok(Some(RowUpdate::new(a, b, lora.scale, outputs, dora)))
    }
}
