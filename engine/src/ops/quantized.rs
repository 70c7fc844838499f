//! A frozen matrix kept in blocks of 64 codes with one scale each, as QLoRA has it (Dettmers et al.
//! 2023).
//!
//! A block's scale is its greatest magnitude. `int8` stores round(127·w / scale); `nf4` stores which
//! of 16 values lies nearest to w / scale: quantiles of a normal distribution, two codes to a byte,
//! the first in the upper half. Blocks run along a row and start anew in each, which is how
//! bitsandbytes lays them out wherever a row is a multiple of 64 wide. Double quantisation of the
//! scales is left out: a weight takes 8.5 or 4.5 bits.
//!
//! On the CPU nothing ever holds the whole matrix as numbers again: products decode the part that
//! they are packing. A GPU decodes one matrix at a time.

#[cfg(feature = "gpu")]
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;
use tunesmith_core::hyperparameters::Quantization;

use super::cpu::gemm::Decode;
#[cfg(feature = "gpu")]
use super::gpu;

/// Weights to a scale.
pub(super) const BLOCK: usize = 64;

/// The 16 values of NF4 (Dettmers et al. 2023, appendix E), as bitsandbytes has them in f32.
pub(super) const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The two values of each byte of codes, so that one load gives both.
static NF4_PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [NF4[byte >> 4], NF4[byte & 15]];
        byte += 1;
    }
    pairs
};

/// How a code becomes a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BlockFormat {
    Int8,
    Nf4,
}

impl BlockFormat {
    /// None where weights stay the numbers they are.
    pub(crate) fn of(quantization: Quantization) -> Option<Self> {
        match quantization {
            Quantization::None => None,
            Quantization::Int8 => Some(Self::Int8),
            Quantization::Nf4 => Some(Self::Nf4),
        }
    }

    pub(super) fn row_bytes(self, columns: usize) -> usize {
        match self {
            Self::Int8 => columns,
            // A block of an odd length, at the end of a row, leaves half a byte.
            Self::Nf4 => columns.div_ceil(2),
        }
    }
}

/// A matrix in blocks, row by row.
#[derive(Debug)]
pub(crate) struct QuantizedMatrix {
    format: BlockFormat,
    columns: usize,
    codes: Vec<u8>,
    /// The greatest magnitude of each block.
    scales: Vec<f32>,
    /// The same on the GPUs that have computed with it.
    #[cfg(feature = "gpu")]
    on_gpus: Mutex<Vec<gpu::quantized::Blocks>>,
}

impl QuantizedMatrix {
    /// A matrix without rows, `columns` wide.
    pub(crate) fn new(format: BlockFormat, columns: usize) -> Self {
        Self {
            format,
            columns,
            codes: Vec::new(),
            scales: Vec::new(),
            #[cfg(feature = "gpu")]
            on_gpus: Mutex::default(),
        }
    }

    /// Its blocks in the memory of a GPU, to which they are sent once.
    #[cfg(feature = "gpu")]
    pub(super) fn on_gpu(&self, device: &burn::tensor::Device) -> gpu::quantized::Blocks {
        let mut on_gpus = self.on_gpus.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(blocks) = on_gpus.iter().find(|blocks| blocks.is_on(device)) {
            return blocks.clone();
        }
        let blocks = gpu::quantized::Blocks::new(&self.codes, &self.scales, device);
        on_gpus.push(blocks.clone());
        blocks
    }

    /// How its codes become numbers.
    #[cfg(feature = "gpu")]
    pub(super) fn format(&self) -> BlockFormat {
        self.format
    }

    /// Appends the rows that `values` holds. Every value must be finite.
    pub(crate) fn push_rows(&mut self, values: &[f32]) {
        let (format, columns) = (self.format, self.columns);
        assert_eq!(values.len() % columns, 0, "whole rows");
        let rows: Vec<(Vec<u8>, Vec<f32>)> =
            values.par_chunks_exact(columns).map(|row| encode_row(format, row)).collect();
        self.codes.reserve_exact(rows.len() * format.row_bytes(columns));
        self.scales.reserve_exact(rows.len() * columns.div_ceil(BLOCK));
        for (codes, scales) in rows {
            self.codes.extend(codes);
            self.scales.extend(scales);
        }
    }

    /// Rows and columns.
    pub(crate) fn dims(&self) -> [usize; 2] {
        [self.codes.len() / self.format.row_bytes(self.columns), self.columns]
    }

    /// Bytes that it takes.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> usize {
        self.codes.capacity() + size_of::<f32>() * self.scales.capacity()
    }

    /// The whole matrix as numbers: for tests, and for devices without a form of their own.
    pub(crate) fn to_dense(&self) -> Vec<f32> {
        let [rows, columns] = self.dims();
        let mut values = vec![0.0; rows * columns];
        values
            .par_chunks_mut(columns)
            .enumerate()
            .for_each(|(row, values)| self.decode(row * columns, values));
        values
    }

    /// Decodes whole rows from row `first` on, as many as `target` holds.
    pub(crate) fn decode_rows(&self, first: usize, target: &mut [f32]) {
        self.decode(first * self.columns, target);
    }

    /// Decodes elements of one row from column `first` on.
    fn decode_in_row(&self, row: usize, first: usize, mut target: &mut [f32]) {
        let bytes = self.format.row_bytes(self.columns);
        let blocks = self.columns.div_ceil(BLOCK);
        let codes = &self.codes[row * bytes..][..bytes];
        let scales = &self.scales[row * blocks..][..blocks];
        let mut column = first;
        while !target.is_empty() {
            let rest_of_block = BLOCK - column % BLOCK;
            let (now, later) = target.split_at_mut(rest_of_block.min(target.len()));
            decode_block(self.format, codes, column, scales[column / BLOCK], now);
            column += now.len();
            target = later;
        }
    }
}

impl Decode for QuantizedMatrix {
    fn len(&self) -> usize {
        let [rows, columns] = self.dims();
        rows * columns
    }

    fn decode(&self, first: usize, mut values: &mut [f32]) {
        let (mut row, mut column) = (first / self.columns, first % self.columns);
        while !values.is_empty() {
            let (now, later) = values.split_at_mut((self.columns - column).min(values.len()));
            self.decode_in_row(row, column, now);
            (row, column, values) = (row + 1, 0, later);
        }
    }
}

fn encode_row(format: BlockFormat, row: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let mut codes = Vec::with_capacity(format.row_bytes(row.len()));
    let mut scales = Vec::with_capacity(row.len().div_ceil(BLOCK));
    for block in row.chunks(BLOCK) {
        let scale = block.iter().fold(0f32, |greatest, value| greatest.max(value.abs()));
        // A block of zeros has the codes of zeros.
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        match format {
            BlockFormat::Int8 => {
                codes.extend(
                    block.iter().map(|value| (value * inverse * 127.0).round() as i8 as u8),
                );
            }
            BlockFormat::Nf4 => codes.extend(block.chunks(2).map(|pair| {
                let code = |value: Option<&f32>| value.map_or(0, |value| nearest(value * inverse));
                code(pair.first()) << 4 | code(pair.get(1))
            })),
        }
        scales.push(scale);
    }
    (codes, scales)
}

/// The number of the NF4 value nearest to `value`, which lies in −1..1.
fn nearest(value: f32) -> u8 {
    NF4.windows(2).filter(|pair| value > (pair[0] + pair[1]) / 2.0).count() as u8
}

/// Decodes elements of one block, the first of which is `column` of the row with these codes.
fn decode_block(format: BlockFormat, codes: &[u8], column: usize, scale: f32, target: &mut [f32]) {
    match format {
        BlockFormat::Int8 => {
            let step = scale / 127.0;
            for (value, &code) in target.iter_mut().zip(&codes[column..]) {
                *value = f32::from(code as i8) * step;
            }
        }
        BlockFormat::Nf4 => {
            let mut target = target;
            let mut byte = column / 2;
            if column % 2 == 1 {
                let Some((value, rest)) = target.split_first_mut() else { return };
                *value = NF4_PAIRS[usize::from(codes[byte])][1] * scale;
                (target, byte) = (rest, byte + 1);
            }
            for (values, &byte) in target.chunks_mut(2).zip(&codes[byte..]) {
                for (value, code) in values.iter_mut().zip(NF4_PAIRS[usize::from(byte)]) {
                    *value = code * scale;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use safetensors::SafeTensors;

    use super::*;
    use crate::ops::testing::random;
    use crate::parameter::read;

    fn quantized(format: BlockFormat, values: &[f32], columns: usize) -> QuantizedMatrix {
        let mut matrix = QuantizedMatrix::new(format, columns);
        matrix.push_rows(values);
        matrix
    }

    #[test]
    fn codes_scales_and_values_of_nf4_are_those_of_bitsandbytes() {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/adapters/nf4.safetensors");
        let bytes = std::fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let floats = |name: &str| -> Vec<f32> {
            bytemuck::pod_collect_to_vec(file.tensor(name).unwrap().data())
        };
        assert_eq!(floats("code"), NF4);
        let matrix = quantized(BlockFormat::Nf4, &floats("values"), 192);
        assert_eq!(matrix.dims(), [24, 192]);
        assert_eq!(matrix.codes, file.tensor("packed").unwrap().data());
        assert_eq!(matrix.scales, floats("absmax"));
        assert_eq!(matrix.to_dense(), floats("dequantized"));
    }

    #[test]
    fn no_value_moves_by_more_than_half_a_gap_of_its_block() {
        // The widest gap of NF4, and of int8, between neighbours; rows end in a shorter block.
        let widest = NF4.windows(2).map(|pair| pair[1] - pair[0]).fold(0f32, f32::max);
        for (format, gap) in [(BlockFormat::Nf4, widest), (BlockFormat::Int8, 1.0 / 127.0)] {
            for columns in [64, 77, 200, 1] {
                let values = read(random([9, columns], 3)).unwrap();
                let back = quantized(format, &values, columns).to_dense();
                for (row, back) in values.chunks(columns).zip(back.chunks(columns)) {
                    for (block, back) in row.chunks(BLOCK).zip(back.chunks(BLOCK)) {
                        let scale = block.iter().fold(0f32, |m, x| m.max(x.abs()));
                        for (x, y) in block.iter().zip(back) {
                            let bound = scale * gap / 2.0 * 1.0001;
                            assert!((x - y).abs() <= bound, "{format:?}: {x} {y} in {scale}");
                            // The greatest magnitude is kept as it is.
                            assert!(x.abs() != scale || (x - y).abs() <= 1e-6 * scale);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_was_quantised_quantises_to_itself() {
        for format in [BlockFormat::Nf4, BlockFormat::Int8] {
            let once = quantized(format, &read(random([5, 130], 4)).unwrap(), 130).to_dense();
            let twice = quantized(format, &once, 130).to_dense();
            for (x, y) in once.iter().zip(twice) {
                assert!((x - y).abs() <= 1e-6, "{format:?}: {x} {y}");
            }
        }
    }

    #[test]
    fn weight_takes_four_and_a_half_or_eight_and_a_half_bits() {
        let values = read(random([16, 256], 5)).unwrap();
        let bits = |format| 8 * quantized(format, &values, 256).bytes() as u32;
        assert_eq!(bits(BlockFormat::Nf4), 16 * 256 * 9 / 2);
        assert_eq!(bits(BlockFormat::Int8), 16 * 256 * 17 / 2);
    }

    #[test]
    fn any_part_is_that_of_the_whole_across_blocks_and_rows_of_an_odd_width() {
        for format in [BlockFormat::Int8, BlockFormat::Nf4] {
            let mut matrix = quantized(format, &read(random([3, 133], 6)).unwrap(), 133);
            matrix.push_rows(&read(random([4, 133], 7)).unwrap());
            let whole = matrix.to_dense();
            assert_eq!((whole.len(), matrix.len()), (7 * 133, 7 * 133));
            for first in [0, 1, 63, 64, 65, 130, 132, 133, 134, 400] {
                for count in [0, 1, 2, 3, 70, 133, 300] {
                    let mut part = vec![f32::NAN; count];
                    matrix.decode(first, &mut part);
                    assert_eq!(part, whole[first..first + count], "{format:?} {first} {count}");
                }
            }
        }
    }
}
