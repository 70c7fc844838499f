//! Output head and weighted cross entropy in one operation.
//!
//! For the hidden state h of each target row, its weight w and its target id y:
//!
//! ```text
//! z    = W·h,  ẑ = c·tanh(z / c), or z where there is no softcap c
//! nll  = log Σᵥ exp ẑᵥ − ẑ_y,  loss = Σ w·nll
//! dẑ   = w·(softmax(ẑ) − e_y),  dz = dẑ ∘ (1 − (ẑ / c)²),  dh = Wᵀ·dz,  dW = Σ dz·hᵀ
//! ```
//!
//! all times the upstream gradient. Only rows with a target of nonzero weight are computed. The
//! CPU form goes through them in chunks, and takes a chunk's gradients while its logits are there,
//! so that the `[tokens, vocabulary]` logits are never stored.

use burn::tensor::{Tensor, TensorData};

#[cfg(feature = "gpu")]
use super::gpu;
use super::token_nll::{self, TokenNll};
use super::{cpu, on_cpu};
use crate::batch::Target;
use crate::error::EngineError;

/// The loss as a node of the graph, and as exact sums.
#[derive(Debug)]
pub(crate) struct HeadLoss {
    /// Σ w·nll, for the backward pass.
    pub(crate) loss: Tensor<1>,
    /// Σ w·nll, summed in f64.
    pub(crate) weighted_nll: f64,
    /// nll of each target.
    pub(crate) nll: Vec<f64>,
    /// Σ w over the targets than which no token was more likely.
    pub(crate) weighted_correct: f64,
}

/// The loss of `hidden` `[tokens, width]` under the head `weight` `[vocabulary, width]`, whose
/// logits are capped by `softcap`.
///
/// # Errors
/// [`EngineError::Device`] when reading the sums fails.
pub(crate) fn head_with_loss(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    softcap: Option<f32>,
    targets: &[Target],
) -> Result<HeadLoss, EngineError> {
    if on_cpu(&hidden) {
        Ok(cpu::head::head_with_loss(hidden, weight, softcap, targets))
    } else {
        elsewhere(hidden, weight, softcap, targets)
    }
}

/// c·tanh(z / c).
pub(crate) fn soft_capped(logits: Tensor<2>, softcap: Option<f32>) -> Tensor<2> {
    match softcap {
        Some(cap) => logits.mul_scalar(1.0 / cap).tanh().mul_scalar(cap),
        None => logits,
    }
}

/// The form of a device that is not the CPU.
fn elsewhere(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    softcap: Option<f32>,
    targets: &[Target],
) -> Result<HeadLoss, EngineError> {
    #[cfg(feature = "gpu")]
    if super::on_gpu(&hidden) {
        return gpu::head::head_with_loss(hidden, weight, softcap, targets);
    }
    portable(hidden, weight, softcap, targets)
}

/// Σ w·nll, and Σ w over the correct ones.
pub(super) fn weighted_sums(targets: &[Target], nll: &[f64], correct: &[bool]) -> [f64; 2] {
    let weighted = |values: &mut dyn Iterator<Item = f64>| -> f64 {
        values.zip(targets).map(|(x, target)| x * f64::from(target.weight)).sum()
    };
    [weighted(&mut nll.iter().copied()), weighted(&mut correct.iter().copied().map(f64::from))]
}

pub(super) fn portable(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    softcap: Option<f32>,
    targets: &[Target],
) -> Result<HeadLoss, EngineError> {
    let TokenNll { nll, values, correct } = token_nll::portable(hidden, weight, softcap, targets)?;
    let [weighted_nll, weighted_correct] = weighted_sums(targets, &values, &correct);
    let weights: Vec<f32> = targets.iter().map(|target| target.weight).collect();
    let weights = TensorData::new(weights, [targets.len()]);
    let weights: Tensor<1> = Tensor::from_data(weights, &nll.device());
    let loss = (nll * weights).sum();
    Ok(HeadLoss { loss, weighted_nll, nll: values, weighted_correct })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Place, assert_close, on_flex, on_test_device, random};
    use crate::parameter::read;

    /// Weights 0.1, 1 and, by the targets that are missing, 0.
    const TARGETS: [Target; 3] = [
        Target { position: 0, id: 36, weight: 0.1 },
        Target { position: 2, id: 0, weight: 1.0 },
        Target { position: 3, id: 11, weight: 1.0 },
    ];

    type Form = fn(Tensor<2>, Tensor<2>, Option<f32>, &[Target]) -> Result<HeadLoss, EngineError>;

    fn cpu_form(
        hidden: Tensor<2>,
        weight: Tensor<2>,
        softcap: Option<f32>,
        targets: &[Target],
    ) -> Result<HeadLoss, EngineError> {
        Ok(cpu::head::head_with_loss(hidden, weight, softcap, targets))
    }

    /// Loss sums and the gradients of −2.5·loss.
    fn run(
        form: Form,
        place: Place,
        softcap: Option<f32>,
        targets: &[Target],
        tokens: usize,
    ) -> (f64, f64, Vec<f32>, Vec<f32>) {
        let hidden = place(random([tokens, 9], 1).mul_scalar(2.0)).autodiff().require_grad();
        let weight = place(random([37, 9], 2).mul_scalar(2.0)).autodiff().require_grad();
        let head = form(hidden.clone(), weight.clone(), softcap, targets).unwrap();
        let value = read(head.loss.clone()).unwrap()[0];
        assert!((f64::from(value) - head.weighted_nll).abs() < 1e-4 * head.weighted_nll.abs());
        let gradients = head.loss.mul_scalar(-2.5).backward();
        (
            head.weighted_nll,
            head.weighted_correct,
            read(hidden.grad(&gradients).unwrap()).unwrap(),
            read(weight.grad(&gradients).unwrap()).unwrap(),
        )
    }

    fn assert_forms_equal(targets: &[Target], tokens: usize) {
        // Logits of up to about 10: a cap of 3 is far into the flat of tanh.
        for softcap in [None, Some(3.0)] {
            let (nll, correct, dh, dw) = run(cpu_form, on_flex, softcap, targets, tokens);
            let (expected_nll, expected_correct, expected_dh, expected_dw) =
                run(elsewhere, on_test_device, softcap, targets, tokens);
            assert!((nll - expected_nll).abs() < 1e-5 * expected_nll, "{nll} {expected_nll}");
            assert_eq!(correct, expected_correct);
            assert_close("dh", &dh, &expected_dh);
            assert_close("dw", &dw, &expected_dw);
        }
    }

    #[test]
    fn weighted_rows_of_an_odd_vocabulary_equal_the_portable_form() {
        assert_forms_equal(&TARGETS, 5);
    }

    #[test]
    fn targets_of_several_chunks_equal_the_portable_form() {
        let tokens = 5 * cpu::head::MAX_CHUNK_ROWS / 2;
        let targets: Vec<Target> = (0..tokens)
            .map(|position| Target {
                position,
                id: (position * 5 % 37) as u32,
                weight: [0.1, 1.0][position % 2],
            })
            .collect();
        assert_forms_equal(&targets, tokens);
    }

    #[test]
    fn several_targets_after_one_position_add_their_gradients() {
        let mut targets = TARGETS;
        targets[1].position = 0;
        assert_forms_equal(&targets, 5);
    }

    #[test]
    fn one_form_alone_requires_its_gradient() {
        let (_, _, dh, dw) = run(cpu_form, on_flex, None, &TARGETS, 5);
        let hidden = random([5, 9], 1).mul_scalar(2.0).autodiff();
        let weight = random([37, 9], 2).mul_scalar(2.0).autodiff();
        let only_hidden = hidden.clone().require_grad();
        let loss =
            cpu::head::head_with_loss(only_hidden.clone(), weight.clone(), None, &TARGETS).loss;
        let gradients = loss.mul_scalar(-2.5).backward();
        assert_eq!(read(only_hidden.grad(&gradients).unwrap()).unwrap(), dh);
        let only_weight = weight.require_grad();
        let loss = cpu::head::head_with_loss(hidden, only_weight.clone(), None, &TARGETS).loss;
        let gradients = loss.mul_scalar(-2.5).backward();
        assert_eq!(read(only_weight.grad(&gradients).unwrap()).unwrap(), dw);
    }

    #[test]
    fn gradients_equal_central_differences_with_weights_0_and_a_tenth_and_1() {
        let (tokens, width, vocabulary) = (5, 9, 37);
        let hidden = read(random([tokens, width], 1).mul_scalar(2.0)).unwrap();
        let weight = read(random([vocabulary, width], 2).mul_scalar(2.0)).unwrap();
        let (_, _, dh, dw) = run(cpu_form, on_flex, None, &TARGETS, tokens);
        // The loss by its definition, in f64.
        let loss = |hidden: &[f64], weight: &[f64]| -> f64 {
            let logit = |row: usize, id: usize| -> f64 {
                (0..width).map(|i| hidden[row * width + i] * weight[id * width + i]).sum()
            };
            TARGETS
                .iter()
                .map(|target| {
                    let total: f64 =
                        (0..vocabulary).map(|id| logit(target.position, id).exp()).sum();
                    let nll = total.ln() - logit(target.position, target.id as usize);
                    f64::from(target.weight) * nll
                })
                .sum()
        };
        let wide = |values: &[f32]| -> Vec<f64> { values.iter().map(|&x| f64::from(x)).collect() };
        let (hidden, weight) = (wide(&hidden), wide(&weight));
        let step = 1e-5;
        let difference = |values: &[f64], i: usize, loss: &dyn Fn(&[f64]) -> f64| {
            let mut moved = values.to_vec();
            moved[i] += step;
            let above = loss(&moved);
            moved[i] -= 2.0 * step;
            (-2.5 * (above - loss(&moved)) / (2.0 * step)) as f32
        };
        let expected: Vec<f32> = (0..hidden.len())
            .map(|i| difference(&hidden, i, &|hidden| loss(hidden, &weight)))
            .collect();
        assert_close("dh", &dh, &expected);
        let expected: Vec<f32> = (0..weight.len())
            .map(|i| difference(&weight, i, &|weight| loss(&hidden, weight)))
            .collect();
        assert_close("dw", &dw, &expected);
    }

    #[test]
    fn hidden_state_that_is_nan_gives_a_loss_that_is_nan() {
        let hidden = random([5, 9], 1).mul_scalar(f32::NAN);
        let head = cpu::head::head_with_loss(hidden, random([37, 9], 2), None, &TARGETS);
        assert!(head.weighted_nll.is_nan());
    }
}
