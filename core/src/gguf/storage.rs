//! How GGUF stores numbers: the types that are written, with the bits of ggml's reference
//! quantisers.

use super::blocks::{self, Encode, SUPER, half};
use serde::{Deserialize, Serialize};

/// How the matrices of a file are stored, by the names that llama.cpp has for files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(non_camel_case_types, reason = "the names by which llama.cpp calls its files")]
pub enum StorageType {
    /// Half precision.
    F16,
    /// Blocks of 32 whole numbers of 8 bits with one scale: 8.5 bits a weight.
    Q8_0,
    /// Blocks of 256 with 4 bits a weight, and 6 where it matters most: about 4.8 bits a weight.
    Q4_K_M,
}

/// What the type of a tensor depends on.
#[derive(Debug, Clone, Copy)]
pub(super) struct TensorFacts<'a> {
    /// GGUF's name.
    pub(super) name: &'a str,
    pub(super) shape: &'a [usize],
    /// Its decoder layer.
    pub(super) layer: Option<usize>,
    /// Decoder layers of the model.
    pub(super) layers: usize,
    /// Whether it gives the logits.
    pub(super) is_head: bool,
}

impl StorageType {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F16, Self::Q8_0, Self::Q4_K_M];

    /// The name in requests and in file names.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Q8_0 => "q8_0",
            Self::Q4_K_M => "q4_k_m",
        }
    }

    /// `general.file_type`, as llama.cpp numbers it.
    pub(super) fn file_type(self) -> u32 {
        match self {
            Self::F16 => 1,
            Self::Q8_0 => 7,
            Self::Q4_K_M => 15,
        }
    }

    /// What a tensor is stored as, as llama.cpp's converter and `llama-quantize` choose. Norms and
    /// biases stay as they are. Rows that are no whole blocks of 256 have blocks of 32, and rows
    /// that are no whole blocks of these are kept in half precision.
    pub(super) fn of(self, tensor: TensorFacts<'_>) -> TensorType {
        let &[_, columns] = tensor.shape else { return TensorType::F32 };
        let wanted = match self {
            Self::F16 => TensorType::F16,
            Self::Q8_0 => TensorType::Q8_0,
            Self::Q4_K_M => mixed(tensor),
        };
        let fits = |kind: TensorType| columns.is_multiple_of(kind.block().0);
        let smaller = match wanted {
            TensorType::Q4_K => TensorType::Q5_0,
            TensorType::Q5_K => TensorType::Q5_1,
            TensorType::Q6_K => TensorType::Q8_0,
            other => other,
        };
        [wanted, smaller].into_iter().find(|&kind| fits(kind)).unwrap_or(TensorType::F16)
    }
}

/// The types of a `Q4_K_M` file.
fn mixed(tensor: TensorFacts<'_>) -> TensorType {
    let layers = tensor.layers;
    // The first and the last eighth of the layers, and every third between.
    let more_bits = tensor.layer.is_some_and(|layer| {
        layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2
    });
    let is = |part: &str| tensor.name.ends_with(part);
    if tensor.is_head || more_bits && (is(".attn_v.weight") || is(".ffn_down.weight")) {
        TensorType::Q6_K
    } else if is(".attn_qkv.weight") {
        TensorType::Q5_K
    } else {
        TensorType::Q4_K
    }
}

/// How one tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(non_camel_case_types, reason = "the names by which GGUF calls its types")]
pub enum TensorType {
    /// 4 bytes.
    F32,
    /// 2 bytes, IEEE half precision.
    F16,
    /// 32 values in 34 bytes.
    Q8_0,
    /// 32 values in 22 bytes.
    Q5_0,
    /// 32 values in 24 bytes.
    Q5_1,
    /// 256 values in 144 bytes.
    Q4_K,
    /// 256 values in 176 bytes.
    Q5_K,
    /// 256 values in 210 bytes.
    Q6_K,
}

impl TensorType {
    /// The type's number in a file.
    pub(super) fn code(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q4_K => 12,
            Self::Q5_K => 13,
            Self::Q6_K => 14,
        }
    }

    /// How many values share one block, and its bytes.
    pub(super) fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 => (1, 2),
            Self::Q8_0 => (32, 34),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q4_K => (SUPER, 144),
            Self::Q5_K => (SUPER, 176),
            Self::Q6_K => (SUPER, 210),
        }
    }

    /// Bytes of so many values, which are whole blocks.
    pub(super) fn bytes(self, values: usize) -> usize {
        let (block, bytes) = self.block();
        values / block * bytes
    }

    /// Whole blocks of `values`, encoded.
    ///
    /// # Errors
    /// With the first value that the type cannot hold.
    pub(super) fn encode(self, values: &[f32]) -> Result<Vec<u8>, f32> {
        let mut encoded = Vec::with_capacity(self.bytes(values.len()));
        let encode: Encode = match self {
            Self::F32 => {
                encoded.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                return Ok(encoded);
            }
            Self::F16 => {
                for &value in values {
                    encoded.extend(half(value)?.to_le_bytes());
                }
                return Ok(encoded);
            }
            Self::Q8_0 => blocks::q8_0,
            Self::Q5_0 => blocks::q5_0,
            Self::Q5_1 => blocks::q5_1,
            Self::Q4_K => blocks::q4_k,
            Self::Q5_K => blocks::q5_k,
            Self::Q6_K => blocks::q6_k,
        };
        if let Some(&value) = values.iter().find(|value| !value.is_finite()) {
            return Err(value);
        }
        for block in values.chunks_exact(self.block().0) {
            encode(block, &mut encoded)?;
        }
        Ok(encoded)
    }
}
