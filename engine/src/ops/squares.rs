//! Σ x², for gradient norms.

use burn::tensor::Tensor;

use super::{cpu, on_cpu};
use crate::error::EngineError;
use crate::parameter::read;

/// Σ x² of each of some tensors without autodiff, all on one device. On the CPU they are summed in
/// f64; elsewhere the device sums each row in f32, and the rows' sums are added in f64.
///
/// # Errors
/// [`EngineError::Device`] when the device fails.
pub(crate) fn sums_of_squares(all: &[&Tensor<2>]) -> Result<Vec<f64>, EngineError> {
    if all.iter().all(|x| on_cpu(x)) {
        Ok(all.iter().map(|x| cpu::squares::sum_of_squares(x)).collect())
    } else {
        portable(all)
    }
}

pub(super) fn portable(all: &[&Tensor<2>]) -> Result<Vec<f64>, EngineError> {
    // One wait for the device, not one a tensor.
    let rows = all.iter().map(|x| (*x).clone().square().sum_dim(1)).collect();
    let rows = read(Tensor::cat(rows, 0))?;
    let mut rest = rows.iter();
    let sum = |x: &&Tensor<2>| rest.by_ref().take(x.dims()[0]).map(|&row| f64::from(row)).sum();
    Ok(all.iter().map(sum).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{on_test_device, random};

    #[test]
    fn cpu_form_over_several_blocks_equals_the_portable_form() {
        let all = [random([300, 301], 1), random([1, 7], 2), random([4, 1], 3)];
        let moved = all.clone().map(on_test_device);
        let expected = portable(&moved.each_ref()).unwrap();
        for (x, expected) in all.iter().zip(expected) {
            let sum = cpu::squares::sum_of_squares(x);
            assert!((sum / expected - 1.0).abs() < 1e-5, "{sum} {expected}");
        }
    }
}
