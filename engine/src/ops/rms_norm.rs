//! Root-mean-square normalisation (Zhang and Sennrich 2019).
//!
//! With ρ = 1 / √(mean(x²) + ε) for each row of width H, and ŵ = w, or 1 + w in Gemma's models:
//!
//! ```text
//! y  = ŵ ∘ x·ρ
//! dx = ρ·(ŵ∘dy − x·ρ²·⟨ŵ∘dy, x⟩ / H)
//! dw = Σ over rows of dy ∘ x·ρ
//! ```
//!
//! Where x² leaves the range of f32, ρ is NaN and not 0: a row of zeros would look like any other,
//! and a model whose numbers have overflowed would go on without a gradient, its loss that of a
//! guess. So a mean times 0, which is 0 unless it is infinite, is added to ρ.

use burn::tensor::Tensor;

#[cfg(feature = "gpu")]
use super::gpu;
use super::linear::Input;
use super::{cpu, on_cpu};

/// What norms of a model have in common.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Norm {
    /// ε.
    pub(crate) epsilon: f64,
    /// Whether the factor is 1 + w.
    pub(crate) unit_offset: bool,
}

/// Normalises each row of `x` `[tokens, width]` and scales it by `weight` `[1, width]`. With `bf16` it
/// is given in that, for a product that multiplies bf16, but by the portable form.
pub(crate) fn rms_norm(x: Tensor<2>, weight: Tensor<2>, norm: Norm, bf16: bool) -> Input {
    if on_cpu(&x) {
        cpu::rms_norm::rms_norm(x, weight, norm, bf16)
    } else {
        elsewhere(x, weight, norm, bf16)
    }
}

/// The form of a device that is not the CPU.
#[cfg_attr(not(feature = "gpu"), expect(unused_variables, reason = "portable y is f32"))]
fn elsewhere(x: Tensor<2>, weight: Tensor<2>, norm: Norm, bf16: bool) -> Input {
    #[cfg(feature = "gpu")]
    if super::on_gpu(&x) {
        return gpu::rms_norm::rms_norm(x, weight, norm, bf16).into();
    }
    portable(x, weight, norm).into()
}

pub(super) fn portable(x: Tensor<2>, weight: Tensor<2>, norm: Norm) -> Tensor<2> {
    let factor = if norm.unit_offset { weight.add_scalar(1.0) } else { weight };
    let mean = x.clone().square().mean_dim(1).add_scalar(norm.epsilon);
    let root = mean.clone().sqrt() + mean.mul_scalar(0.0);
    x / root * factor
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_gradients_equal, on_test_device, random};
    use crate::parameter::read;

    type Form = fn(Tensor<2>, Tensor<2>, Norm) -> Tensor<2>;

    #[test]
    fn a_row_whose_square_overflows_is_not_a_number_and_the_others_are_as_before() {
        let norm = Norm { epsilon: 1e-5, unit_offset: false };
        let (x, weight) = (random([3, 8], 1), random([1, 8], 2));
        let large = Tensor::cat(vec![x.clone(), x.clone().mul_scalar(1e20)], 0);
        let assert_overflow_is_told = |x: Tensor<2>, large, weight: Tensor<2>, form: Form| {
            let y = read(form(large, weight.clone(), norm)).unwrap();
            assert_eq!(y[..24], read(form(x, weight, norm)).unwrap());
            assert!(y[24..].iter().all(|y| y.is_nan()), "{y:?}");
        };
        let [on_x, on_large, on_weight] =
            [&x, &large, &weight].map(|tensor| on_test_device(tensor.clone()));
        assert_overflow_is_told(x, large, weight, |x, w, norm| {
            cpu::rms_norm::rms_norm(x, w, norm, false).x
        });
        assert_overflow_is_told(on_x, on_large, on_weight, |x, w, norm| {
            elsewhere(x, w, norm, false).x
        });
    }

    #[test]
    fn cpu_form_equals_the_portable_form() {
        // 300 rows: more than one block of rows that threads share.
        for (tokens, width) in [(1, 8), (5, 33), (300, 20)] {
            for unit_offset in [false, true] {
                let norm = Norm { epsilon: 1e-5, unit_offset };
                assert_gradients_equal(
                    &[random([tokens, width], 1), random([1, width], 2)],
                    |inputs| {
                        cpu::rms_norm::rms_norm(inputs[0].clone(), inputs[1].clone(), norm, false).x
                    },
                    |inputs| elsewhere(inputs[0].clone(), inputs[1].clone(), norm, false).x,
                );
            }
        }
    }
}
