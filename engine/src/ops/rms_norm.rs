//! Root-mean-square normalisation (Zhang and Sennrich 2019).
//!
//! With ρ = 1 / √(mean(x²) + ε) for each row of width H:
//!
//! ```text
//! y  = w ∘ x·ρ
//! dx = ρ·(w∘dy − x·ρ²·⟨w∘dy, x⟩ / H)
//! dw = Σ over rows of dy ∘ x·ρ
//! ```

use burn::tensor::Tensor;

use super::{cpu, on_cpu};

/// Normalises each row of `x` `[tokens, width]` and scales it by `weight` `[1, width]`.
pub(crate) fn rms_norm(x: Tensor<2>, weight: Tensor<2>, epsilon: f64) -> Tensor<2> {
    if on_cpu(&x) {
        cpu::rms_norm::rms_norm(x, weight, epsilon as f32)
    } else {
        portable(x, weight, epsilon)
    }
}

pub(super) fn portable(x: Tensor<2>, weight: Tensor<2>, epsilon: f64) -> Tensor<2> {
    let root = x.clone().square().mean_dim(1).add_scalar(epsilon).sqrt();
    x / root * weight
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_gradients_equal, random};

    #[test]
    fn cpu_form_equals_the_portable_form() {
        // 300 rows: more than one block of rows that threads share.
        for (tokens, width) in [(1, 8), (5, 33), (300, 20)] {
            assert_gradients_equal(
                &[random([tokens, width], 1), random([1, width], 2)],
                |inputs| cpu::rms_norm::rms_norm(inputs[0].clone(), inputs[1].clone(), 1e-5),
                |inputs| portable(inputs[0].clone(), inputs[1].clone(), 1e-5),
            );
        }
    }
}
