//! Inner products of rows of x with rows of W, which is read once from memory.
//!
//! Each sum is made in the same order, however many rows of x there are.

#![expect(
    unsafe_code,
    reason = "vector instructions load from slices of the right length, and an `Isa` proves that \
              the CPU has them"
)]

use half::bf16;
use half::slice::HalfFloatSliceExt;

#[cfg(target_arch = "x86_64")]
use super::avx512;
use crate::ops::cpu::isa::{Isa, Level};
use crate::ops::cpu::math::add_lanes;
use crate::ops::cpu::memory::Ahead;

/// Rows of x that are multiplied by rows of W at a time, at most.
pub(super) const GROUP: usize = 4;
/// Rows of W that go with as many: so many sums have room in registers.
const TILE: usize = 3;
/// Partial sums of an inner product, without AVX-512.
const LANES: usize = 8;

/// Of how many parts a tile makes an inner product.
fn blocks(isa: Isa, inputs: usize) -> usize {
    match isa.level() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => inputs / avx512::LANES,
        _ => inputs / LANES,
    }
}

/// The whole blocks of each of `R` rows, which are `inputs` long.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn rows_of_blocks<T, const R: usize, const L: usize>(
    rows: &[T],
    inputs: usize,
) -> [&[[T; L]]; R] {
    let mut blocks: [&[[T; L]]; R] = [&[]; R];
    for (row, blocks) in blocks.iter_mut().enumerate() {
        // This length is what the compiler can tell from the number of blocks.
        *blocks = &rows[row * inputs..][..inputs].as_chunks().0[..inputs / L];
    }
    blocks
}

/// A weight's element.
pub(super) trait Element: Copy + Sync {
    /// `y`, a slice for each row of `x`: the row times all rows of `weight`.
    fn inner_products(
        isa: Isa,
        x: &[f32],
        weight: &[Self],
        inputs: usize,
        y: &mut [&mut [f32]],
        ahead: Ahead<'_>,
    );
}

impl Element for f32 {
    fn inner_products(
        isa: Isa,
        x: &[f32],
        weight: &[f32],
        inputs: usize,
        y: &mut [&mut [f32]],
        ahead: Ahead<'_>,
    ) {
        inner_products_f32(isa, x, weight, inputs, y, ahead);
    }
}

impl Element for bf16 {
    fn inner_products(
        isa: Isa,
        x: &[f32],
        weight: &[bf16],
        inputs: usize,
        y: &mut [&mut [f32]],
        ahead: Ahead<'_>,
    ) {
        let widened_in_registers = match isa.level() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => true,
            _ => y.len() <= GROUP,
        };
        if widened_in_registers {
            return inner_products_bf16(isa, x, weight, inputs, y, ahead);
        }
        // Once for all groups.
        let mut widened = vec![0.0; weight.len()];
        weight.convert_to_f32_slice(&mut widened);
        inner_products_f32(isa, x, &widened, inputs, y, ahead);
    }
}

/// Defines the inner products of rows of `$element` with rows of f32, which are `inputs` long.
macro_rules! inner_products {
    ($name:ident, $element:ty, $load:ident, $tile:ident, $widen:expr) => {
        fn $name(
            isa: Isa,
            x: &[f32],
            weight: &[$element],
            inputs: usize,
            mut y: &mut [&mut [f32]],
            mut ahead: Ahead<'_>,
        ) {
            assert_eq!(x.len(), y.len() * inputs, "a row of y for each row of x");
            let tiles = y.len() / GROUP * (weight.len() / inputs / TILE);
            ahead.spread(tiles * blocks(isa, inputs));
            // Group by group: its rows stay in the nearest cache, those of W in the next one.
            let mut first = 0;
            while !y.is_empty() {
                let x = &x[first * inputs..];
                // So many products at a time as there are registers for their sums.
                let rows = match (y.len(), isa.level()) {
                    (GROUP.., _) => group::<GROUP, TILE>(isa, x, weight, inputs, y, &mut ahead),
                    #[cfg(target_arch = "x86_64")]
                    (2.., Level::Avx512) => group::<2, 2>(isa, x, weight, inputs, y, &mut ahead),
                    #[cfg(target_arch = "x86_64")]
                    (_, Level::Avx512) => group::<1, 1>(isa, x, weight, inputs, y, &mut ahead),
                    (2.., _) => group::<2, 4>(isa, x, weight, inputs, y, &mut ahead),
                    _ => group::<1, 4>(isa, x, weight, inputs, y, &mut ahead),
                };
                y = &mut y[rows..];
                first += rows;
            }

            /// The first `N` rows of x times all rows of W, `M` of these at a time, into the first
            /// `N` of y. Gives `N`.
            fn group<const N: usize, const M: usize>(
                isa: Isa,
                x: &[f32],
                weight: &[$element],
                inputs: usize,
                y: &mut [&mut [f32]],
                ahead: &mut Ahead<'_>,
            ) -> usize {
                let (x, tiles) = (&x[..N * inputs], weight.chunks_exact(M * inputs));
                let rest = tiles.remainder().chunks_exact(inputs);
                let mut output = 0;
                for weight in tiles {
                    for products in tile::<N, M>(isa, x, weight, ahead) {
                        for (y, product) in y.iter_mut().zip(products) {
                            y[output] = product;
                        }
                        output += 1;
                    }
                }
                for weight in rest {
                    let [products] = tile::<N, 1>(isa, x, weight, ahead);
                    for (y, product) in y.iter_mut().zip(products) {
                        y[output] = product;
                    }
                    output += 1;
                }
                N
            }

            #[inline]
            fn tile<const N: usize, const M: usize>(
                isa: Isa,
                x: &[f32],
                weight: &[$element],
                ahead: &mut Ahead<'_>,
            ) -> [[f32; N]; M] {
                match isa.level() {
                    // SAFETY: an `Isa` of this level is made only where the CPU has AVX-512.
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx512 => unsafe { avx512::$tile(x, weight, ahead) },
                    // SAFETY: an `Isa` of this level is made only where the CPU has AVX2 and FMA.
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx2 => unsafe { avx2(x, weight, ahead) },
                    Level::Portable => portable(x, weight, ahead),
                }
            }

            fn portable<const N: usize, const M: usize>(
                x: &[f32],
                weight: &[$element],
                ahead: &mut Ahead<'_>,
            ) -> [[f32; N]; M] {
                let inputs = weight.len() / M;
                if N == GROUP {
                    (0..inputs / LANES).for_each(|_| ahead.fetch());
                }
                std::array::from_fn(|m| {
                    let weight = &weight[m * inputs..(m + 1) * inputs];
                    std::array::from_fn(|row| {
                        let x = &x[row * inputs..(row + 1) * inputs];
                        let mut lanes = [0f32; LANES];
                        for (weight, x) in weight.chunks(LANES).zip(x.chunks(LANES)) {
                            for ((lane, &w), &x) in lanes.iter_mut().zip(weight).zip(x) {
                                *lane += $widen(w) * x;
                            }
                        }
                        add_lanes(lanes)
                    })
                })
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2<const N: usize, const M: usize>(
                x: &[f32],
                weight: &[$element],
                ahead: &mut Ahead<'_>,
            ) -> [[f32; N]; M] {
                use std::arch::x86_64::{_mm256_fmadd_ps, _mm256_setzero_ps};

                let inputs = weight.len() / M;
                let blocks = inputs / LANES;
                let w_blocks: [&[[$element; LANES]]; M] = rows_of_blocks(weight, inputs);
                let x_blocks: [&[[f32; LANES]]; N] = rows_of_blocks(x, inputs);
                // Their addresses are not taken, or they would lie in memory.
                let mut lanes = [[_mm256_setzero_ps(); N]; M];
                for block in 0..blocks {
                    if N == GROUP {
                        ahead.fetch();
                    }
                    let mut w = [_mm256_setzero_ps(); M];
                    for m in 0..M {
                        w[m] = $load(&w_blocks[m][block]);
                        if N < GROUP {
                            // Then memory is waited for, and its rows are short.
                            fetch_nearest(w_blocks[m][block].as_ptr().wrapping_add(M * inputs));
                        }
                    }
                    for row in 0..N {
                        let x = load_f32(&x_blocks[row][block]);
                        for m in 0..M {
                            lanes[m][row] = _mm256_fmadd_ps(w[m], x, lanes[m][row]);
                        }
                    }
                }
                let done = blocks * LANES;
                if done < inputs {
                    // Zeros behind the ends of the rows add nothing.
                    for m in 0..M {
                        let mut w = [<$element>::default(); LANES];
                        w[..inputs - done]
                            .copy_from_slice(&weight[m * inputs + done..(m + 1) * inputs]);
                        let w = $load(&w);
                        for row in 0..N {
                            let mut rest = [0.0; LANES];
                            rest[..inputs - done]
                                .copy_from_slice(&x[row * inputs + done..(row + 1) * inputs]);
                            lanes[m][row] = _mm256_fmadd_ps(w, load_f32(&rest), lanes[m][row]);
                        }
                    }
                }
                let mut y = [[0.0; N]; M];
                for m in 0..M {
                    for row in 0..N {
                        y[m][row] = sum(lanes[m][row]);
                    }
                }
                y
            }
        }
    };
}

inner_products!(inner_products_f32, f32, load_f32, tile_f32, |w: f32| w);
inner_products!(inner_products_bf16, bf16, load_bf16, tile_bf16, |w: bf16| w.to_f32());

#[cfg(target_arch = "x86_64")]
use x86::{fetch_nearest, load_bf16, load_f32, sum};

/// The lanes of an inner product in a register.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256, _MM_HINT_T0, _mm_add_ps, _mm_cvtss_f32, _mm_loadu_si128, _mm_movehdup_ps,
        _mm_movehl_ps, _mm_prefetch, _mm256_castps256_ps128, _mm256_castsi256_ps,
        _mm256_cvtepu16_epi32, _mm256_extractf128_ps, _mm256_loadu_ps, _mm256_slli_epi32,
    };

    use half::bf16;

    use super::LANES;

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn load_f32(x: &[f32; LANES]) -> __m256 {
        // SAFETY: eight values are there.
        unsafe { _mm256_loadu_ps(x.as_ptr()) }
    }

    /// bf16 is the upper half of an f32.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn load_bf16(x: &[bf16; LANES]) -> __m256 {
        // SAFETY: eight values are there.
        let x = unsafe { _mm_loadu_si128(x.as_ptr().cast()) };
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(x)))
    }

    /// Fetches what will be read at once into the first-level cache, wherever it is.
    #[inline]
    pub(super) fn fetch_nearest<T>(place: *const T) {
        // SAFETY: a hint alone, which reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(place.cast()) };
    }

    /// As [`add_lanes`](super::add_lanes).
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn sum(lanes: __m256) -> f32 {
        let four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ps(two, _mm_movehdup_ps(two)))
    }
}
