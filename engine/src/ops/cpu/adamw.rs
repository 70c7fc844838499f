//! CPU form of [`crate::ops::adamw`]: one pass over value, gradient and moments, in place.

use burn::backend::Flex;
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::isa::{Isa, simd_kernels};
use super::step::{contiguous, values};
use crate::ops::adamw::Step;

/// Elements that one task updates.
const BLOCK: usize = 1 << 14;

simd_kernels! {
    fn update(value: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32], s: &Step) {
        let n = value.len();
        let (gradient, first, second) = (&gradient[..n], &mut first[..n], &mut second[..n]);
        for i in 0..n {
            let g = gradient[i] * s.gradient_scale;
            let m = M::mul_add(first[i], s.beta1, g * s.one_minus_beta1);
            let v = M::mul_add(second[i], s.beta2, g * g * s.one_minus_beta2);
            first[i] = m;
            second[i] = v;
            let root = M::mul_add(v.sqrt(), s.inverse_root_correction, s.epsilon);
            value[i] = value[i] * s.decay - s.step_size * (m / root);
        }
    }
}

pub(in crate::ops) fn adamw(
    value: Tensor<2>,
    gradient: Tensor<2>,
    first: &mut Tensor<2>,
    second: &mut Tensor<2>,
    step: &Step,
) -> Tensor<2> {
    let isa = Isa::detect();
    let gradient = primitive(gradient);
    let mut value = primitive(value);
    let mut first_moment = take(first);
    let mut second_moment = take(second);
    value
        .storage_mut::<f32>()
        .par_chunks_mut(BLOCK)
        .zip(values(&gradient).par_chunks(BLOCK))
        .zip(first_moment.storage_mut::<f32>().par_chunks_mut(BLOCK))
        .zip(second_moment.storage_mut::<f32>().par_chunks_mut(BLOCK))
        .for_each(|(((value, gradient), first), second)| {
            update(isa, value, gradient, first, second, step);
        });
    *first = Tensor::from_primitive::<Flex>(first_moment);
    *second = Tensor::from_primitive::<Flex>(second_moment);
    Tensor::from_primitive::<Flex>(value)
}

fn primitive(tensor: Tensor<2>) -> FlexTensor {
    contiguous(tensor.try_into_primitive::<Flex>().expect("a tensor on the CPU without autodiff"))
}

/// Takes the tensor out, so that it is held once and can be changed in place.
fn take(tensor: &mut Tensor<2>) -> FlexTensor {
    let placeholder = Tensor::zeros([1, 1], &tensor.device());
    primitive(std::mem::replace(tensor, placeholder))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::adamw::AdamWParams;

    #[test]
    fn every_path_gives_the_values_of_f64() {
        let params =
            AdamWParams { learning_rate: 0.01, weight_decay: 0.1, ..AdamWParams::default() };
        let step = Step::new(&params, 3, 0.5);
        let n = 77;
        let wave = |speed: f32| -> Vec<f32> { (0..n).map(|i| (i as f32 * speed).sin()).collect() };
        let (start, gradient, m, v) = (wave(0.3), wave(0.7), wave(1.1), wave(0.2));
        let v: Vec<f32> = v.iter().map(|x| x * x).collect();
        for isa in Isa::available() {
            let (mut value, mut first, mut second) = (start.clone(), m.clone(), v.clone());
            update(isa, &mut value, &gradient, &mut first, &mut second, &step);
            for i in 0..value.len() {
                let g = 0.5 * f64::from(gradient[i]);
                let m = 0.9 * f64::from(m[i]) + 0.1 * g;
                let v = 0.999 * f64::from(v[i]) + 0.001 * g * g;
                let direction =
                    m / (1.0 - 0.9f64.powi(3)) / ((v / (1.0 - 0.999f64.powi(3))).sqrt() + 1e-8);
                let expected = f64::from(start[i]) * 0.999 - 0.01 * direction;
                assert!((f64::from(first[i]) - m).abs() < 1e-6, "{isa:?}");
                assert!((f64::from(second[i]) - v).abs() < 1e-6, "{isa:?}");
                // The direction grows without limit where v is almost 0.
                let tolerance = 1e-6 * (1.0 + direction.abs());
                assert!((f64::from(value[i]) - expected).abs() < tolerance, "{isa:?} {i}");
            }
        }
    }
}
