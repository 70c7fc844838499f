//! Linear projection of rows that are generated: without gradients, and with an adapter of its own
//! for each of some ranges of rows.
//!
//! One product with W serves all rows; only the thin products with A and B are each adapter's own.
//! With Rⱼ the rows of adapter j, Oᵢ the outputs of its part i, and g = m / n with DoRA (see
//! [`linear`](super::linear)), which no longer changes and is computed once, else 1:
//!
//! ```text
//! y         = x·Wᵀ
//! y[Rⱼ, Oᵢ] ← g ∘ (y[Rⱼ, Oᵢ] + s·x[Rⱼ]·Aᵢᵀ·Bᵢᵀ)
//! y         ← residual + y
//! ```
//!
//! On the CPU, inputs stay f32 beside a weight in bf16, whose values are f32 that end in zeros; the
//! portable form rounds them, as a GPU's product of bf16 has it.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::Tensor;

use super::linear::adapted_row_lengths;
use super::{cpu, on_cpu};

/// An adapter of one projection, ready to be used on any rows.
#[derive(Debug, Clone)]
pub(crate) struct RowUpdate {
    /// The Aᵢ one below the other, `[parts · r, in]`.
    pub(crate) a: Tensor<2>,
    /// The Bᵢᵀ side by side, `[r, Σ |Oᵢ|]`: as few rows go through them.
    pub(crate) b: Tensor<2>,
    /// s.
    pub(crate) scale: f32,
    /// DoRA's g, `[1, Σ |Oᵢ|]`.
    pub(crate) gain: Option<Tensor<2>>,
    /// The Oᵢ.
    pub(crate) outputs: Arc<[Range<usize>]>,
}

impl RowUpdate {
    /// One without gain, of the Aᵢ `[parts · r, in]` and the Bᵢ `[Σ |Oᵢ|, r]`.
    pub(crate) fn new(
        a: Tensor<2>,
        b: Tensor<2>,
        scale: f32,
        outputs: Arc<[Range<usize>]>,
    ) -> Self {
        let b = b.transpose();
        let b = if on_cpu(&b) { cpu::row_linear::in_order(b) } else { b };
        Self { a, b, scale, gain: None, outputs }
    }

    /// DoRA's g of its magnitudes m `[Σ |Oᵢ|, 1]`.
    pub(crate) fn with_magnitude(mut self, magnitude: Tensor<2>, weight: &Tensor<2>) -> Self {
        let [_, inputs] = weight.dims();
        let rank = self.b.dims()[0];
        let lengths = self.parts().map(|(a_rows, b_columns, outputs)| {
            let weight = weight.clone().slice([outputs, 0..inputs]);
            let a = self.a.clone().slice([a_rows, 0..inputs]);
            let b = self.b.clone().slice([0..rank, b_columns]).transpose();
            adapted_row_lengths(weight, a, b, self.scale)
        });
        let lengths = Tensor::cat(lengths.collect(), 0);
        self.gain = Some((magnitude / lengths).transpose());
        self
    }

    /// Each part's rows of A, its columns of Bᵀ, and its outputs.
    pub(super) fn parts(
        &self,
    ) -> impl Iterator<Item = (Range<usize>, Range<usize>, Range<usize>)> + '_ {
        let rank = self.b.dims()[0];
        let mut end = 0;
        self.outputs.iter().enumerate().map(move |(i, outputs)| {
            let start = end;
            end += outputs.len();
            (i * rank..(i + 1) * rank, start..end, outputs.clone())
        })
    }
}

/// How many rows a product has, which decides how it is computed, and so its last digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rows {
    /// One or a few from each of some sequences: reading W takes the time.
    Few,
    /// A prompt's: multiplying takes the time.
    Many,
}

/// `x` `[n, in]` to `[n, out]`; the ranges of `updates` follow one another and do not overlap.
pub(crate) fn row_linear(
    x: Tensor<2>,
    weight: Tensor<2>,
    residual: Option<Tensor<2>>,
    rows: Rows,
    updates: &[(Range<usize>, &RowUpdate)],
) -> Tensor<2> {
    if on_cpu(&x) {
        cpu::row_linear::row_linear(x, weight, residual, rows, updates)
    } else {
        portable(x, weight, residual, updates)
    }
}

fn portable(
    x: Tensor<2>,
    weight: Tensor<2>,
    residual: Option<Tensor<2>>,
    updates: &[(Range<usize>, &RowUpdate)],
) -> Tensor<2> {
    let [_, inputs] = x.dims();
    let mut y = super::bf16::matmul(x.clone(), weight.transpose());
    for (rows, update) in updates {
        let rank = update.b.dims()[0];
        let x = x.clone().slice([rows.clone(), 0..inputs]);
        for (a_rows, b_columns, outputs) in update.parts() {
            let a = update.a.clone().slice([a_rows, 0..inputs]);
            let b = update.b.clone().slice([0..rank, b_columns.clone()]);
            let low_rank = x.clone().matmul(a.transpose()).matmul(b);
            let place = [rows.clone(), outputs];
            let mut sum = y.clone().slice(place.clone()) + low_rank.mul_scalar(update.scale);
            if let Some(gain) = &update.gain {
                sum = sum * gain.clone().slice([0..1, b_columns]);
            }
            y = y.slice_assign(place, sum);
        }
    }
    match residual {
        Some(residual) => residual + y,
        None => y,
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::FloatDType;

    use super::*;
    use crate::ops::linear::{self, LowRank, LowRankPart};
    use crate::ops::testing::{assert_close, on_test_device, random};
    use crate::parameter::read;

    fn update(seed: u64, inputs: usize, dora: bool, weight: &Tensor<2>) -> (RowUpdate, LowRank) {
        let outputs: Arc<[Range<usize>]> = [2..7, 9..20].into();
        let (a, b) = (random([2 * 3, inputs], seed), random([16, 3], seed + 1));
        let magnitude = dora.then(|| random([16, 1], seed + 2).add_scalar(2.0));
        let parts = outputs.iter().map(|o| LowRankPart { outputs: o.clone(), dropout: None });
        let low_rank = LowRank {
            a: a.clone(),
            b: b.clone(),
            scale: 0.5,
            magnitude: magnitude.clone(),
            parts: parts.collect(),
        };
        let update = RowUpdate::new(a, b, 0.5, outputs);
        match magnitude {
            Some(magnitude) => (update.with_magnitude(magnitude, weight), low_rank),
            None => (update, low_rank),
        }
    }

    #[test]
    fn rows_of_several_adapters_in_one_product_are_what_each_is_alone() {
        let inputs = 37;
        for bf16 in [false, true] {
            let mut weight = random([23, inputs], 1);
            if bf16 {
                weight = weight.cast(FloatDType::BF16).cast(FloatDType::F32);
            }
            let (x, residual) = (random([11, inputs], 2), random([11, 23], 3));
            let (plain, plain_low_rank) = update(10, inputs, false, &weight);
            let (dora, dora_low_rank) = update(20, inputs, true, &weight);
            let groups = [(0..2, None), (2..3, Some(plain_low_rank)), (3..11, Some(dora_low_rank))];
            let expected: Vec<f32> = groups
                .into_iter()
                .flat_map(|(rows, low_rank)| {
                    let part = |x: &Tensor<2>| x.clone().slice([rows.clone(), 0..x.dims()[1]]);
                    let (x, residual) = (part(&x), part(&residual));
                    read(linear::portable(x, weight.clone().into(), Some(residual), low_rank))
                        .unwrap()
                })
                .collect();
            let stored = if bf16 { weight.cast(FloatDType::BF16) } else { weight };
            let updates = [(2..3, &plain), (3..11, &dora)];
            for rows in [Rows::Few, Rows::Many] {
                let (x, weight, residual) = (x.clone(), stored.clone(), residual.clone());
                let y = cpu::row_linear::row_linear(x, weight, Some(residual), rows, &updates);
                assert_close(&format!("{rows:?}"), &read(y).unwrap(), &expected);
            }
            if !bf16 {
                let [x, weight, residual] = [x, stored, residual].map(on_test_device);
                let y = portable(x, weight, Some(residual), &updates);
                assert_close("portable", &read(y).unwrap(), &expected);
            }
        }
    }
}
