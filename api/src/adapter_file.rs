//! A stored LoRA adapter, and what it adds to each weight.

use crate::stored::manifest;
use crate::streaming::ContentError;
use crate::tensor_file::{TensorFile, Unusable, float_type};
use safetensors::tensor::TensorInfo;
use std::collections::BTreeMap;
use std::ops::Range;
use tunesmith_core::hyperparameters::AdapterConfig;
use tunesmith_core::weights::{
    ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, LoraFactors, LoraPair, PeftConfig, PeftError,
    pair_lora_tensors,
};
use tunesmith_store::objects::{ObjectPrefix, Objects};

/// A LoRA adapter and which weight each pair of its matrices adapts.
pub(crate) struct Adapter {
    pub(crate) file: TensorFile,
    /// By the name of the weight that is adapted.
    pub(crate) pairs: BTreeMap<String, LoraPair>,
    pub(crate) rank: usize,
    pub(crate) scale: f32,
}

impl Adapter {
    pub(crate) async fn open(
        objects: &Objects,
        weights: &ObjectPrefix,
        base_has: impl Fn(&str) -> bool,
    ) -> Result<Self, Unusable> {
        let config = PeftConfig::parse(&objects.read(&weights.file(ADAPTER_CONFIG_NAME)).await?)?;
        let manifest = manifest(objects, weights).await?;
        let bytes = manifest.file(ADAPTER_WEIGHTS_NAME).map(|file| file.bytes);
        let bytes =
            bytes.ok_or_else(|| Unusable::Broken("the adapter has no weights".to_owned()))?;
        let file = TensorFile::open(objects, weights.file(ADAPTER_WEIGHTS_NAME), bytes).await?;
        Ok(Self::new(&config.adapter, file, base_has)?)
    }

    /// The adapter of this shape whose tensors are in `file`.
    pub(crate) fn new(
        config: &AdapterConfig,
        file: TensorFile,
        base_has: impl Fn(&str) -> bool,
    ) -> Result<Self, PeftError> {
        let names = file.tensors.keys().map(String::as_str);
        let pairs = pair_lora_tensors(names, base_has, config.use_dora)?;
        Ok(Self { file, pairs, rank: config.r, scale: config.scale() as f32 })
    }

    /// Whether the adapter can be merged into the weights in `files`.
    pub(crate) fn check_fit_of_all(&self, files: &[TensorFile]) -> Result<(), Unusable> {
        for (name, tensor) in files.iter().flat_map(|file| &file.tensors) {
            if let Some(pair) = self.pairs.get(name) {
                self.check_fit(name, tensor, pair)?;
            }
        }
        Ok(())
    }

    /// The matrices of a pair.
    pub(crate) async fn factors(&self, pair: &LoraPair) -> Result<Factors, ContentError> {
        let magnitude = match &pair.magnitude {
            Some(magnitude) => Some(self.file.numbers_of(magnitude).await?),
            None => None,
        };
        let a = self.file.numbers_of(&pair.a).await?;
        let b = self.file.numbers_of(&pair.b).await?;
        Ok(Factors { a, b, magnitude, rank: self.rank, scale: self.scale })
    }

    /// Whether `pair` can be merged into `weight`: said before the first byte is sent.
    fn check_fit(&self, name: &str, weight: &TensorInfo, pair: &LoraPair) -> Result<(), Unusable> {
        let (Some(_), &[outputs, inputs]) = (float_type(weight), weight.shape.as_slice()) else {
            return Err(Unusable::Broken(format!(
                "{name} has the type {:?} and the shape {:?}: no adapter merges into that",
                weight.dtype, weight.shape
            )));
        };
        let parts = [
            (Some(&pair.a), vec![self.rank, inputs]),
            (Some(&pair.b), vec![outputs, self.rank]),
            (pair.magnitude.as_ref(), vec![outputs]),
        ];
        for (part, shape) in parts {
            let Some(matrix) = part else { continue };
            let Some(found) = self.file.tensors.get(matrix) else { continue };
            if found.shape != shape || float_type(found).is_none() {
                return Err(Unusable::Broken(format!(
                    "{matrix} is {:?} of shape {:?} where {name} and the adapter's rank ask for \
                     floats of shape {shape:?}",
                    found.dtype, found.shape
                )));
            }
        }
        Ok(())
    }
}

/// The matrices of one adapted weight.
pub(crate) struct Factors {
    a: Vec<f32>,
    b: Vec<f32>,
    magnitude: Option<Vec<f32>>,
    rank: usize,
    scale: f32,
}

impl Factors {
    /// What they add to some of the weight's rows.
    pub(crate) fn of_rows(&self, rows: Range<usize>) -> LoraFactors<'_> {
        LoraFactors {
            a: &self.a,
            b: &self.b[rows.start * self.rank..rows.end * self.rank],
            rank: self.rank,
            scale: self.scale,
            magnitude: self.magnitude.as_ref().map(|all| &all[rows]),
        }
    }
}
