//! Linear projection with an optional residual and optional LoRA (Hu et al. 2021) or DoRA (Liu et
//! al. 2024).
//!
//! Weights have Hugging Face's layout `[out, in]`, A `[r, in]` and B `[out, r]`. Several
//! projections of one input are one matrix, their rows one below the other (q, k, v; gate, up). A
//! LoRA part i belongs to the outputs `Oᵢ`, and with `dropᵢ` its input's dropout mask:
//!
//! ```text
//! y        = residual + x·Wᵀ,  y[:, Oᵢ] += s·(dropᵢ∘x)·Aᵢᵀ·Bᵢᵀ
//! zᵢ       = (dropᵢ∘x)·Aᵢᵀ
//! dBᵢ      = s·dy[:, Oᵢ]ᵀ·zᵢ
//! dzᵢ      = s·dy[:, Oᵢ]·Bᵢ
//! dAᵢ      = dzᵢᵀ·(dropᵢ∘x)
//! dx       = dy·W + Σᵢ dropᵢ∘(dzᵢ·Aᵢ)
//! dW       = dyᵀ·x,  dresidual = dy
//! ```
//!
//! W may be kept in quantised blocks; it is then frozen, and dW is not asked for.
//!
//! B·A is never formed: with r far below the width, the two thin products cost next to nothing.
//!
//! DoRA gives each adapted output a magnitude m. With n the lengths of the rows of Wᵢ + s·Bᵢ·Aᵢ,
//! which take no gradient, and g = m / n, the form and the place of dropout are PEFT's:
//!
//! ```text
//! uᵢ       = (dropᵢ∘x)·Wᵢᵀ + s·zᵢ·Bᵢᵀ
//! y[:, Oᵢ] = residual + x·Wᵢᵀ − (dropᵢ∘x)·Wᵢᵀ + g∘uᵢ      without dropout: residual + g∘uᵢ
//! dm       = Σ over tokens of dy∘u / n
//! dB, dz   as above with g∘dy in place of dy
//! dx       = dy·W + Σᵢ dropᵢ∘(((g − 1)∘dy[:, Oᵢ])·Wᵢ + dzᵢ·Aᵢ)
//! dW       = dyᵀ·x + ((g − 1)∘dy[:, Oᵢ])ᵀ·(dropᵢ∘x)
//! ```

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{FloatDType, Tensor, TensorData};

use super::bf16::{matmul, to_bf16};
use super::cpu::again::Again;
use super::dropout::Dropout;
#[cfg(feature = "gpu")]
use super::gpu;
use super::product::product;
use super::quantized::QuantizedMatrix;
use super::{cpu, on_cpu};

/// x, and how the backward pass computes its values again, where that needs only what is kept
/// anyway: then they are not kept.
#[derive(Debug, Clone)]
pub(crate) struct Input {
    pub(crate) x: Tensor<2>,
    pub(super) again: Option<Again>,
}

impl From<Tensor<2>> for Input {
    fn from(x: Tensor<2>) -> Self {
        Self { x, again: None }
    }
}

/// W.
#[derive(Debug, Clone)]
pub(crate) enum Weight {
    Dense(Box<Tensor<2>>),
    Quantized {
        matrix: Arc<QuantizedMatrix>,
        /// Whether what it decodes to is multiplied as bf16.
        bf16: bool,
    },
}

impl From<Tensor<2>> for Weight {
    fn from(weight: Tensor<2>) -> Self {
        Self::Dense(Box::new(weight))
    }
}

/// The low-rank branch beside a projection.
#[derive(Debug, Clone)]
pub(crate) struct LowRank {
    /// The Aᵢ one below the other, `[parts · r, in]`.
    pub(crate) a: Tensor<2>,
    /// The Bᵢ one below the other, `[Σ |Oᵢ|, r]`.
    pub(crate) b: Tensor<2>,
    /// s: alpha / r, or alpha / √r.
    pub(crate) scale: f32,
    /// DoRA's m, row below row as in `b`, `[Σ |Oᵢ|, 1]`.
    pub(crate) magnitude: Option<Tensor<2>>,
    /// In the order of the rows of `a` and `b`.
    pub(crate) parts: Arc<[LowRankPart]>,
}

/// One adapted projection.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LowRankPart {
    /// Oᵢ: its columns of y.
    pub(crate) outputs: Range<usize>,
    /// Dropout of its input, in training.
    pub(crate) dropout: Option<Dropout>,
}

impl LowRank {
    /// Rank and, for each part, its rows of B.
    pub(super) fn b_rows(parts: &[LowRankPart]) -> impl Iterator<Item = Range<usize>> + '_ {
        parts.iter().scan(0, |end, part| {
            let start = *end;
            *end += part.outputs.len();
            Some(start..*end)
        })
    }
}

/// `x` `[tokens, in]` to `[tokens, out]`; `residual` has the shape of the output.
pub(crate) fn linear(
    input: impl Into<Input>,
    weight: impl Into<Weight>,
    residual: Option<Tensor<2>>,
    low_rank: Option<LowRank>,
) -> Tensor<2> {
    let (input, weight) = (input.into(), weight.into());
    if on_cpu(&input.x) {
        cpu::linear::linear(input, weight, residual, low_rank)
    } else {
        elsewhere(input.x, weight, residual, low_rank)
    }
}

/// The form of a device that is not the CPU.
pub(super) fn elsewhere(
    x: Tensor<2>,
    weight: Weight,
    residual: Option<Tensor<2>>,
    low_rank: Option<LowRank>,
) -> Tensor<2> {
    #[cfg(feature = "gpu")]
    if super::on_gpu(&x) {
        let has_magnitudes = low_rank.as_ref().is_some_and(|low_rank| low_rank.magnitude.is_some());
        if has_magnitudes {
            // The portable form reads f32.
            return portable(x.cast(FloatDType::F32), weight, residual, low_rank);
        }
        return gpu::linear::linear(x, weight, residual, low_rank);
    }
    portable(x, weight, residual, low_rank)
}

pub(super) fn portable(
    x: Tensor<2>,
    weight: Weight,
    residual: Option<Tensor<2>>,
    low_rank: Option<LowRank>,
) -> Tensor<2> {
    let weight = match weight {
        Weight::Dense(weight) => *weight,
        Weight::Quantized { matrix, bf16 } => {
            let values = TensorData::new(matrix.to_dense(), matrix.dims());
            let weight = Tensor::from_data(values, &x.device());
            if bf16 { to_bf16(weight) } else { weight }
        }
    };
    let plain = matmul(x.clone(), weight.clone().transpose());
    let has_magnitudes = low_rank.as_ref().is_some_and(|low_rank| low_rank.magnitude.is_some());
    let base = has_magnitudes.then(|| plain.clone());
    let mut y = match residual {
        Some(residual) => residual + plain,
        None => plain,
    };
    let Some(LowRank { a, b, scale, magnitude, parts }) = low_rank else { return y };
    let [tokens, input] = x.dims();
    let rank = b.dims()[1];
    for (i, (part, b_rows)) in parts.iter().zip(LowRank::b_rows(&parts)).enumerate() {
        let a = a.clone().slice([i * rank..(i + 1) * rank, 0..input]);
        let b = b.clone().slice([b_rows.clone(), 0..rank]);
        let dropped = match part.dropout {
            Some(dropout) => x.clone() * mask(dropout, &x),
            None => x.clone(),
        };
        let columns = [0..tokens, part.outputs.clone()];
        let z = product(dropped.clone(), a.clone().transpose());
        let low_rank = product(z, b.clone().transpose());
        let mut update = low_rank.mul_scalar(scale);
        if let (Some(magnitude), Some(base)) = (&magnitude, &base) {
            let weight = weight.clone().slice([part.outputs.clone(), 0..input]);
            let lengths = adapted_row_lengths(weight.clone(), a, b, scale);
            let gain = (magnitude.clone().slice([b_rows, 0..1]) / lengths).transpose();
            let base = match part.dropout {
                Some(_) => matmul(dropped, weight.transpose()),
                None => base.clone().slice(columns.clone()),
            };
            update = base * gain.clone().sub_scalar(1.0) + update * gain;
        }
        let sum = y.clone().slice(columns.clone()) + update;
        y = y.slice_assign(columns, sum);
    }
    y
}

/// Lengths of the rows of W + s·B·A, `[out, 1]`, which take no gradient.
pub(super) fn adapted_row_lengths(
    weight: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f32,
) -> Tensor<2> {
    let sum =
        weight.detach().cast(FloatDType::F32) + product(b.detach(), a.detach()).mul_scalar(scale);
    sum.square().sum_dim(1).sqrt()
}

/// The dropout factors of every element of `x`, made on the host so that all devices agree.
fn mask(dropout: Dropout, x: &Tensor<2>) -> Tensor<2> {
    let [tokens, width] = x.dims();
    let factors: Vec<f32> = (0..tokens * width).map(|index| dropout.factor(index)).collect();
    Tensor::from_data(TensorData::new(factors, [tokens, width]), &x.device())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gated_activation::gated_activation;
    use crate::ops::quantized::BlockFormat;
    use crate::ops::rms_norm::{Norm, rms_norm};
    use crate::ops::testing::{assert_gradients_equal, random};
    use crate::parameter::read;

    fn on_the_cpu(
        x: Tensor<2>,
        weight: Weight,
        residual: Option<Tensor<2>>,
        low_rank: Option<LowRank>,
    ) -> Tensor<2> {
        cpu::linear::linear(x.into(), weight, residual, low_rank)
    }

    /// Compares both forms: inputs are x, W, residual, and A and B when there are `parts`.
    fn assert_forms_equal(
        [tokens, input, output]: [usize; 3],
        rank: usize,
        parts: &[LowRankPart],
        with_residual: bool,
    ) {
        assert_adapted_forms_equal([tokens, input, output], rank, parts, with_residual, false);
    }

    /// The same, with DoRA's magnitudes as one more input where `dora`.
    fn assert_adapted_forms_equal(
        [tokens, input, output]: [usize; 3],
        rank: usize,
        parts: &[LowRankPart],
        with_residual: bool,
        dora: bool,
    ) {
        let adapted = parts.iter().map(|part| part.outputs.len()).sum();
        let mut inputs = vec![random([tokens, input], 1), random([output, input], 2)];
        if with_residual {
            inputs.push(random([tokens, output], 3));
        }
        if !parts.is_empty() {
            inputs.push(random([parts.len() * rank, input], 4));
            inputs.push(random([adapted, rank], 5));
        }
        if dora {
            inputs.push(random([adapted, 1], 6).add_scalar(2.0));
        }
        let call = |form: fn(_, _, _, _) -> Tensor<2>, inputs: &[Tensor<2>]| {
            let mut rest = inputs[2..].iter().cloned();
            let residual = with_residual.then(|| rest.next().unwrap());
            let low_rank = rest.next().map(|a| LowRank {
                a,
                b: rest.next().unwrap(),
                scale: 0.7,
                magnitude: rest.next(),
                parts: parts.into(),
            });
            form(inputs[0].clone(), Weight::from(inputs[1].clone()), residual, low_rank)
        };
        assert_gradients_equal(
            &inputs,
            |inputs| call(on_the_cpu, inputs),
            |inputs| call(elsewhere, inputs),
        );
    }

    fn part(outputs: Range<usize>) -> LowRankPart {
        LowRankPart { outputs, dropout: None }
    }

    /// A feed-forward block without its first projection, from x to gradients, on the CPU.
    fn block(
        inputs: &[Tensor<2>],
        input: impl Fn(Tensor<2>, &Tensor<2>) -> Input,
    ) -> Vec<Vec<f32>> {
        let inputs: Vec<Tensor<2>> =
            inputs.iter().map(|x| x.clone().autodiff().require_grad()).collect();
        let [x, norm_weight, weight, a, b] = &inputs[..] else { unreachable!() };
        let low_rank = LowRank {
            a: a.clone(),
            b: b.clone(),
            scale: 0.7,
            magnitude: None,
            parts: [part(0..b.dims()[0])].into(),
        };
        let y = linear(input(x.clone(), norm_weight), weight.clone(), None, Some(low_rank));
        let upstream = random(y.dims(), 99);
        let gradients = (y.clone() * upstream.autodiff()).sum().backward();
        let gradients = inputs.iter().filter_map(|input| input.grad(&gradients));
        std::iter::once(y.inner()).chain(gradients).map(|x| read(x).unwrap()).collect()
    }

    #[test]
    fn inputs_that_are_computed_again_give_the_bits_of_those_that_are_kept() {
        let norm = Norm { epsilon: 1e-5, unit_offset: true };
        let of_norm = |x: Tensor<2>, weight: &Tensor<2>| rms_norm(x, weight.clone(), norm, false);
        let of_activation = |x: Tensor<2>, _: &Tensor<2>| {
            gated_activation(x, crate::models::config::Activation::Silu, false)
        };
        // 150 tokens: more than one block of rows that threads share.
        let tokens = 150;
        let shapes = |width: usize, inputs: usize| {
            let shapes = [[tokens, width], [1, width], [20, inputs], [3, inputs], [20, 3]];
            (0..).zip(shapes).map(|(seed, shape)| random(shape, seed)).collect::<Vec<_>>()
        };
        let (normed, gated) = (shapes(33, 33), shapes(34, 17));
        type Form<'a> = &'a dyn Fn(Tensor<2>, &Tensor<2>) -> Input;
        for (inputs, form) in [(normed, &of_norm as Form<'_>), (gated, &of_activation)] {
            assert!(form(inputs[0].clone().autodiff().require_grad(), &inputs[1]).again.is_some());
            let kept = block(&inputs, |x, weight| form(x, weight).x.into());
            assert_eq!(block(&inputs, form), kept);
        }
    }

    #[test]
    fn plain_projection_equals_the_portable_form() {
        assert_forms_equal([7, 5, 9], 0, &[], false);
        assert_forms_equal([1, 5, 9], 0, &[], true);
    }

    #[test]
    fn adapters_on_all_of_three_concatenated_projections() {
        assert_forms_equal([7, 12, 21], 4, &[part(0..9), part(9..15), part(15..21)], false);
    }

    #[test]
    fn adapters_of_a_high_rank_on_two_projections() {
        assert_forms_equal([5, 12, 21], 70, &[part(0..9), part(9..21)], true);
    }

    #[test]
    fn adapters_on_the_outer_two_of_three_projections_with_residual() {
        assert_forms_equal([6, 10, 20], 3, &[part(0..9), part(15..20)], true);
    }

    #[test]
    fn rank_above_the_width_is_computed_too() {
        assert_forms_equal([4, 3, 5], 8, &[part(0..5)], false);
    }

    #[test]
    fn dropout_masks_differ_by_part_and_return_in_the_backward_pass() {
        let parts = [
            LowRankPart { outputs: 0..6, dropout: Some(Dropout::new(0.3, 11)) },
            LowRankPart { outputs: 6..10, dropout: Some(Dropout::new(0.3, 12)) },
        ];
        assert_forms_equal([9, 8, 10], 2, &parts, true);
    }

    #[test]
    fn magnitudes_of_the_outer_two_of_three_projections() {
        for with_residual in [false, true] {
            let parts = [part(0..9), part(15..20)];
            assert_adapted_forms_equal([6, 10, 20], 3, &parts, with_residual, true);
        }
    }

    #[test]
    fn magnitudes_of_more_rows_than_one_task_takes() {
        assert_adapted_forms_equal([5, 130, 301], 4, &[part(0..301)], true, true);
    }

    #[test]
    fn magnitudes_under_dropout() {
        let parts = [
            LowRankPart { outputs: 0..6, dropout: Some(Dropout::new(0.3, 11)) },
            LowRankPart { outputs: 8..10, dropout: Some(Dropout::new(0.3, 12)) },
        ];
        for with_residual in [false, true] {
            assert_adapted_forms_equal([9, 8, 10], 2, &parts, with_residual, true);
        }
    }

    /// Compares both forms over a quantised weight: inputs are x, residual, A and B.
    fn assert_quantised_forms_equal(
        format: BlockFormat,
        [tokens, input, output]: [usize; 3],
        parts: &[LowRankPart],
    ) {
        let rank = 3;
        let adapted = parts.iter().map(|part| part.outputs.len()).sum();
        let mut matrix = QuantizedMatrix::new(format, input);
        matrix.push_rows(&read(random([output, input], 2)).unwrap());
        let matrix = Arc::new(matrix);
        let inputs = [
            random([tokens, input], 1),
            random([tokens, output], 3),
            random([parts.len() * rank, input], 4),
            random([adapted, rank], 5),
        ];
        let call = |form: fn(_, _, _, _) -> Tensor<2>, inputs: &[Tensor<2>]| {
            let low_rank = LowRank {
                a: inputs[2].clone(),
                b: inputs[3].clone(),
                scale: 0.7,
                magnitude: None,
                parts: parts.into(),
            };
            let weight = Weight::Quantized { matrix: Arc::clone(&matrix), bf16: false };
            form(inputs[0].clone(), weight, Some(inputs[1].clone()), Some(low_rank))
        };
        assert_gradients_equal(
            &inputs,
            |inputs| call(on_the_cpu, inputs),
            |inputs| call(elsewhere, inputs),
        );
    }

    #[test]
    fn quantised_weights_equal_the_portable_form() {
        let dropped = [
            LowRankPart { outputs: 0..6, dropout: Some(Dropout::new(0.3, 11)) },
            LowRankPart { outputs: 8..10, dropout: Some(Dropout::new(0.3, 12)) },
        ];
        for format in [BlockFormat::Int8, BlockFormat::Nf4] {
            assert_quantised_forms_equal(format, [9, 70, 10], &[part(0..6), part(8..10)]);
            assert_quantised_forms_equal(format, [9, 70, 10], &dropped);
        }
        // Several blocks of k and panels of every size, and a width that is odd.
        assert_quantised_forms_equal(BlockFormat::Nf4, [40, 1601, 701], &[part(0..300)]);
        assert_quantised_forms_equal(BlockFormat::Int8, [1, 1600, 700], &[part(500..700)]);
    }
}
