//! CPU form of [`crate::ops::exponentials`].

use super::isa::{Isa, simd_kernels};
use super::math::{exp, max};

/// Exponentials that are summed in f32 before they go into the f64 sum.
const SUM_BLOCK: usize = 512;

pub(in crate::ops) fn exponentials(x: &[f32], scale: f32, y: &mut [f32]) -> (f32, f64) {
    shifted(Isa::detect(), x, scale, y)
}

pub(in crate::ops) fn greatest(x: &[f32]) -> f32 {
    max(x)
}

simd_kernels! {
    fn shifted(x: &[f32], scale: f32, y: &mut [f32]) -> (f32, f64) {
        let greatest = max(x);
        let mut total = 0f64;
        for (x, y) in x.chunks(SUM_BLOCK).zip(y.chunks_mut(SUM_BLOCK)) {
            let mut lanes = [0f32; 16];
            let (x_parts, x_rest) = x.as_chunks::<16>();
            let (y_parts, y_rest) = y.as_chunks_mut::<16>();
            for (x, y) in x_parts.iter().zip(y_parts) {
                for i in 0..16 {
                    y[i] = exp::<M>(scale * (x[i] - greatest));
                    lanes[i] += y[i];
                }
            }
            for i in 0..x_rest.len() {
                y_rest[i] = exp::<M>(scale * (x_rest[i] - greatest));
                lanes[i] += y_rest[i];
            }
            for lane in lanes {
                total += f64::from(lane);
            }
        }
        (greatest, total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_and_sum_are_those_of_f64_on_every_path() {
        let x: Vec<f32> = (0..1100).map(|i| (i as f32 * 0.7).sin() * 20.0).collect();
        for isa in Isa::available() {
            let mut y = vec![0.0; x.len()];
            let (greatest, total) = shifted(isa, &x, 0.5, &mut y);
            assert_eq!(greatest, x.iter().copied().fold(f32::MIN, f32::max));
            let exact = |x: f32| (0.5 * (f64::from(x) - f64::from(greatest))).exp();
            let expected: f64 = x.iter().map(|&x| exact(x)).sum();
            assert!((total - expected).abs() < 1e-5 * expected, "{isa:?}: {total} {expected}");
            assert!(y.iter().zip(&x).all(|(&y, &x)| (f64::from(y) - exact(x)).abs() < 1e-6));
        }
    }
}
