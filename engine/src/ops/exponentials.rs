//! The exponentials of a row of logits on the host, with which tokens are chosen.

use super::cpu;

/// max x, NaN ignored; −∞ for none.
pub(crate) fn greatest(x: &[f32]) -> f32 {
    cpu::exponentials::greatest(x)
}

/// y = exp(scale · (x − max x)); returns max x and Σ y. A NaN in x is one in the sum.
pub(crate) fn exponentials(x: &[f32], scale: f32, y: &mut [f32]) -> (f32, f64) {
    assert_eq!(x.len(), y.len(), "a row and its exponentials");
    cpu::exponentials::exponentials(x, scale, y)
}
