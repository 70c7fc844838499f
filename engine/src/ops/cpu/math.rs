//! What the kernels share: an exponential, and sums and maxima over slices.
//!
//! Reductions run over a fixed number of lanes that are added in a fixed order, so that a result
//! depends neither on the number of threads nor, but for the rounding of a·b + c, on the
//! instruction set.

use super::isa::MulAdd;

/// Partial results of a reduction. Two AVX-512 registers: enough to hide the latency of an add.
const LANES: usize = 32;

/// eˣ within 2 units in the last place, on −87..88; flat outside of it, NaN for NaN.
///
/// Cephes' `expf`: x = n·ln 2 + r with |r| ≤ ln 2 / 2, a polynomial of degree 5 for eʳ, and n
/// put into the exponent.
#[inline(always)]
pub(super) fn exp<M: MulAdd>(x: f32) -> f32 {
    // Not `f32::clamp` or `max`: these comparisons let a NaN through.
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    // Adding 1.5·2²³ rounds to the nearest integer, which then sits in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = M::mul_add(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln 2 in two parts, the first of few bits, so that its product with n is exact.
    let r = M::mul_add(n, -355.0 / 512.0, x);
    let r = M::mul_add(n, 2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = M::mul_add(p, r, coefficient);
    }
    let mantissa = M::mul_add(p * r, r, r) + 1.0;
    // 2ⁿ: n shifted into the exponent, plus the bias of 127.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    mantissa * power
}

/// tanh x within 2 units in the last place; NaN for NaN.
///
/// Cephes' `tanhf`: near 0, where 1 − 2/(e²ˣ + 1) would cancel, x + x³·P(x²).
#[inline(always)]
pub(super) fn tanh<M: MulAdd>(x: f32) -> f32 {
    let square = x * x;
    let mut p = -5.704_988_7e-3;
    for coefficient in [2.063_909e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1] {
        p = M::mul_add(p, square, coefficient);
    }
    let near = M::mul_add(p * square, x, x);
    let far = 1.0 - 2.0 / (exp::<M>(2.0 * x.abs()) + 1.0);
    if x.abs() < 0.625 { near } else { far.copysign(x) }
}

/// Σ xᵢ·yᵢ.
#[inline(always)]
pub(super) fn dot<M: MulAdd>(x: &[f32], y: &[f32]) -> f32 {
    let y = &y[..x.len()];
    let mut lanes = [0f32; LANES];
    let (x_blocks, x_rest) = x.as_chunks::<LANES>();
    let (y_blocks, y_rest) = y.as_chunks::<LANES>();
    for (x, y) in x_blocks.iter().zip(y_blocks) {
        for i in 0..LANES {
            lanes[i] = M::mul_add(x[i], y[i], lanes[i]);
        }
    }
    for i in 0..x_rest.len() {
        lanes[i] = M::mul_add(x_rest[i], y_rest[i], lanes[i]);
    }
    add_lanes(lanes)
}

/// Σ xᵢ.
#[inline(always)]
pub(super) fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (blocks, rest) = x.as_chunks::<LANES>();
    for block in blocks {
        for i in 0..LANES {
            lanes[i] += block[i];
        }
    }
    for i in 0..rest.len() {
        lanes[i] += rest[i];
    }
    add_lanes(lanes)
}

/// Σ xᵢ², in f64 lanes.
#[inline(always)]
pub(super) fn sum_of_squares(x: &[f32]) -> f64 {
    let mut lanes = [0f64; 16];
    let (blocks, rest) = x.as_chunks::<16>();
    for block in blocks {
        for i in 0..16 {
            let value = f64::from(block[i]);
            lanes[i] += value * value;
        }
    }
    for i in 0..rest.len() {
        let value = f64::from(rest[i]);
        lanes[i] += value * value;
    }
    lanes.iter().sum()
}

/// Σ (xᵢ·yᵢ)², in f64 lanes.
#[inline(always)]
pub(super) fn sum_of_squared_products(x: &[f32], y: &[f32]) -> f64 {
    let y = &y[..x.len()];
    let mut lanes = [0f64; 16];
    let (x_blocks, x_rest) = x.as_chunks::<16>();
    let (y_blocks, y_rest) = y.as_chunks::<16>();
    for (x, y) in x_blocks.iter().zip(y_blocks) {
        for i in 0..16 {
            let value = f64::from(x[i] * y[i]);
            lanes[i] += value * value;
        }
    }
    for i in 0..x_rest.len() {
        let value = f64::from(x_rest[i] * y_rest[i]);
        lanes[i] += value * value;
    }
    lanes.iter().sum()
}

/// The greatest xᵢ, NaN ignored; −∞ for none.
#[inline(always)]
pub(super) fn max(x: &[f32]) -> f32 {
    let greater = |a: f32, b: f32| if a > b { a } else { b };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (blocks, rest) = x.as_chunks::<LANES>();
    for block in blocks {
        for i in 0..LANES {
            lanes[i] = greater(block[i], lanes[i]);
        }
    }
    for i in 0..rest.len() {
        lanes[i] = greater(rest[i], lanes[i]);
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, greater)
}

/// Halves the lanes, of which there is a power of two, by pairwise addition, as a tree.
#[inline(always)]
pub(super) fn add_lanes<const N: usize>(mut lanes: [f32; N]) -> f32 {
    let mut width = N / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::isa::{Isa, simd_kernels};

    simd_kernels! {
        fn exp_all(x: &[f32], y: &mut [f32]) {
            for (x, y) in x.iter().zip(y) {
                *y = exp::<M>(*x);
            }
        }

        fn tanh_all(x: &[f32], y: &mut [f32]) {
            for (x, y) in x.iter().zip(y) {
                *y = tanh::<M>(*x);
            }
        }

        fn dot_all(x: &[f32], y: &[f32]) -> f32 {
            dot::<M>(x, y)
        }
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place_on_every_path() {
        let x: Vec<f32> = (-87_000..88_000).map(|i| i as f32 / 1000.0).collect();
        for isa in Isa::available() {
            let mut y = vec![0.0; x.len()];
            exp_all(isa, &x, &mut y);
            for (x, y) in x.iter().zip(&y) {
                let exact = f64::from(*x).exp();
                let error = (f64::from(*y) - exact).abs() / exact;
                assert!(error < 2.4e-7, "{isa:?}: exp({x}) = {y}, error {error:e}");
            }
        }
    }

    #[test]
    fn tanh_is_within_two_units_in_the_last_place_on_every_path() {
        let x: Vec<f32> = (-100_000..100_001).map(|i| i as f32 / 8000.0).collect();
        for isa in Isa::available() {
            let mut y = vec![0.0; x.len()];
            tanh_all(isa, &x, &mut y);
            for (x, y) in x.iter().zip(&y) {
                let exact = f64::from(*x).tanh();
                let error = (f64::from(*y) - exact).abs();
                assert!(error <= 2.4e-7 * exact.abs(), "{isa:?}: tanh({x}) = {y}, error {error:e}");
            }
            let mut y = [0.0; 3];
            tanh_all(isa, &[f32::NAN, f32::NEG_INFINITY, f32::INFINITY], &mut y);
            assert!(y[0].is_nan() && y[1] == -1.0 && y[2] == 1.0, "{isa:?}: {y:?}");
        }
    }

    #[test]
    fn exp_of_nan_is_nan_and_of_infinities_is_flat() {
        for isa in Isa::available() {
            let mut y = [0.0; 3];
            exp_all(isa, &[f32::NAN, f32::NEG_INFINITY, f32::INFINITY], &mut y);
            assert!(y[0].is_nan());
            assert!(y[1] > 0.0 && y[1] < 1e-37);
            assert!(y[2] > 1e38 && y[2].is_finite());
        }
    }

    #[test]
    fn dot_of_every_length_equals_f64_on_every_path() {
        for isa in Isa::available() {
            for length in [0, 1, 31, 32, 33, 100] {
                let x: Vec<f32> = (0..length).map(|i| (i as f32).sin()).collect();
                let y: Vec<f32> = (0..length).map(|i| (i as f32).cos()).collect();
                let exact: f64 = x.iter().zip(&y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
                assert!((f64::from(dot_all(isa, &x, &y)) - exact).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn reductions_of_nothing_have_their_neutral_values() {
        assert_eq!(sum(&[]), 0.0);
        assert_eq!(sum_of_squares(&[]), 0.0);
        assert_eq!(max(&[]), f32::NEG_INFINITY);
    }
}
