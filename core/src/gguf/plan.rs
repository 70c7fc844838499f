//! What a GGUF file will hold, before any of it is written.

use std::collections::HashSet;
use std::ops::Range;

use serde_json::{Map, Value as Json};

use super::GgufError;
use super::architecture::{Architecture, Change};
use super::header::{ALIGNMENT, Place, Value, header};
use super::modelfile::modelfile;
use super::storage::{StorageType, TensorFacts, TensorType};
use super::tokenizer::{Roles, tokenizer};
use crate::dataset::{ChatTokenizer, chat_templates, named_special_tokens};
use crate::weights::{BeyondType, FloatType};

/// Values that are read, changed and encoded at a time, but for a head's rows, which are never cut.
const PIECE: usize = 1 << 20;
/// The version of the layouts of quantised blocks.
const QUANTIZATION_VERSION: u32 = 2;
const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// The small files of a Hugging Face model directory.
#[derive(Debug, Clone, Copy)]
pub struct ModelFiles<'a> {
    /// `config.json`.
    pub config: &'a [u8],
    /// `tokenizer.json`.
    pub tokenizer: &'a [u8],
    /// `tokenizer_config.json`.
    pub tokenizer_config: &'a [u8],
    /// `chat_template.jinja`, where there is one.
    pub chat_template: Option<&'a str>,
    /// `generation_config.json`, where there is one.
    pub generation_config: Option<&'a [u8]>,
}

/// A GGUF file that is not yet written: its head, and its tensors in order.
#[derive(Debug)]
pub struct Plan {
    /// The file's name.
    pub file_name: String,
    /// Everything before the first tensor's bytes.
    pub head: Vec<u8>,
    /// The tensors. Each is followed by [`PlannedTensor::padding`].
    pub tensors: Vec<PlannedTensor>,
    /// Ollama's `Modelfile` for it.
    pub modelfile: String,
}

/// Where a tensor's values come from.
#[derive(Debug, Clone, PartialEq)]
pub enum Source {
    /// The tensor of that name in the Hugging Face directory.
    Weight(String),
    /// What the config holds of it.
    Values(Vec<f32>),
}

/// A tensor of the file.
#[derive(Debug)]
pub struct PlannedTensor {
    /// GGUF's name of it.
    pub name: String,
    /// Where its values come from.
    pub source: Source,
    /// As PyTorch counts: the last dimension is the contiguous one.
    shape: Vec<usize>,
    kind: TensorType,
    change: Change,
}

impl Plan {
    /// The file of a model with these files and tensors, `model` being its name.
    ///
    /// # Errors
    /// [`GgufError`] naming what a GGUF cannot say.
    pub fn new<'a>(
        model: &str,
        files: &ModelFiles<'_>,
        tensors: impl IntoIterator<Item = (&'a str, &'a [usize])>,
        storage: StorageType,
    ) -> Result<Self, GgufError> {
        let config: Json = parse("config.json", files.config)?;
        let architecture = Architecture::read(&config)?;
        let tensors = planned(&architecture, tensors, storage)?;

        let mut metadata = architecture.metadata()?;
        let mut put = |key: &str, value: Value| metadata.push((key.to_owned(), value));
        put("general.type", "model".into());
        put("general.name", model.into());
        put("general.file_type", storage.file_type().into());
        put("general.quantization_version", QUANTIZATION_VERSION.into());
        let tokenizer = read_tokenizer(files, architecture.vocabulary)?;
        metadata.extend(tokenizer.metadata);

        let mut offset = 0;
        let places: Vec<Place<'_>> = tensors
            .iter()
            .map(|tensor| {
                let place =
                    Place { name: &tensor.name, shape: &tensor.shape, kind: tensor.kind, offset };
                offset += (tensor.bytes() + tensor.padding()) as u64;
                place
            })
            .collect();
        let head = header(&metadata, &places);
        let file_name = format!("model-{}.gguf", storage.name());
        let modelfile = modelfile(&file_name, &tokenizer.stops);
        Ok(Self { head, tensors, modelfile, file_name })
    }

    /// Bytes of the whole file.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let tensors = self.tensors.iter().map(|tensor| (tensor.bytes() + tensor.padding()) as u64);
        self.head.len() as u64 + tensors.sum::<u64>()
    }
}

impl PlannedTensor {
    /// Its rows; those of a vector are its values.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Values in a row.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.shape.iter().skip(1).product()
    }

    /// The rows that are encoded together, one range after the other.
    pub fn pieces(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let unit = match self.change {
            Change::Permuted { head_dim } => head_dim,
            Change::None | Change::Norm { .. } | Change::Scaled { .. } => 1,
        };
        let step = (PIECE / (unit * self.columns()).max(1)).max(1) * unit;
        let rows = self.rows();
        (0..rows).step_by(step).map(move |first| first..(first + step).min(rows))
    }

    /// The bytes of one of its [pieces](Self::pieces), whose values in Hugging Face's form these
    /// are.
    ///
    /// # Errors
    /// For a value that half precision cannot hold, where it or its block's scale is stored so.
    pub fn encode(&self, mut values: Vec<f32>) -> Result<Vec<u8>, BeyondType> {
        match self.change {
            Change::None => {}
            Change::Norm { factor } => {
                values.iter_mut().for_each(|value| *value = (*value + 1.0) * factor);
            }
            Change::Scaled { factor } => values.iter_mut().for_each(|value| *value *= factor),
            Change::Permuted { head_dim } => {
                values = permute(&values, head_dim, self.columns());
            }
        }
        self.kind.encode(&values).map_err(|value| BeyondType { value, float: FloatType::F16 })
    }

    /// Whether any value may be beyond what the type holds.
    #[must_use]
    pub fn may_be_beyond(&self) -> bool {
        self.kind != TensorType::F32
    }

    /// As [`encode`](Self::encode), without the bytes, and quick where nothing is wrong: the scale of a
    /// block is never greater than its greatest value.
    ///
    /// # Errors
    /// Those of [`encode`](Self::encode).
    pub fn check(&self, values: Vec<f32>) -> Result<(), BeyondType> {
        let greatest = match self.change {
            Change::Scaled { factor } => FloatType::F16.max() / factor.max(1.0),
            _ => FloatType::F16.max(),
        };
        if !self.may_be_beyond() || values.iter().all(|value| value.abs() <= greatest) {
            return Ok(());
        }
        self.encode(values).map(drop)
    }

    /// Bytes of its values.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.kind.bytes(self.shape.iter().product())
    }

    /// Bytes of zeros behind it.
    #[must_use]
    pub fn padding(&self) -> usize {
        self.bytes().next_multiple_of(ALIGNMENT) - self.bytes()
    }
}

/// Every tensor with its place, embedding first, then layer by layer.
fn planned<'a>(
    architecture: &Architecture<'_>,
    tensors: impl IntoIterator<Item = (&'a str, &'a [usize])>,
    storage: StorageType,
) -> Result<Vec<PlannedTensor>, GgufError> {
    let mut placed = Vec::new();
    let mut names = HashSet::new();
    for (name, shape) in tensors {
        // The embedding is the head of such a model.
        if name == HEAD && architecture.tied_head {
            continue;
        }
        let (to, change) = architecture.place(name).ok_or_else(|| {
            GgufError::new(format!(
                "tensor {name} has no place in the file of a {}; download it with format=merged",
                architecture.name()
            ))
        })?;
        if !names.insert(to.clone()) {
            return Err(GgufError::new(format!("tensor {name} is there twice")));
        }
        let kind = storage.of(TensorFacts {
            name: &to,
            shape,
            layer: layer_of(&to),
            layers: architecture.layers,
            is_head: to == "output.weight" || architecture.tied_head && to == "token_embd.weight",
        });
        let (source, shape) = (Source::Weight(name.to_owned()), shape.to_vec());
        placed.push(PlannedTensor { name: to, source, shape, kind, change });
    }
    if !names.contains("token_embd.weight") {
        return Err(GgufError::new(format!("there is no tensor {EMBEDDING}")));
    }
    placed.sort_by_key(|tensor| order(&tensor.name));
    for (name, values) in architecture.tables()? {
        let table = PlannedTensor {
            name: name.to_owned(),
            shape: vec![values.len()],
            source: Source::Values(values),
            kind: TensorType::F32,
            change: Change::None,
        };
        placed.insert(1, table);
    }
    Ok(placed)
}

/// Embedding, layers by number, what follows them; by name within.
fn order(name: &str) -> (usize, usize, String) {
    match layer_of(name) {
        Some(layer) => (1, layer, name.to_owned()),
        None => (if name.starts_with("token_embd") { 0 } else { 2 }, 0, name.to_owned()),
    }
}

fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

fn read_tokenizer(
    files: &ModelFiles<'_>,
    rows: usize,
) -> Result<super::tokenizer::Tokenizer, GgufError> {
    let config: Map<String, Json> = parse("tokenizer_config.json", files.tokenizer_config)?;
    let named = named_special_tokens(&config);
    let templates = chat_templates(&config, files.chat_template);
    let template = templates.iter().find(|(name, _)| *name == "default").map(|(_, text)| *text);
    let loaded =
        ChatTokenizer::from_parts(files.tokenizer, files.tokenizer_config, files.chat_template)
            .map_err(|error| GgufError::new(error.to_string()))?;
    let generation: Json = match files.generation_config {
        Some(bytes) => parse("generation_config.json", bytes)?,
        None => Json::Null,
    };
    let roles = Roles {
        named: &named,
        begins: loaded.begin_id().is_some(),
        stops: &generation["eos_token_id"],
        template,
    };
    tokenizer(files.tokenizer, &roles, rows)
}

fn parse<T: serde::de::DeserializeOwned>(name: &str, bytes: &[u8]) -> Result<T, GgufError> {
    serde_json::from_slice(bytes).map_err(|error| GgufError::new(format!("{name}: {error}")))
}

/// llama.cpp lays the two halves of a head that rotate together side by side: its row `2j + k` is
/// Hugging Face's row `k·head_dim/2 + j`.
fn permute(values: &[f32], head_dim: usize, columns: usize) -> Vec<f32> {
    let half = head_dim / 2;
    let mut permuted = Vec::with_capacity(values.len());
    for head in values.chunks_exact(head_dim * columns) {
        for (j, k) in (0..half).flat_map(|j| (0..2).map(move |k| (j, k))) {
            let row = k * half + j;
            permuted.extend_from_slice(&head[row * columns..(row + 1) * columns]);
        }
    }
    permuted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_each_head_are_interleaved() {
        let values: Vec<f32> = (0..16).map(|v| v as f32).collect();
        let rows = permute(&values, 4, 2);
        let expected = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15];
        assert_eq!(rows, expected.map(|v| v as f32));
    }

    #[test]
    fn pieces_hold_whole_heads_and_every_row_once() {
        let tensor = PlannedTensor {
            name: String::new(),
            source: Source::Values(Vec::new()),
            shape: vec![6 * 64, 10_000],
            kind: TensorType::F16,
            change: Change::Permuted { head_dim: 64 },
        };
        let pieces: Vec<_> = tensor.pieces().collect();
        assert_eq!(pieces.len(), 6);
        assert!(pieces.windows(2).all(|pair| pair[0].end == pair[1].start));
        assert!(pieces.iter().all(|piece| piece.len() == 64));
    }

    #[test]
    fn a_value_that_half_precision_holds_until_it_is_scaled_is_refused() {
        let tensor = |change| PlannedTensor {
            name: String::new(),
            source: Source::Values(Vec::new()),
            shape: vec![1, 2],
            kind: TensorType::F16,
            change,
        };
        let values = vec![1.0, 40_000.0];
        assert_eq!(tensor(Change::None).check(values.clone()), Ok(()));
        let scaled = tensor(Change::Scaled { factor: 2.0 });
        assert_eq!(scaled.check(values.clone()).map_err(|beyond| beyond.value), Err(80_000.0));
        assert!(scaled.encode(values.clone()).is_err());
        let shrunk = tensor(Change::Scaled { factor: 0.5 });
        assert_eq!(shrunk.check(vec![100_000.0, 1.0]), Ok(()));
        assert_eq!(
            shrunk.encode(values).expect("held")[2..],
            half::f16::from_f32(20_000.0).to_le_bytes()
        );
    }
}
