//! One AdamW update of one tensor (Loshchilov and Hutter 2019), in PyTorch's form and order.
//!
//! For update number t, with g the gradient times the clipping factor:
//!
//! ```text
//! w ← w·(1 − lr·λ)
//! m ← β₁·m + (1 − β₁)·g
//! v ← β₂·v + (1 − β₂)·g²
//! w ← w − lr/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε)
//! ```

use burn::tensor::Tensor;

#[cfg(feature = "gpu")]
use super::gpu;
use super::{cpu, on_cpu};
use crate::optim::adamw::AdamWParams;

/// The scalars of one update; the bias corrections are computed in f64.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    pub(super) gradient_scale: f32,
    /// 1 − lr·λ.
    pub(super) decay: f32,
    pub(super) beta1: f32,
    /// 1 − β₁. Not 1 less the rounded β: for β₂ = 0.999 that would be off by 1e-5 of itself.
    pub(super) one_minus_beta1: f32,
    pub(super) beta2: f32,
    /// 1 − β₂.
    pub(super) one_minus_beta2: f32,
    /// lr / (1 − β₁ᵗ).
    pub(super) step_size: f32,
    /// 1 / √(1 − β₂ᵗ).
    pub(super) inverse_root_correction: f32,
    pub(super) epsilon: f32,
}

impl Step {
    /// Update number `t`, from 1, of gradients times `gradient_scale`.
    pub(crate) fn new(params: &AdamWParams, t: u64, gradient_scale: f64) -> Self {
        let correction = |beta: f64| 1.0 - beta.powf(t as f64);
        Self {
            gradient_scale: gradient_scale as f32,
            decay: (1.0 - params.learning_rate * params.weight_decay) as f32,
            beta1: params.beta1 as f32,
            one_minus_beta1: (1.0 - params.beta1) as f32,
            beta2: params.beta2 as f32,
            one_minus_beta2: (1.0 - params.beta2) as f32,
            step_size: (params.learning_rate / correction(params.beta1)) as f32,
            inverse_root_correction: (1.0 / correction(params.beta2).sqrt()) as f32,
            epsilon: params.epsilon as f32,
        }
    }
}

/// The new value; the moments are replaced. No tensor carries autodiff, all have one shape. On
/// the CPU this works in place where nothing else holds the tensors.
pub(crate) fn adamw(
    value: Tensor<2>,
    gradient: Tensor<2>,
    first: &mut Tensor<2>,
    second: &mut Tensor<2>,
    step: &Step,
) -> Tensor<2> {
    if on_cpu(&value) {
        cpu::adamw::adamw(value, gradient, first, second, step)
    } else {
        elsewhere(value, gradient, first, second, step)
    }
}

/// The form of a device that is not the CPU.
fn elsewhere(
    value: Tensor<2>,
    gradient: Tensor<2>,
    first: &mut Tensor<2>,
    second: &mut Tensor<2>,
    step: &Step,
) -> Tensor<2> {
    #[cfg(feature = "gpu")]
    if super::on_gpu(&value) {
        return gpu::adamw::adamw(value, gradient, first, second, step);
    }
    portable(value, gradient, first, second, step)
}

pub(super) fn portable(
    value: Tensor<2>,
    gradient: Tensor<2>,
    first: &mut Tensor<2>,
    second: &mut Tensor<2>,
    step: &Step,
) -> Tensor<2> {
    let gradient = gradient.mul_scalar(step.gradient_scale);
    *first =
        first.clone().mul_scalar(step.beta1) + gradient.clone().mul_scalar(step.one_minus_beta1);
    *second =
        second.clone().mul_scalar(step.beta2) + gradient.square().mul_scalar(step.one_minus_beta2);
    let root = second.clone().sqrt().mul_scalar(step.inverse_root_correction);
    let direction = first.clone() / root.add_scalar(step.epsilon);
    value.mul_scalar(step.decay) - direction.mul_scalar(step.step_size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Place, assert_close, on_flex, on_test_device, random};
    use crate::parameter::read;

    type Form = fn(Tensor<2>, Tensor<2>, &mut Tensor<2>, &mut Tensor<2>, &Step) -> Tensor<2>;

    const PARAMS: AdamWParams = AdamWParams {
        learning_rate: 0.01,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.1,
    };

    /// Value and moments after three updates.
    fn three_updates(form: Form, place: Place) -> [Vec<f32>; 3] {
        let mut value = place(random([3, 7], 1));
        let mut first = value.zeros_like();
        let mut second = value.zeros_like();
        for t in 1..=3 {
            let step = Step::new(&PARAMS, t, 0.5);
            let gradient = place(random([3, 7], 10 + t));
            value = form(value, gradient, &mut first, &mut second, &step);
        }
        [value, first, second].map(|tensor| read(tensor).unwrap())
    }

    #[test]
    fn both_forms_equal_the_definition_in_f64() {
        let mut value: Vec<f64> = wide(random([3, 7], 1));
        let (mut first, mut second) = (vec![0.0; 21], vec![0.0; 21]);
        for t in 1..=3 {
            let gradient = wide(random([3, 7], 10 + t));
            for i in 0..21 {
                let g = 0.5 * gradient[i];
                first[i] = 0.9 * first[i] + 0.1 * g;
                second[i] = 0.999 * second[i] + 0.001 * g * g;
                let m = first[i] / (1.0 - 0.9f64.powi(t as i32));
                let v: f64 = second[i] / (1.0 - 0.999f64.powi(t as i32));
                value[i] = value[i] * (1.0 - 0.01 * 0.1) - 0.01 * m / (v.sqrt() + 1e-8);
            }
        }
        let narrow = |v: &[f64]| -> Vec<f32> { v.iter().map(|&x| x as f32).collect() };
        let forms: [(Form, Place); 2] = [(cpu::adamw::adamw, on_flex), (elsewhere, on_test_device)];
        for (form, place) in forms {
            let [value_f32, first_f32, second_f32] = three_updates(form, place);
            assert_close("value", &value_f32, &narrow(&value));
            assert_close("first moment", &first_f32, &narrow(&first));
            assert_close("second moment", &second_f32, &narrow(&second));
        }
    }

    fn wide(tensor: Tensor<2>) -> Vec<f64> {
        read(tensor).unwrap().into_iter().map(f64::from).collect()
    }
}
