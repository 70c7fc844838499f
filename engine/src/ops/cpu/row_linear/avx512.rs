//! [Inner products](super::inner_products) with AVX-512.

#![expect(unsafe_code, reason = "vector instructions load from slices of the right length")]

use std::arch::x86_64::{
    __m512, _mm256_loadu_si256, _mm256_maskz_loadu_epi16, _mm512_add_ps, _mm512_castsi512_ps,
    _mm512_cvtepu16_epi32, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_maskz_loadu_ps,
    _mm512_reduce_add_ps, _mm512_setzero_ps, _mm512_slli_epi32,
};

use half::bf16;

use super::inner_products::{GROUP, rows_of_blocks};
use crate::ops::cpu::memory::Ahead;

/// Numbers in a register.
const WIDTH: usize = 16;
/// Registers of partial sums of an inner product. Two, so that one row of W has enough to add to
/// while it is read alone, which is when memory is fastest.
const SUMS: usize = 2;
/// Partial sums of an inner product.
pub(super) const LANES: usize = SUMS * WIDTH;

/// Defines the products of `N` rows of x with `M` rows of W, of `$element`.
macro_rules! tile {
    ($name:ident, $element:ty, $load:ident, $load_first:ident) => {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
        pub(super) fn $name<const N: usize, const M: usize>(
            x: &[f32],
            weight: &[$element],
            ahead: &mut Ahead<'_>,
        ) -> [[f32; N]; M] {
            let inputs = weight.len() / M;
            let blocks = inputs / LANES;
            let w_blocks: [&[[$element; LANES]]; M] = rows_of_blocks(weight, inputs);
            let x_blocks: [&[[f32; LANES]]; N] = rows_of_blocks(x, inputs);
            // Their addresses are not taken, or they would lie in memory.
            let mut sums = [[[_mm512_setzero_ps(); SUMS]; N]; M];
            for block in 0..blocks {
                if N == GROUP {
                    ahead.fetch();
                }
                for half in 0..SUMS {
                    let mut w = [_mm512_setzero_ps(); M];
                    for m in 0..M {
                        w[m] = $load(&w_blocks[m][block].as_chunks().0[half]);
                    }
                    for n in 0..N {
                        let x = load_f32(&x_blocks[n][block].as_chunks().0[half]);
                        for m in 0..M {
                            sums[m][n][half] = _mm512_fmadd_ps(w[m], x, sums[m][n][half]);
                        }
                    }
                }
            }
            let mut done = blocks * LANES;
            for half in 0..SUMS {
                let count = (inputs - done).min(WIDTH);
                if count == 0 {
                    break;
                }
                // Zeros behind the ends of the rows add nothing.
                for m in 0..M {
                    let w = $load_first(&weight[m * inputs + done..][..count]);
                    for n in 0..N {
                        let x = load_first_f32(&x[n * inputs + done..][..count]);
                        sums[m][n][half] = _mm512_fmadd_ps(w, x, sums[m][n][half]);
                    }
                }
                done += count;
            }
            let mut y = [[0.0; N]; M];
            for m in 0..M {
                for n in 0..N {
                    let [first, second] = sums[m][n];
                    y[m][n] = _mm512_reduce_add_ps(_mm512_add_ps(first, second));
                }
            }
            y
        }
    };
}

tile!(tile_f32, f32, load_f32, load_first_f32);
tile!(tile_bf16, bf16, load_bf16, load_first_bf16);

#[inline]
#[target_feature(enable = "avx512f")]
fn load_f32(x: &[f32; WIDTH]) -> __m512 {
    // SAFETY: sixteen values are there.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

/// At most sixteen values, and zeros behind them.
#[inline]
#[target_feature(enable = "avx512f")]
fn load_first_f32(x: &[f32]) -> __m512 {
    // SAFETY: as many values are there.
    unsafe { _mm512_maskz_loadu_ps(first(x.len()), x.as_ptr()) }
}

/// bf16 is the upper half of an f32.
#[inline]
#[target_feature(enable = "avx512f")]
fn load_bf16(x: &[bf16; WIDTH]) -> __m512 {
    // SAFETY: sixteen values are there.
    let x = unsafe { _mm256_loadu_si256(x.as_ptr().cast()) };
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x)))
}

/// At most sixteen values, and zeros behind them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn load_first_bf16(x: &[bf16]) -> __m512 {
    // SAFETY: as many values are there.
    let x = unsafe { _mm256_maskz_loadu_epi16(first(x.len()), x.as_ptr().cast()) };
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x)))
}

/// The mask of the first `count` of sixteen.
fn first(count: usize) -> u16 {
    ((1u32 << count) - 1) as u16
}
