//! CPU form of [`crate::ops::squares`].

use burn::backend::Flex;
use burn::tensor::Tensor;
use rayon::prelude::*;

use super::isa::{Isa, simd_kernels};
use super::math;
use super::step::{contiguous, values};

/// Elements that one task sums; the tasks' sums are added in order.
const BLOCK: usize = 1 << 16;

simd_kernels! {
    fn block_sum(x: &[f32]) -> f64 {
        math::sum_of_squares(x)
    }
}

pub(in crate::ops) fn sum_of_squares(x: &Tensor<2>) -> f64 {
    let isa = Isa::detect();
    let x = x.clone().try_into_primitive::<Flex>().expect("a tensor on the CPU without autodiff");
    let x = contiguous(x);
    let sums: Vec<f64> = values(&x).par_chunks(BLOCK).map(|block| block_sum(isa, block)).collect();
    sums.into_iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_sums_in_f64() {
        // In f32, 2²⁴ + 1 would be 2²⁴.
        let mut x = vec![1.0; 1000];
        x[0] = 4096.0;
        for isa in Isa::available() {
            assert_eq!(block_sum(isa, &x), f64::from(1 << 24) + 999.0, "{isa:?}");
        }
    }
}
