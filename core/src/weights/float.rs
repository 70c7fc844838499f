//! The types of numbers that weights are stored in.

use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use std::fmt;

/// How a tensor's numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FloatType {
    /// 4 bytes.
    F32,
    /// 2 bytes, the upper half of an f32.
    Bf16,
    /// 2 bytes, IEEE half precision.
    F16,
}

impl fmt::Display for FloatType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A number that a type cannot hold.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("{value} is beyond the numbers of {float}, which end at {}", float.max())]
pub struct BeyondType {
    /// The number.
    pub value: f32,
    /// The type.
    pub float: FloatType,
}

impl FloatType {
    /// All of them, the widest first.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// The name in requests and manifests.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// The name in the header of a safetensors file.
    #[must_use]
    pub const fn safetensors_name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
        }
    }

    /// PyTorch's name, which a `config.json` has.
    #[must_use]
    pub const fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    /// The type that a safetensors header names; `None` for one that no adapter merges into.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|float| float.safetensors_name() == name)
    }

    /// Bytes to one number.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// The largest finite number.
    #[must_use]
    pub fn max(self) -> f32 {
        match self {
            Self::F32 => f32::MAX,
            Self::Bf16 => bf16::MAX.to_f32(),
            Self::F16 => f16::MAX.to_f32(),
        }
    }

    /// The little-endian numbers in `bytes`, widened; a rest shorter than one number is left out.
    #[must_use]
    pub fn decode(self, bytes: &[u8]) -> Vec<f32> {
        bytes.chunks_exact(self.size()).map(|number| self.read(number)).collect()
    }

    /// `values` as little-endian bytes, each rounded to the nearest number of the type, ties to the
    /// even one.
    ///
    /// # Errors
    /// A finite value that would become infinite.
    pub fn encode(self, values: &[f32]) -> Result<Vec<u8>, BeyondType> {
        let mut bytes = vec![0; values.len() * self.size()];
        for (&value, number) in values.iter().zip(bytes.chunks_exact_mut(self.size())) {
            self.write(value, number);
            if value.is_finite() && !self.read(number).is_finite() {
                return Err(BeyondType { value, float: self });
            }
        }
        Ok(bytes)
    }

    fn read(self, number: &[u8]) -> f32 {
        match (self, number) {
            (Self::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
            (Self::Bf16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
            (Self::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
            _ => unreachable!("chunks are as long as one number"),
        }
    }

    /// Stores `value`, rounded to the nearest number of the type, ties to the even one.
    fn write(self, value: f32, number: &mut [u8]) {
        match self {
            Self::F32 => number.copy_from_slice(&value.to_le_bytes()),
            Self::Bf16 => number.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
            Self::F16 => number.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_rounded_to_the_nearest_and_come_back() {
        let values = [0.0, -0.0, 1.0, -2.5, 0.1, 6e-8, 65504.0];
        assert_eq!(FloatType::F32.decode(&FloatType::F32.encode(&values).expect("fits")), values);
        let halves = FloatType::F16.decode(&FloatType::F16.encode(&values).expect("fits"));
        let expected = values.map(|value| f16::from_f32(value).to_f32());
        assert_eq!(halves, expected);
        assert!((halves[4] - 0.1).abs() < 1e-4 && halves[4] != 0.1);
        let halves = FloatType::Bf16.decode(&FloatType::Bf16.encode(&values).expect("fits"));
        assert_eq!(halves, values.map(|value| bf16::from_f32(value).to_f32()));
    }

    #[test]
    fn a_number_beyond_the_type_is_refused_and_infinity_is_kept() {
        // 65520 is halfway to the number that would come after 65504.
        assert!(FloatType::F16.encode(&[65519.0, -65519.0]).is_ok());
        let error = FloatType::F16.encode(&[1.0, -65520.0]).expect_err("beyond");
        assert_eq!(error.to_string(), "-65520 is beyond the numbers of f16, which end at 65504");
        assert!(FloatType::Bf16.encode(&[65520.0]).is_ok());
        assert!(FloatType::Bf16.encode(&[f32::MAX]).is_err());
        for float in FloatType::ALL {
            let kept = float.decode(&float.encode(&[f32::INFINITY, f32::NAN]).expect("kept"));
            assert!(kept[0] == f32::INFINITY && kept[1].is_nan(), "{float}");
        }
    }
}
