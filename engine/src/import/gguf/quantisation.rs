//! How GGUF stores numbers, and the f32 that each stored block stands for.
//!
//! The layouts are those of `ggml-common.h`. The arithmetic is that of ggml's reference
//! dequantisation, operation by operation in f32, so that every value has the bits that
//! llama.cpp and the `gguf` package see.

use half::{bf16, f16};

/// A storage type that is read exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(non_camel_case_types, reason = "the names by which GGUF calls its types")]
pub(super) enum TensorType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
}

/// How many values share one scale, and in how many bytes they are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) values: usize,
    pub(super) bytes: usize,
}

/// Values in a block of the k-quants.
const SUPER: usize = 256;

/// Each type with its number in the file.
const TYPES: [(u32, TensorType, &str); 15] = [
    (0, TensorType::F32, "F32"),
    (1, TensorType::F16, "F16"),
    (30, TensorType::BF16, "BF16"),
    (2, TensorType::Q4_0, "Q4_0"),
    (3, TensorType::Q4_1, "Q4_1"),
    (6, TensorType::Q5_0, "Q5_0"),
    (7, TensorType::Q5_1, "Q5_1"),
    (8, TensorType::Q8_0, "Q8_0"),
    (10, TensorType::Q2_K, "Q2_K"),
    (11, TensorType::Q3_K, "Q3_K"),
    (12, TensorType::Q4_K, "Q4_K"),
    (13, TensorType::Q5_K, "Q5_K"),
    (14, TensorType::Q6_K, "Q6_K"),
    (20, TensorType::IQ4_NL, "IQ4_NL"),
    (23, TensorType::IQ4_XS, "IQ4_XS"),
];

/// Types that are known by name only. Q8_1 and Q8_K are forms of activations, which no converter
/// writes into a file.
const OTHER_TYPES: [(u32, &str); 18] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

/// What the four bits of IQ4 stand for.
const IQ4_VALUES: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

impl TensorType {
    /// The type of a number in the file, or the name of one that is not read.
    pub(super) fn from_code(code: u32) -> Result<Self, String> {
        if let Some((_, kind, _)) = TYPES.iter().find(|(known, ..)| *known == code) {
            return Ok(*kind);
        }
        Err(OTHER_TYPES
            .iter()
            .find(|(known, _)| *known == code)
            .map_or_else(|| format!("type number {code}"), |(_, name)| (*name).to_owned()))
    }

    /// GGUF's name.
    pub(super) fn name(self) -> &'static str {
        TYPES.iter().find(|(_, kind, _)| *kind == self).map_or("", |(.., name)| name)
    }

    /// All names, for messages.
    pub(super) fn names() -> String {
        TYPES.map(|(.., name)| name).join(", ")
    }

    /// The unit of storage.
    pub(super) const fn block(self) -> Block {
        let (values, bytes) = match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::BF16 => (1, 2),
            Self::Q4_0 | Self::IQ4_NL => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q2_K => (SUPER, 84),
            Self::Q3_K => (SUPER, 110),
            Self::Q4_K => (SUPER, 144),
            Self::Q5_K => (SUPER, 176),
            Self::Q6_K => (SUPER, 210),
            Self::IQ4_XS => (SUPER, 136),
        };
        Block { values, bytes }
    }

    /// Turns whole blocks into as many values as they hold.
    pub(super) fn dequantise(self, bytes: &[u8], values: &mut [f32]) {
        let decode = match self {
            Self::F32 => return convert(bytes, values, f32::from_le_bytes),
            Self::F16 => return convert(bytes, values, |b| f16::from_le_bytes(b).to_f32()),
            Self::BF16 => return convert(bytes, values, |b| bf16::from_le_bytes(b).to_f32()),
            Self::Q4_0 => q4_0,
            Self::Q4_1 => q4_1,
            Self::Q5_0 => q5_0,
            Self::Q5_1 => q5_1,
            Self::Q8_0 => q8_0,
            Self::Q2_K => q2_k,
            Self::Q3_K => q3_k,
            Self::Q4_K => q4_k,
            Self::Q5_K => q5_k,
            Self::Q6_K => q6_k,
            Self::IQ4_NL => iq4_nl,
            Self::IQ4_XS => iq4_xs,
        };
        let block = self.block();
        for (bytes, values) in
            bytes.chunks_exact(block.bytes).zip(values.chunks_exact_mut(block.values))
        {
            decode(bytes, values);
        }
    }
}

fn convert<const N: usize>(bytes: &[u8], values: &mut [f32], number: impl Fn([u8; N]) -> f32) {
    for (value, &bytes) in values.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *value = number(bytes);
    }
}

/// The f16 at `at`.
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Value `index` of a block of 32 whose low halves of 16 bytes come first.
fn nibble(bytes: &[u8], index: usize) -> u8 {
    (bytes[index % 16] >> (index / 16 * 4)) & 15
}

/// Bit `index` of four bytes.
fn bit(bytes: &[u8], index: usize) -> u8 {
    (bytes[index / 8] >> (index % 8)) & 1
}

fn q4_0(block: &[u8], values: &mut [f32]) {
    let scale = half(block, 0);
    for (index, value) in values.iter_mut().enumerate() {
        *value = scale * (f32::from(nibble(&block[2..], index)) - 8.0);
    }
}

fn q4_1(block: &[u8], values: &mut [f32]) {
    let (scale, least) = (half(block, 0), half(block, 2));
    for (index, value) in values.iter_mut().enumerate() {
        *value = scale * f32::from(nibble(&block[4..], index)) + least;
    }
}

fn q5_0(block: &[u8], values: &mut [f32]) {
    let scale = half(block, 0);
    for (index, value) in values.iter_mut().enumerate() {
        let quant = nibble(&block[6..], index) | bit(&block[2..6], index) << 4;
        *value = scale * (f32::from(quant) - 16.0);
    }
}

fn q5_1(block: &[u8], values: &mut [f32]) {
    let (scale, least) = (half(block, 0), half(block, 2));
    for (index, value) in values.iter_mut().enumerate() {
        let quant = nibble(&block[8..], index) | bit(&block[4..8], index) << 4;
        *value = scale * f32::from(quant) + least;
    }
}

fn q8_0(block: &[u8], values: &mut [f32]) {
    let scale = half(block, 0);
    for (value, &quant) in values.iter_mut().zip(&block[2..]) {
        *value = scale * f32::from(quant as i8);
    }
}

/// Value `index` of 256 stored in two bits: four groups of 32 lie in the same 32 bytes.
fn two_bits(bytes: &[u8], index: usize) -> u8 {
    (bytes[index / 128 * 32 + index % 32] >> (index / 32 % 4 * 2)) & 3
}

fn q2_k(block: &[u8], values: &mut [f32]) {
    let (scales, quants) = (&block[..16], &block[16..80]);
    let (scale, least) = (half(block, 80), half(block, 82));
    for (index, value) in values.iter_mut().enumerate() {
        let packed = scales[index / 16];
        let scale = scale * f32::from(packed & 15);
        let least = least * f32::from(packed >> 4);
        *value = scale * f32::from(two_bits(quants, index)) - least;
    }
}

fn q3_k(block: &[u8], values: &mut [f32]) {
    let (high, quants, scales) = (&block[..32], &block[32..96], &block[96..108]);
    let scale = half(block, 108);
    for (index, value) in values.iter_mut().enumerate() {
        let group = index / 16;
        // Four bits of each of the 16 scales lie in the first eight bytes, two in the last four.
        let low_bits = (scales[group % 8] >> (group / 8 * 4)) & 15;
        let high_bits = (scales[8 + group % 4] >> (group / 4 * 2)) & 3;
        let scale = scale * (f32::from(low_bits | high_bits << 4) - 32.0);
        // A third bit that is not set takes four away.
        let third = (high[index % 32] >> (index / 32)) & 1;
        let offset = if third == 1 { 0.0 } else { 4.0 };
        *value = scale * (f32::from(two_bits(quants, index)) - offset);
    }
}

/// Scale and minimum of a group of 32, of six bits each, packed eight pairs to twelve bytes.
fn scale_and_least(packed: &[u8], group: usize) -> (f32, f32) {
    let (scale, least) = if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        (
            (packed[group + 4] & 15) | ((packed[group - 4] >> 6) << 4),
            (packed[group + 4] >> 4) | ((packed[group] >> 6) << 4),
        )
    };
    (f32::from(scale), f32::from(least))
}

/// Value `index` of 256 stored in four bits: two groups of 32 lie in the same 32 bytes.
fn four_bits(bytes: &[u8], index: usize) -> u8 {
    (bytes[index / 64 * 32 + index % 32] >> (index / 32 % 2 * 4)) & 15
}

fn q4_k(block: &[u8], values: &mut [f32]) {
    let (scale, least) = (half(block, 0), half(block, 2));
    for (group, values) in values.chunks_exact_mut(32).enumerate() {
        let (group_scale, group_least) = scale_and_least(&block[4..16], group);
        let (scale, least) = (scale * group_scale, least * group_least);
        for (index, value) in values.iter_mut().enumerate() {
            *value = scale * f32::from(four_bits(&block[16..], group * 32 + index)) - least;
        }
    }
}

fn q5_k(block: &[u8], values: &mut [f32]) {
    let (scale, least) = (half(block, 0), half(block, 2));
    for (group, values) in values.chunks_exact_mut(32).enumerate() {
        let (group_scale, group_least) = scale_and_least(&block[4..16], group);
        let (scale, least) = (scale * group_scale, least * group_least);
        for (index, value) in values.iter_mut().enumerate() {
            let high = (block[16 + index] >> group) & 1;
            let quant = four_bits(&block[48..], group * 32 + index) | high << 4;
            *value = scale * f32::from(quant) - least;
        }
    }
}

fn q6_k(block: &[u8], values: &mut [f32]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let scale = half(block, 208);
    for (index, value) in values.iter_mut().enumerate() {
        let low = (low[index / 128 * 64 + index % 64] >> (index / 64 % 2 * 4)) & 15;
        let quant = f32::from(low | two_bits(high, index) << 4) - 32.0;
        *value = scale * f32::from(scales[index / 16] as i8) * quant;
    }
}

fn iq4_nl(block: &[u8], values: &mut [f32]) {
    let scale = half(block, 0);
    for (index, value) in values.iter_mut().enumerate() {
        *value = scale * f32::from(IQ4_VALUES[usize::from(nibble(&block[2..], index))]);
    }
}

fn iq4_xs(block: &[u8], values: &mut [f32]) {
    let scale = half(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    for (group, values) in values.chunks_exact_mut(32).enumerate() {
        let low_bits = (block[4 + group / 2] >> (group % 2 * 4)) & 15;
        let high_bits = ((high >> (2 * group)) & 3) as u8;
        let scale = scale * (f32::from(low_bits | high_bits << 4) - 32.0);
        let quants = &block[8 + group * 16..];
        for (index, value) in values.iter_mut().enumerate() {
            *value = scale * f32::from(IQ4_VALUES[usize::from(nibble(quants, index))]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::file::GgufFile;
    use super::*;

    /// Blocks of every type with the values that the `gguf` package gives them, made by
    /// `scripts/fixtures/gguf_types.py`.
    #[test]
    fn every_type_is_dequantised_to_the_bits_of_the_reference() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/gguf/types.gguf");
        let (file, _) = GgufFile::open(&path).expect("the file");
        for (_, kind, name) in TYPES {
            let stored = &file.tensors[name];
            let expected = &file.tensors[&format!("{name}.values")];
            assert_eq!(stored.kind, kind);
            let values = file.read_whole(stored).expect("values");
            let expected = file.read_whole(expected).expect("values");
            assert_eq!(values.len(), 1024, "{name}");
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&values), bits(&expected), "{name}");

            // From the middle on, as large tensors are read piece by piece.
            let mut rest = vec![0.0; 512];
            file.read(stored, 512, &mut rest).expect("values");
            assert_eq!(bits(&rest), bits(&expected[512..]), "{name}");
        }
    }

    #[test]
    fn a_type_that_is_not_read_has_its_name() {
        assert_eq!(TensorType::from_code(19), Err("IQ1_S".to_owned()));
        assert_eq!(TensorType::from_code(15), Err("Q8_K".to_owned()));
        assert_eq!(TensorType::from_code(4), Err("type number 4".to_owned()));
        assert_eq!(TensorType::from_code(14).map(TensorType::name), Ok("Q6_K"));
    }
}
