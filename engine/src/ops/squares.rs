//! Σ x², for gradient norms.

use burn::tensor::Tensor;

use super::{cpu, on_cpu};
use crate::error::EngineError;
use crate::parameter::read;

/// Σ x² of a tensor without autodiff. On the CPU it is summed in f64; elsewhere the device sums
/// each row in f32, and the rows' sums are added in f64.
///
/// # Errors
/// [`EngineError::Device`] when the device fails.
pub(crate) fn sum_of_squares(x: &Tensor<2>) -> Result<f64, EngineError> {
    if on_cpu(x) { Ok(cpu::squares::sum_of_squares(x)) } else { portable(x) }
}

pub(super) fn portable(x: &Tensor<2>) -> Result<f64, EngineError> {
    Ok(read(x.clone().square().sum_dim(1))?.into_iter().map(f64::from).sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{on_test_device, random};

    #[test]
    fn cpu_form_over_several_blocks_equals_the_portable_form() {
        let x = random([300, 301], 1);
        let (sum, expected) =
            (cpu::squares::sum_of_squares(&x), portable(&on_test_device(x)).unwrap());
        assert!((sum / expected - 1.0).abs() < 1e-5, "{sum} {expected}");
    }
}
