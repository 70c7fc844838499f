//! CPU form of [`crate::ops::head`].

use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::{DType, Tensor};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::bf16::rounded_values;
use super::gemm::{Elements, MatMut, MatRef, Threads, gemm, gemm_add, product};
use super::isa::{Isa, simd_kernels};
use super::math::{exp, max, tanh};
use super::step::{contiguous, dims, from_values, matrix, node, tensor, values};
use crate::batch::Target;
use crate::ops::head::HeadLoss;

/// Logits of a usual chunk at most: 64 MiB of them.
const CHUNK_LOGITS: usize = 1 << 24;
/// Rows that a chunk has at least, as a product of few rows is slow.
const MIN_CHUNK_ROWS: usize = 64;
/// Rows of a usual chunk at most: with more, a product gets hardly faster.
pub(in crate::ops) const MAX_CHUNK_ROWS: usize = 256;
/// Exponentials that are summed in f32 before they go into the f64 sum.
const SUM_BLOCK: usize = 512;

simd_kernels! {
    /// nll of one row of logits, which become dz = weight·(softmax − e_target); and whether no
    /// logit is above the target's.
    fn cross_entropy_row(logits: &mut [f32], target: usize, weight: f32) -> (f64, bool) {
        let greatest = max(logits);
        let target_logit = logits[target];
        let mut total = 0f64;
        for block in logits.chunks_mut(SUM_BLOCK) {
            let mut lanes = [0f32; 16];
            let (parts, rest) = block.as_chunks_mut::<16>();
            for part in parts {
                for i in 0..16 {
                    part[i] = exp::<M>(part[i] - greatest);
                    lanes[i] += part[i];
                }
            }
            for i in 0..rest.len() {
                rest[i] = exp::<M>(rest[i] - greatest);
                lanes[i] += rest[i];
            }
            for lane in lanes {
                total += f64::from(lane);
            }
        }
        let factor = (f64::from(weight) / total) as f32;
        for value in logits.iter_mut() {
            *value *= factor;
        }
        logits[target] -= weight;
        let nll = f64::from(greatest) - f64::from(target_logit) + total.ln();
        (nll, target_logit >= greatest)
    }

    /// Caps a row of logits, and writes the slope of each: 1 − (ẑ / c)².
    fn soft_cap_row(cap: f32, logits: &mut [f32], slopes: &mut [f32]) {
        let slopes = &mut slopes[..logits.len()];
        for i in 0..logits.len() {
            let capped = tanh::<M>(logits[i] * (1.0 / cap));
            logits[i] = cap * capped;
            slopes[i] = 1.0 - capped * capped;
        }
    }

    /// values ← factors ∘ values.
    fn multiply(values: &mut [f32], factors: &[f32]) {
        let factors = &factors[..values.len()];
        for i in 0..values.len() {
            values[i] *= factors[i];
        }
    }

    /// values ← factor·values.
    fn scale(values: &mut [f32], factor: f32) {
        for value in values.iter_mut() {
            *value *= factor;
        }
    }
}

/// nll of one row of logits, which become dz = weight·(softmax − e_target), through the cap where
/// there is one; and whether no logit is above the target's. `slopes` is scratch.
pub(super) fn row_loss(
    isa: Isa,
    softcap: Option<f32>,
    logits: &mut [f32],
    slopes: &mut Vec<f32>,
    target: u32,
    weight: f32,
) -> (f64, bool) {
    let target = target as usize;
    let Some(cap) = softcap else {
        return cross_entropy_row(isa, logits, target, weight);
    };
    slopes.resize(logits.len(), 0.0);
    soft_cap_row(isa, cap, logits, slopes);
    let row = cross_entropy_row(isa, logits, target, weight);
    multiply(isa, logits, slopes);
    row
}

/// Rows of logits that are held at a time. Chunks are of one size, within a half of the usual one: a
/// last one of few rows would cost nearly as much as a whole one, as the head is packed for each.
fn chunk_rows(targets: usize, vocabulary: usize) -> usize {
    let usual = (CHUNK_LOGITS / vocabulary).clamp(MIN_CHUNK_ROWS, MAX_CHUNK_ROWS);
    let count = ((targets + usual / 2) / usual).max(1);
    targets.div_ceil(count).max(1)
}

/// A chunk of targets with their logits' gradients.
pub(super) struct Chunk<'a> {
    pub(super) targets: &'a [Target],
    /// nll of each, and whether no token was more likely.
    pub(super) losses: &'a [(f64, bool)],
    /// Their hidden states `[targets, width]`.
    pub(super) rows: MatRef<'a>,
    /// factor·(softmax(z) − e_y) `[targets, vocabulary]`.
    pub(super) dz: MatRef<'a>,
    /// The head `[vocabulary, width]`.
    pub(super) weight: MatRef<'a>,
}

/// Computes the logits chunk by chunk, so that never all are there; `factor` is that of a target and
/// its index.
pub(super) fn for_each_chunk(
    hidden: &FlexTensor,
    weight: &FlexTensor,
    softcap: Option<f32>,
    targets: &[Target],
    factor: impl Fn(usize, &Target) -> f32 + Sync,
    mut take: impl FnMut(Chunk<'_>),
) {
    let isa = Isa::detect();
    let ([_, width], [vocabulary, _]) = (dims(hidden), dims(weight));
    let rounds = weight.dtype() == DType::BF16;
    let weight = matrix(weight);
    let chunk_rows = chunk_rows(targets.len(), vocabulary);
    let mut logits = vec![0.0; chunk_rows.min(targets.len()) * vocabulary];
    for (index, chunk) in targets.chunks(chunk_rows).enumerate() {
        let mut rows = Vec::with_capacity(chunk.len() * width);
        for target in chunk {
            rows.extend_from_slice(&values(hidden)[target.position * width..][..width]);
        }
        let rounded = if rounds { rounded_values(&rows) } else { Vec::new() };
        let rows = if rounds { Elements::Bf16(&rounded) } else { Elements::F32(&rows) };
        let rows = MatRef::of(rows, chunk.len(), width);
        let logits = &mut logits[..chunk.len() * vocabulary];
        let z = MatMut::new(logits, chunk.len(), vocabulary);
        gemm(z, 1.0, rows, weight.t(), Threads::Shared);
        let losses: Vec<(f64, bool)> = logits
            .par_chunks_exact_mut(vocabulary)
            .zip(chunk)
            .enumerate()
            .map_init(Vec::new, |slopes, (row, (logits, target))| {
                let factor = factor(index * chunk_rows + row, target);
                row_loss(isa, softcap, logits, slopes, target.id, factor)
            })
            .collect();
        let dz = MatRef::new(logits, chunk.len(), vocabulary);
        take(Chunk { targets: chunk, losses: &losses, rows, dz, weight });
    }
}

pub(in crate::ops) fn head_with_loss(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    softcap: Option<f32>,
    targets: &[Target],
) -> HeadLoss {
    let (hidden_tracked, weight_tracked) = (hidden.is_tracked(), weight.is_tracked());
    let (hidden, weight) = (node(hidden), node(weight));
    let step = Head.prepare::<NoCheckpointing>([hidden.node(), weight.node()]).compute_bound();
    let hidden = contiguous(hidden.into_primitive());
    let weight = contiguous(weight.into_primitive());
    let tracked = (hidden_tracked, weight_tracked);
    let (sums, saved) = compute(&hidden, &weight, softcap, targets, tracked);
    let loss = from_values(vec![sums.weighted_nll as f32], [1]);
    HeadLoss {
        loss: tensor(match step.stateful() {
            OpsKind::Tracked(step) => step.finish(saved, loss),
            OpsKind::UnTracked(step) => step.finish(loss),
        }),
        weighted_nll: sums.weighted_nll,
        nll: sums.nll,
        weighted_correct: sums.correct,
    }
}

/// Σ w·nll, each nll, and Σ w of the correct.
#[derive(Default)]
struct Sums {
    weighted_nll: f64,
    nll: Vec<f64>,
    correct: f64,
}

/// The gradients for an upstream gradient of 1.
#[derive(Debug, Clone)]
struct Saved {
    d_hidden: Option<FlexTensor>,
    d_weight: Option<FlexTensor>,
}

fn compute(
    hidden: &FlexTensor,
    weight: &FlexTensor,
    softcap: Option<f32>,
    targets: &[Target],
    (hidden_tracked, weight_tracked): (bool, bool),
) -> (Sums, Saved) {
    let ([tokens, width], [vocabulary, _]) = (dims(hidden), dims(weight));
    let mut d_hidden = hidden_tracked.then(|| vec![0.0; tokens * width]);
    let mut d_weight = weight_tracked.then(|| vec![0.0; vocabulary * width]);
    let mut sums = Sums::default();
    for_each_chunk(
        hidden,
        weight,
        softcap,
        targets,
        |_, target| target.weight,
        |chunk| {
            for (target, &(nll, correct)) in chunk.targets.iter().zip(chunk.losses) {
                sums.weighted_nll += f64::from(target.weight) * nll;
                sums.nll.push(nll);
                sums.correct += if correct { f64::from(target.weight) } else { 0.0 };
            }
            if let Some(d_hidden) = &mut d_hidden {
                let dh = product(1.0, chunk.dz, chunk.weight, Threads::Shared);
                // Added, as several targets may follow one position.
                for (target, dh) in chunk.targets.iter().zip(dh.chunks_exact(width)) {
                    let sum = &mut d_hidden[target.position * width..][..width];
                    sum.iter_mut().zip(dh).for_each(|(sum, value)| *sum += value);
                }
            }
            if let Some(d_weight) = &mut d_weight {
                let dw = MatMut::new(d_weight, vocabulary, width);
                gemm_add(dw, 1.0, chunk.dz.t(), chunk.rows, Threads::Shared);
            }
        },
    );
    let saved = Saved {
        d_hidden: d_hidden.map(|values| from_values(values, [tokens, width])),
        d_weight: d_weight.map(|values| from_values(values, [vocabulary, width])),
    };
    (sums, saved)
}

#[derive(Debug)]
struct Head;

impl Backward<Flex, 2> for Head {
    type State = Saved;

    fn backward(
        self,
        ops: Ops<Saved, 2>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let upstream = contiguous(gradients.consume::<Flex>(&ops.node));
        let upstream = values(&upstream)[0];
        let [hidden_node, weight_node] = ops.parents;
        let Saved { d_hidden, d_weight } = ops.state;
        for (parent, gradient) in [(hidden_node, d_hidden), (weight_node, d_weight)] {
            if let (Some(parent), Some(mut gradient)) = (parent, gradient) {
                let isa = Isa::detect();
                gradient
                    .storage_mut::<f32>()
                    .par_chunks_mut(1 << 16)
                    .for_each(|values| scale(isa, values, upstream));
                gradients.register::<Flex>(parent.id, gradient);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_gives_the_values_of_f64() {
        let logits: Vec<f32> = (0..1301).map(|i| (i as f32 * 0.37).sin() * 20.0).collect();
        let (target, weight) = (700, 0.1);
        let total: f64 = logits.iter().map(|&z| f64::from(z).exp()).sum();
        for isa in Isa::available() {
            let mut dz = logits.clone();
            let (nll, correct) = cross_entropy_row(isa, &mut dz, target, weight);
            assert!((nll - (total.ln() - f64::from(logits[target]))).abs() < 1e-6, "{isa:?}");
            assert!(!correct);
            for (i, (dz, &z)) in dz.iter().zip(&logits).enumerate() {
                let one_hot = if i == target { 1.0 } else { 0.0 };
                let expected = f64::from(weight) * (f64::from(z).exp() / total - one_hot);
                assert!((f64::from(*dz) - expected).abs() < 1e-7, "{isa:?} dz[{i}]");
            }
        }
    }

    #[test]
    fn capped_logits_and_their_slopes_have_the_values_of_f64_on_every_path() {
        let logits: Vec<f32> = (0..301).map(|i| (i as f32 * 0.37).sin() * 90.0).collect();
        for isa in Isa::available() {
            let (mut capped, mut slopes) = (logits.clone(), vec![0.0; logits.len()]);
            soft_cap_row(isa, 30.0, &mut capped, &mut slopes);
            for i in 0..logits.len() {
                let exact = (f64::from(logits[i]) / 30.0).tanh();
                assert!((f64::from(capped[i]) - 30.0 * exact).abs() < 1e-5, "{isa:?}");
                assert!((f64::from(slopes[i]) - (1.0 - exact * exact)).abs() < 1e-6, "{isa:?}");
            }
            multiply(isa, &mut capped, &slopes);
            assert!((capped[5] - 30.0 * (logits[5] / 30.0).tanh() * slopes[5]).abs() < 1e-4);
        }
    }

    #[test]
    fn chunks_are_even_and_none_is_small_beside_others() {
        let rows = |targets| chunk_rows(targets, 49_152);
        assert_eq!([1, 255, 256, 269, 383].map(rows), [1, 255, 256, 269, 383]);
        assert_eq!([384, 568, 639, 640, 1024].map(rows), [192, 284, 320, 214, 256]);
        assert_eq!([64, 95, 96].map(|targets| chunk_rows(targets, 1 << 20)), [64, 95, 48]);
        assert_eq!(rows(0), 1);
    }

    #[test]
    fn greatest_logit_is_correct_also_among_equals() {
        for isa in Isa::available() {
            assert!(cross_entropy_row(isa, &mut [1.0, 3.0, 3.0], 1, 1.0).1);
            assert!(cross_entropy_row(isa, &mut [1.0, 3.0, 3.0], 2, 1.0).1);
            assert!(!cross_entropy_row(isa, &mut [1.0, 3.0, 3.0], 0, 1.0).1);
        }
    }
}
