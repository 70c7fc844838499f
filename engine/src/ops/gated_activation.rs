//! The gated activation of the feed-forward block (Shazeer 2020).
//!
//! For a gate g and an up-projection u, with the activation a and its slope a′:
//!
//! ```text
//! y  = a(g)·u,  du = dy·a(g),  dg = dy·u·a′(g)
//! ```
//!
//! The activations are, with σ the logistic function and t = tanh(√(2/π)·(x + 0.044715·x³)):
//!
//! ```text
//! silu (SwiGLU):               a = x·σ(x),          a′ = σ(x)·(1 + x·(1 − σ(x)))
//! gelu_pytorch_tanh (GEGLU):   a = x/2·(1 + t),     a′ = (1 + t)/2
//!                                                        + x/2·(1 − t²)·√(2/π)·(1 + 3·0.044715·x²)
//! ```

use burn::tensor::{Tensor, activation};

#[cfg(feature = "gpu")]
use super::gpu;
use super::linear::Input;
use super::{cpu, on_cpu};
use crate::models::config::Activation;

/// √(2/π).
pub(super) const GELU_SCALE: f32 = 0.797_884_6;
/// The factor on x³.
pub(super) const GELU_CUBIC: f32 = 0.044_715;

/// `gate_up` `[tokens, 2·width]`, gate before up, to `[tokens, width]`. With `bf16` it is
/// given in that, for a product that multiplies bf16, but by the portable form; the backward pass reads
/// gate and up rounded, and on the CPU their gradient is in bf16 too.
pub(crate) fn gated_activation(gate_up: Tensor<2>, activation: Activation, bf16: bool) -> Input {
    if on_cpu(&gate_up) {
        cpu::gated_activation::gated_activation(gate_up, activation, bf16)
    } else {
        elsewhere(gate_up, activation, bf16)
    }
}

/// The form of a device that is not the CPU.
#[cfg_attr(not(feature = "gpu"), expect(unused_variables, reason = "portable y is f32"))]
fn elsewhere(gate_up: Tensor<2>, activation: Activation, bf16: bool) -> Input {
    #[cfg(feature = "gpu")]
    if super::on_gpu(&gate_up) {
        return gpu::gated_activation::gated_activation(gate_up, activation, bf16).into();
    }
    portable(gate_up, activation).into()
}

pub(super) fn portable(gate_up: Tensor<2>, activation: Activation) -> Tensor<2> {
    let [tokens, doubled] = gate_up.dims();
    let gate = gate_up.clone().slice([0..tokens, 0..doubled / 2]);
    let up = gate_up.slice([0..tokens, doubled / 2..doubled]);
    let activated = match activation {
        Activation::Silu => activation::silu(gate),
        Activation::GeluTanh => {
            let cubic = gate.clone().powi_scalar(3).mul_scalar(GELU_CUBIC);
            let tanh = (gate.clone() + cubic).mul_scalar(GELU_SCALE).tanh();
            gate.mul_scalar(0.5) * tanh.add_scalar(1.0)
        }
    };
    activated * up
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, FloatDType};

    use super::*;
    use crate::ops::bf16::is_bf16;
    use crate::ops::bias::add_bias;
    use crate::ops::testing::{assert_gradients_equal, on_test_device, random};
    use crate::parameter::read;
    use cpu::gated_activation::gated_activation as cpu_form;

    #[test]
    fn cpu_form_equals_the_portable_form() {
        for activation in [Activation::Silu, Activation::GeluTanh] {
            for (tokens, width) in [(1, 1), (3, 17), (40, 32)] {
                assert_gradients_equal(
                    &[random([tokens, 2 * width], 3).mul_scalar(4.0)],
                    |inputs| cpu_form(inputs[0].clone(), activation, false).x,
                    |inputs| elsewhere(inputs[0].clone(), activation, false).x,
                );
            }
        }
    }

    #[test]
    fn of_values_that_bf16_holds_output_and_gradient_are_those_of_f32_rounded() {
        let gate_up = random([40, 64], 3).mul_scalar(4.0);
        let gate_up = gate_up.cast(FloatDType::BF16).cast(FloatDType::F32);
        let upstream = random([40, 32], 4).cast(FloatDType::BF16).cast(FloatDType::F32);
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let pass = |bf16: bool| {
                let gate_up = gate_up.clone().autodiff().require_grad();
                let y = cpu_form(gate_up.clone(), activation, bf16).x;
                assert_eq!(is_bf16(&y), bf16);
                let product = y.clone().cast(FloatDType::F32) * upstream.clone().autodiff();
                let gradient = gate_up.grad(&product.sum().backward()).unwrap();
                assert_eq!(is_bf16(&gradient), bf16);
                [y.inner(), gradient].map(|x| read(x.cast(FloatDType::F32)).unwrap())
            };
            for (exact, rounded) in pass(false).into_iter().zip(pass(true)) {
                let expected = exact.iter().map(|&x| half::bf16::from_f32(x).to_f32());
                assert_eq!(rounded, expected.collect::<Vec<_>>(), "{activation:?}");
            }
        }
    }

    #[test]
    fn a_bias_of_gate_and_up_has_a_gradient_in_f32_whatever_they_are_rounded_to() {
        let [x, bias, upstream] = [[40, 64], [64, 1], [40, 32]]
            .map(|shape| on_test_device(random(shape, shape[0] as u64)));
        let gradient = |bf16: bool| {
            let bias = bias.clone().autodiff().require_grad();
            let gate_up = add_bias(x.clone().autodiff(), bias.clone());
            let y = gated_activation(gate_up, Activation::Silu, bf16).x.cast(FloatDType::F32);
            bias.grad(&(y * upstream.clone().autodiff()).sum().backward()).unwrap()
        };
        let [exact, rounded] = [false, true].map(gradient);
        assert_eq!(rounded.dtype(), DType::F32);
        let [exact, rounded] = [exact, rounded].map(|gradient| read(gradient).unwrap());
        let greatest = exact.iter().fold(0f32, |most, x| most.max(x.abs()));
        for (rounded, exact) in rounded.iter().zip(exact) {
            assert!((rounded - exact).abs() < 1e-2 * greatest, "{rounded} {exact}");
        }
    }
}
