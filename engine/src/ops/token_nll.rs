//! Output head and the negative log-probability of each target.
//!
//! For the hidden state h of a target's row and its id y:
//!
//! ```text
//! z   = W·h,  ẑ = c·tanh(z / c), or z where there is no softcap c
//! nll = log Σᵥ exp ẑᵥ − ẑ_y
//! dz  = u·(softmax(ẑ) − e_y)∘(1 − (ẑ/c)²),  dh = Wᵀ·dz,  dW = Σ dz·hᵀ
//! ```
//!
//! for the upstream gradient u of that target. Where [`super::head`] knows each target's weight
//! beforehand, here it is known only once the values are: a preference loss weighs the tokens of an
//! answer by how the whole answer compares with another. The forms of CPU and GPU go through the
//! targets in chunks, so that the `[tokens, vocabulary]` logits are never stored.

use burn::tensor::{Int, Tensor, TensorData, activation};

use super::bf16::matmul;
#[cfg(feature = "gpu")]
use super::gpu;
use super::head::soft_capped;
use super::{cpu, on_cpu};
use crate::batch::Target;
use crate::error::EngineError;
use crate::parameter::read;

/// The targets' losses as a node of the graph, and as exact values.
#[derive(Debug)]
pub(crate) struct TokenNll {
    /// nll of each target, for the backward pass.
    pub(crate) nll: Tensor<1>,
    /// The same, computed in f64 where the form can.
    pub(crate) values: Vec<f64>,
    /// Whether no token was more likely than the target.
    pub(crate) correct: Vec<bool>,
}

/// The losses of `targets` after `hidden` `[tokens, width]` under the head `weight`
/// `[vocabulary, width]`, whose logits are capped by `softcap`. The targets' weights count for nothing; a position may come more than
/// once.
///
/// # Errors
/// [`EngineError::Device`] when reading the values fails.
pub(crate) fn token_nll(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    softcap: Option<f32>,
    targets: &[Target],
) -> Result<TokenNll, EngineError> {
    if on_cpu(&hidden) {
        Ok(cpu::token_nll::token_nll(hidden, weight, softcap, targets))
    } else {
        elsewhere(hidden, weight, softcap, targets)
    }
}

/// The form of a device that is not the CPU.
fn elsewhere(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    softcap: Option<f32>,
    targets: &[Target],
) -> Result<TokenNll, EngineError> {
    #[cfg(feature = "gpu")]
    if super::on_gpu(&hidden) {
        return gpu::token_nll::token_nll(hidden, weight, softcap, targets);
    }
    portable(hidden, weight, softcap, targets)
}

pub(super) fn portable(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    softcap: Option<f32>,
    targets: &[Target],
) -> Result<TokenNll, EngineError> {
    let device = hidden.device();
    let count = targets.len();
    let integers = |values: Vec<i32>| -> Tensor<1, Int> {
        Tensor::from_data(TensorData::new(values, [count]), &device)
    };
    let rows = integers(targets.iter().map(|target| target.position as i32).collect());
    let ids = integers(targets.iter().map(|target| target.id as i32).collect());

    let logits = soft_capped(matmul(hidden.select(0, rows), weight.transpose()), softcap);
    let ids = ids.reshape([count, 1]);
    let nll = activation::log_softmax(logits.clone(), 1).gather(1, ids.clone()).neg();
    let nll: Tensor<1> = nll.reshape([count]);
    let margin = (logits.clone().gather(1, ids) - logits.max_dim(1)).inner();
    Ok(TokenNll {
        values: read(nll.clone())?.into_iter().map(f64::from).collect(),
        correct: read(margin)?.into_iter().map(|margin| margin >= 0.0).collect(),
        nll,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Place, assert_close, on_flex, on_test_device, random};

    type Form = fn(Tensor<2>, Tensor<2>, Option<f32>, &[Target]) -> Result<TokenNll, EngineError>;

    fn cpu_form(
        hidden: Tensor<2>,
        weight: Tensor<2>,
        softcap: Option<f32>,
        targets: &[Target],
    ) -> Result<TokenNll, EngineError> {
        Ok(cpu::token_nll::token_nll(hidden, weight, softcap, targets))
    }

    /// Two targets after position 2; the weights are there to count for nothing.
    fn targets(count: usize) -> Vec<Target> {
        let target = |index: usize| Target {
            position: if index == 3 { 2 } else { index },
            id: (index * 5 % 37) as u32,
            weight: 7.0,
        };
        (0..count).map(target).collect()
    }

    /// Values, the gradients of Σ uᵢ·nllᵢ for u of both signs, and the correct ones.
    fn run(
        form: Form,
        place: Place,
        softcap: Option<f32>,
        targets: &[Target],
        tracked: [bool; 2],
    ) -> (TokenNll, [Option<Vec<f32>>; 2]) {
        let tokens = targets.len() + 2;
        let input = |shape, seed, tracked| {
            place(random(shape, seed).mul_scalar(2.0)).autodiff().set_require_grad(tracked)
        };
        let hidden = input([tokens, 9], 1, tracked[0]);
        let weight = input([37, 9], 2, tracked[1]);
        let head = form(hidden.clone(), weight.clone(), softcap, targets).unwrap();
        let upstream: Vec<f32> = (0..targets.len()).map(|i| [-2.5, 0.3, 0.0, 1.0][i % 4]).collect();
        let upstream: Tensor<1> = Tensor::from_data(
            TensorData::new(upstream, [targets.len()]),
            &head.nll.device().inner(),
        );
        let gradients = (head.nll.clone() * upstream.autodiff()).sum().backward();
        let gradient =
            |input: &Tensor<2>| input.grad(&gradients).map(|gradient| read(gradient).unwrap());
        let gradients = [gradient(&hidden), gradient(&weight)];
        (head, gradients)
    }

    fn assert_forms_equal(softcap: Option<f32>, count: usize) {
        let targets = targets(count);
        let (expected, [expected_dh, expected_dw]) =
            run(elsewhere, on_test_device, softcap, &targets, [true, true]);
        for tracked in [[true, true], [true, false], [false, true]] {
            let (head, [dh, dw]) = run(cpu_form, on_flex, softcap, &targets, tracked);
            assert_close("nll", &read(head.nll).unwrap(), &read(expected.nll.clone()).unwrap());
            let values: Vec<f32> = head.values.iter().map(|&value| value as f32).collect();
            let of_graph: Vec<f32> = expected.values.iter().map(|&value| value as f32).collect();
            assert_close("values", &values, &of_graph);
            assert_eq!(head.correct, expected.correct);
            assert_eq!([dh.is_some(), dw.is_some()], tracked);
            for (name, gradient, expected) in [("dh", dh, &expected_dh), ("dw", dw, &expected_dw)] {
                if let Some(gradient) = gradient {
                    assert_close(name, &gradient, expected.as_ref().unwrap());
                }
            }
        }
    }

    #[test]
    fn few_targets_of_an_odd_vocabulary_equal_the_portable_form() {
        assert_forms_equal(None, 5);
    }

    #[test]
    fn targets_of_several_chunks_equal_the_portable_form() {
        assert_forms_equal(None, 5 * cpu::head::MAX_CHUNK_ROWS / 2);
    }

    #[test]
    fn targets_under_a_softcap_equal_the_portable_form() {
        assert_forms_equal(Some(1.5), 5);
    }

    #[test]
    fn values_are_those_of_the_definition_in_f64() {
        let targets = targets(5);
        let (head, _) = run(cpu_form, on_flex, None, &targets, [true, true]);
        let hidden = read(random([7, 9], 1).mul_scalar(2.0)).unwrap();
        let weight = read(random([37, 9], 2).mul_scalar(2.0)).unwrap();
        for (target, value) in targets.iter().zip(head.values) {
            let logit = |id: usize| -> f64 {
                let h = &hidden[target.position * 9..][..9];
                h.iter().zip(&weight[id * 9..][..9]).map(|(a, b)| f64::from(a * b)).sum()
            };
            let total: f64 = (0..37).map(|id| logit(id).exp()).sum();
            let expected = total.ln() - logit(target.id as usize);
            assert!((value - expected).abs() < 1e-5, "{value} {expected}");
        }
    }
}
