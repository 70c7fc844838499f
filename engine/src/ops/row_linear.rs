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

use super::cpu::gemm::Panels;
use super::linear::adapted_row_lengths;
use super::product::product;
use super::{cpu, on_cpu};

/// A matrix that answers are computed with.
#[derive(Debug, Clone)]
pub(crate) enum RowWeight {
    /// A tensor, as what trains has it.
    Dense(Box<Tensor<2>>),
    /// As the CPU's products read it, for what only answers.
    Panels(Arc<Panels>),
}

impl From<Tensor<2>> for RowWeight {
    fn from(weight: Tensor<2>) -> Self {
        Self::Dense(Box::new(weight))
    }
}

impl RowWeight {
    /// A weight `[out, in]` that only answers from now on, kept for that on its device.
    pub(crate) fn kept(weight: Tensor<2>) -> Self {
        if on_cpu(&weight) {
            Self::Panels(Arc::new(cpu::row_linear::panels(weight)))
        } else {
            weight.into()
        }
    }

    /// Rows and columns.
    pub(crate) fn dims(&self) -> [usize; 2] {
        match self {
            Self::Dense(weight) => weight.dims(),
            Self::Panels(panels) => panels.dims(),
        }
    }

    /// The matrix itself.
    pub(crate) fn dense(&self) -> Tensor<2> {
        match self {
            Self::Dense(weight) => weight.as_ref().clone(),
            Self::Panels(panels) => cpu::row_linear::dense(panels),
        }
    }
}

/// An adapter of one projection, ready to be used on any rows.
#[derive(Debug, Clone)]
pub(crate) struct RowUpdate {
    /// The Aᵢ one below the other, `[parts · r, in]`.
    pub(super) a: RowWeight,
    pub(super) parts: Vec<RowUpdatePart>,
    /// r.
    pub(super) rank: usize,
    /// s.
    pub(super) scale: f32,
    /// DoRA's g, `[1, Σ |Oᵢ|]`.
    pub(super) gain: Option<Tensor<2>>,
}

/// What it adds to some outputs.
#[derive(Debug, Clone)]
pub(crate) struct RowUpdatePart {
    /// Oᵢ.
    pub(super) outputs: Range<usize>,
    /// Bᵢ `[|Oᵢ|, r]`.
    pub(super) b: RowWeight,
}

impl RowUpdate {
    /// One of the Aᵢ `[parts · r, in]` and the Bᵢ `[Σ |Oᵢ|, r]`, for the Oᵢ. With DoRA there are its
    /// magnitudes m `[Σ |Oᵢ|, 1]`, and the projection's weight, on which g depends.
    pub(crate) fn new(
        a: Tensor<2>,
        b: Tensor<2>,
        scale: f32,
        outputs: impl IntoIterator<Item = Range<usize>>,
        dora: Option<[Tensor<2>; 2]>,
    ) -> Self {
        let ([_, inputs], [_, rank]) = (a.dims(), b.dims());
        let (mut parts, mut lengths, mut end) = (Vec::new(), Vec::new(), 0);
        for (i, outputs) in outputs.into_iter().enumerate() {
            let start = end;
            end += outputs.len();
            let b = b.clone().slice([start..end, 0..rank]);
            if let Some([_, weight]) = &dora {
                let weight = weight.clone().slice([outputs.clone(), 0..inputs]);
                let a = a.clone().slice([i * rank..(i + 1) * rank, 0..inputs]);
                lengths.push(adapted_row_lengths(weight, a, b.clone(), scale));
            }
            parts.push(RowUpdatePart { outputs, b: RowWeight::kept(b) });
        }
        let gain = dora.map(|[magnitude, _]| (magnitude / Tensor::cat(lengths, 0)).transpose());
        Self { a: RowWeight::kept(a), parts, rank, scale, gain }
    }

    /// The columns of `gain` that belong to each part.
    pub(super) fn columns(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.parts.iter().scan(0, |end, part| {
            let start = *end;
            *end += part.outputs.len();
            Some(start..*end)
        })
    }
}

/// `x` `[n, in]` to `[n, out]`; the ranges of `updates` follow one another and do not overlap.
pub(crate) fn row_linear(
    x: Tensor<2>,
    weight: &RowWeight,
    residual: Option<Tensor<2>>,
    updates: &[(Range<usize>, &RowUpdate)],
) -> Tensor<2> {
    if on_cpu(&x) {
        cpu::row_linear::row_linear(x, weight, residual, updates)
    } else {
        portable(x, weight.dense(), residual, updates)
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
        let (x, a) = (x.clone().slice([rows.clone(), 0..inputs]), update.a.dense());
        for (i, (part, columns)) in update.parts.iter().zip(update.columns()).enumerate() {
            let a = a.clone().slice([i * update.rank..(i + 1) * update.rank, 0..inputs]);
            let low_rank = product(product(x.clone(), a.transpose()), part.b.dense().transpose());
            let place = [rows.clone(), part.outputs.clone()];
            let mut sum = y.clone().slice(place.clone()) + low_rank.mul_scalar(update.scale);
            if let Some(gain) = &update.gain {
                sum = sum * gain.clone().slice([0..1, columns]);
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
    use crate::ops::testing::{Place, assert_close, on_flex, on_test_device, random};
    use crate::parameter::read;

    fn update(
        place: Place,
        seed: u64,
        inputs: usize,
        dora: bool,
        weight: &Tensor<2>,
    ) -> (RowUpdate, LowRank) {
        let outputs = [2..7, 9..20];
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
        let dora = magnitude.map(|magnitude| [magnitude, weight.clone()].map(place));
        (RowUpdate::new(place(a), place(b), 0.5, outputs, dora), low_rank)
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
            let (plain, plain_low_rank) = update(on_flex, 10, inputs, false, &weight);
            let (dora, dora_low_rank) = update(on_flex, 20, inputs, true, &weight);
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
            let kept = RowWeight::kept(stored.clone());
            for (name, weight) in [("dense", stored.clone().into()), ("panels", kept)] {
                let (x, residual) = (x.clone(), residual.clone());
                let y = cpu::row_linear::row_linear(x, &weight, Some(residual), &updates);
                assert_close(name, &read(y).unwrap(), &expected);
            }
            if !bf16 {
                let (plain, _) = update(on_test_device, 10, inputs, false, &stored);
                let (dora, _) = update(on_test_device, 20, inputs, true, &stored);
                let updates = [(2..3, &plain), (3..11, &dora)];
                let [x, weight, residual] = [x, stored, residual].map(on_test_device);
                let y = portable(x, weight, Some(residual), &updates);
                assert_close("portable", &read(y).unwrap(), &expected);
            }
        }
    }
}
