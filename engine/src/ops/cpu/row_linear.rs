//! CPU form of [`crate::ops::row_linear`].
//!
//! A product of few rows reads W once from memory and computes each output as inner products of
//! its row with all rows of x. A row's sums do not depend on how many rows there are, so that an
//! answer has the same digits whatever is answered beside it.

#![expect(
    unsafe_code,
    reason = "the inner products are vector instructions, whose memory is that of slices of the \
              right length, and an `Isa` proves that the CPU has them"
)]

use burn::backend::Flex;
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use half::bf16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use std::ops::Range;

use super::gemm::{Elements, MatRef, Threads, product};
use super::isa::{Isa, Level, simd_kernels};
use super::math::add_lanes;
use super::step::{contiguous, dims, elements, from_values, values};
use crate::ops::row_linear::{RowUpdate, Rows};

/// Bytes of W that a task handles: these and the next ones lie in a second-level cache.
const BLOCK_BYTES: usize = 128 << 10;
/// Rows of W that a task handles are a multiple of this, so that whole tiles are.
const BLOCK_ROWS: usize = 12;
/// Below this many multiply-adds, handing work to other threads costs more than it saves.
const PARALLEL_MIN_MULTIPLY_ADDS: usize = 1 << 16;
/// Rows of x that are multiplied by rows of W at a time, at most.
const GROUP: usize = 4;
/// Partial sums of an inner product.
const LANES: usize = 8;

pub(in crate::ops) fn row_linear(
    x: Tensor<2>,
    weight: Tensor<2>,
    residual: Option<Tensor<2>>,
    rows: Rows,
    updates: &[(Range<usize>, &RowUpdate)],
) -> Tensor<2> {
    let (x, weight) = (on_flex(x), on_flex(weight));
    let ([n, inputs], [outputs, _]) = (dims(&x), dims(&weight));
    let x = values(&x);
    let mut y = times_transposed(x, elements(&weight), [n, inputs, outputs], rows);
    let mut tasks = Vec::with_capacity(updates.len());
    let (mut rest, mut end) = (y.as_mut_slice(), 0);
    for (range, update) in updates {
        let own = rest.split_off_mut(..(range.end - end) * outputs).expect("ranges in order");
        let own = &mut own[(range.start - end) * outputs..];
        tasks.push((&x[range.start * inputs..range.end * inputs], *update, own));
        end = range.end;
    }
    let add = |(x, update, y): (&[f32], &RowUpdate, &mut [f32])| {
        add_update(x, update, rows, y, [x.len() / inputs, inputs, outputs]);
    };
    match tasks.len() {
        0 | 1 => tasks.into_iter().for_each(add),
        _ => tasks.into_par_iter().for_each(add),
    }
    if let Some(residual) = residual {
        let residual = on_flex(residual);
        y.iter_mut().zip(values(&residual)).for_each(|(y, residual)| *y += residual);
    }
    Tensor::from_primitive::<Flex>(from_values(y, [n, outputs])).autodiff()
}

/// A tensor's values in order. There are no gradients here.
fn on_flex(x: Tensor<2>) -> FlexTensor {
    contiguous(x.inner().try_into_primitive::<Flex>().expect("a tensor on the CPU"))
}

/// The same tensor with its values in order in memory.
pub(in crate::ops) fn in_order(x: Tensor<2>) -> Tensor<2> {
    Tensor::from_primitive::<Flex>(on_flex(x)).autodiff()
}

/// Adds what an adapter gives for the rows `x` to their outputs `y`.
fn add_update(
    x: &[f32],
    update: &RowUpdate,
    rows: Rows,
    y: &mut [f32],
    [n, inputs, outputs]: [usize; 3],
) {
    let isa = Isa::detect();
    let [a, b] = [&update.a, &update.b].map(|x| on_flex(x.clone()));
    let gain = update.gain.clone().map(on_flex);
    let ([z_width, _], [rank, b_width]) = (dims(&a), dims(&b));
    let z = times_transposed(x, elements(&a), [n, inputs, z_width], rows);
    for (z_columns, b_columns, part) in update.parts() {
        let width = part.len();
        let u = match rows {
            Rows::Few => {
                let b: Vec<&[f32]> =
                    values(&b).chunks_exact(b_width).map(|b| &b[b_columns.clone()]).collect();
                let mut u = vec![0.0; n * width];
                for (z, u) in z.chunks_exact(z_width).zip(u.chunks_exact_mut(width)) {
                    sum_of_rows(isa, &z[z_columns.clone()], &b, u);
                }
                u
            }
            Rows::Many => {
                let z = MatRef::new(&z, n, z_width).columns(z_columns);
                let b = MatRef::new(values(&b), rank, b_width).columns(b_columns.clone());
                product(1.0, z, b, Threads::Shared)
            }
        };
        let gain = gain.as_ref().map(|gain| &values(gain)[b_columns]);
        for (y, u) in y.chunks_exact_mut(outputs).zip(u.chunks_exact(width)) {
            let y = &mut y[part.clone()];
            y.iter_mut().zip(u).for_each(|(y, u)| *y += update.scale * u);
            if let Some(gain) = gain {
                y.iter_mut().zip(gain).for_each(|(y, gain)| *y *= gain);
            }
        }
    }
}

simd_kernels! {
    /// u += Σᵢ zᵢ·bᵢ, in the order of i.
    fn sum_of_rows(z: &[f32], b: &[&[f32]], u: &mut [f32]) {
        for (z, b) in z.iter().zip(b) {
            for (u, b) in u.iter_mut().zip(*b) {
                *u = M::mul_add(*z, *b, *u);
            }
        }
    }
}

/// x·Wᵀ, of `n` rows, `inputs` and `outputs`.
fn times_transposed(
    x: &[f32],
    weight: Elements<'_>,
    [n, inputs, outputs]: [usize; 3],
    rows: Rows,
) -> Vec<f32> {
    match (rows, weight) {
        (Rows::Few, Elements::F32(weight)) => few_rows(x, weight, [n, inputs, outputs]),
        (Rows::Few, Elements::Bf16(weight)) => few_rows(x, weight, [n, inputs, outputs]),
        (Rows::Many, Elements::Bf16(weight)) => {
            // A product over bf16 would round x as well.
            let mut widened = vec![0.0; weight.len()];
            let block = block_rows::<f32>(inputs) * inputs;
            let blocks = widened.par_chunks_mut(block);
            blocks.zip(weight.par_chunks(block)).for_each(|(y, x)| x.convert_to_f32_slice(y));
            many_rows(x, Elements::F32(&widened), [n, inputs, outputs])
        }
        (_, weight) => many_rows(x, weight, [n, inputs, outputs]),
    }
}

fn many_rows(x: &[f32], weight: Elements<'_>, [n, inputs, outputs]: [usize; 3]) -> Vec<f32> {
    let weight = MatRef::of(weight, outputs, inputs);
    product(1.0, MatRef::new(x, n, inputs), weight.t(), Threads::Shared)
}

/// Rows of W, of `inputs` elements, that a task handles.
fn block_rows<W>(inputs: usize) -> usize {
    let rows = BLOCK_BYTES / (inputs * size_of::<W>()).max(1);
    (rows / BLOCK_ROWS).clamp(1, 64) * BLOCK_ROWS
}

fn few_rows<W: Element>(x: &[f32], weight: &[W], [n, inputs, outputs]: [usize; 3]) -> Vec<f32> {
    let isa = Isa::detect();
    let mut y = vec![0.0; n * outputs];
    let block = block_rows::<W>(inputs);
    // Block by block, what of each row of y it gives.
    let mut rest: Vec<&mut [f32]> = y.chunks_exact_mut(outputs).collect();
    let mut parts = Vec::with_capacity(outputs.div_ceil(block) * n);
    for start in (0..outputs).step_by(block) {
        let width = block.min(outputs - start);
        parts.extend(rest.iter_mut().map(|row| row.split_off_mut(..width).expect("its outputs")));
    }
    let task = |(y, weight): (&mut [&mut [f32]], &[W])| {
        W::inner_products(isa, x, weight, inputs, y);
    };
    if n * inputs * outputs < PARALLEL_MIN_MULTIPLY_ADDS {
        parts.chunks_mut(n).zip(weight.chunks(block * inputs)).for_each(task);
    } else {
        parts.par_chunks_mut(n).zip(weight.par_chunks(block * inputs)).for_each(task);
    }
    y
}

/// A weight's element.
trait Element: Copy + Sync {
    /// `y`, a slice for each row of `x`: the row times all rows of `weight`.
    fn inner_products(isa: Isa, x: &[f32], weight: &[Self], inputs: usize, y: &mut [&mut [f32]]);
}

impl Element for f32 {
    fn inner_products(isa: Isa, x: &[f32], weight: &[f32], inputs: usize, y: &mut [&mut [f32]]) {
        inner_products_f32(isa, x, weight, inputs, y, Next::behind(weight));
    }
}

impl Element for bf16 {
    fn inner_products(isa: Isa, x: &[f32], weight: &[bf16], inputs: usize, y: &mut [&mut [f32]]) {
        let next = Next::behind(weight);
        if y.len() <= GROUP {
            return inner_products_bf16(isa, x, weight, inputs, y, next);
        }
        // Widened once for all groups.
        let mut widened = vec![0.0; weight.len()];
        weight.convert_to_f32_slice(&mut widened);
        inner_products_f32(isa, x, &widened, inputs, y, next);
    }
}

/// Memory that will be read next: it is fetched while there is enough to compute with what is here.
#[derive(Clone, Copy)]
struct Next {
    start: *const u8,
    bytes: usize,
}

impl Next {
    /// As much as `weight` is, behind it: mostly the block that the thread takes next.
    fn behind<W>(weight: &[W]) -> Self {
        Self { start: weight.as_ptr_range().end.cast(), bytes: size_of_val(weight) }
    }

    /// Part `index` of `count`.
    fn part(self, index: usize, count: usize) -> Self {
        let bytes = self.bytes / count.max(1);
        Self { start: self.start.wrapping_add(index * bytes), bytes }
    }
}

/// Defines the inner products of rows of `$element` with rows of f32, which are `inputs` long. Each
/// sum is made in the same order, however many rows of x there are.
macro_rules! inner_products {
    ($name:ident, $element:ty, $load:ident, $widen:expr) => {
        fn $name(
            isa: Isa,
            x: &[f32],
            weight: &[$element],
            inputs: usize,
            mut y: &mut [&mut [f32]],
            next: Next,
        ) {
            assert_eq!(x.len(), y.len() * inputs, "a row of y for each row of x");
            let groups = y.len() / GROUP;
            // Group by group: its rows stay in the nearest cache, those of W in the next one.
            let mut first = 0;
            while !y.is_empty() {
                let next = next.part(first / GROUP, groups);
                let x = &x[first * inputs..];
                // So many products at a time as there are registers for their sums.
                let rows = match y.len() {
                    GROUP.. => group::<GROUP, 3>(isa, x, weight, inputs, y, next),
                    2.. => group::<2, 4>(isa, x, weight, inputs, y, next),
                    _ => group::<1, 4>(isa, x, weight, inputs, y, next),
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
                next: Next,
            ) -> usize {
                let (x, tiles) = (&x[..N * inputs], weight.chunks_exact(M * inputs));
                let rest = tiles.remainder().chunks_exact(inputs);
                let count = tiles.len();
                let mut output = 0;
                for (index, weight) in tiles.enumerate() {
                    for products in tile::<N, M>(isa, x, weight, next.part(index, count)) {
                        for (y, product) in y.iter_mut().zip(products) {
                            y[output] = product;
                        }
                        output += 1;
                    }
                }
                for weight in rest {
                    let [products] = tile::<N, 1>(isa, x, weight, next.part(0, count));
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
                next: Next,
            ) -> [[f32; N]; M] {
                match isa.level() {
                    // SAFETY: an `Isa` of these levels is made only where the CPU has AVX2 and FMA.
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx512 | Level::Avx2 => unsafe { avx2(x, weight, next) },
                    Level::Portable => portable(x, weight),
                }
            }

            fn portable<const N: usize, const M: usize>(
                x: &[f32],
                weight: &[$element],
            ) -> [[f32; N]; M] {
                let inputs = weight.len() / M;
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
                next: Next,
            ) -> [[f32; N]; M] {
                use std::arch::x86_64::{_mm256_fmadd_ps, _mm256_setzero_ps};

                let inputs = weight.len() / M;
                let blocks = inputs / LANES;
                let mut w_blocks: [&[[$element; LANES]]; M] = [&[]; M];
                for (m, w_blocks) in w_blocks.iter_mut().enumerate() {
                    *w_blocks = &weight[m * inputs..][..inputs].as_chunks().0[..blocks];
                }
                let mut x_blocks: [&[[f32; LANES]]; N] = [&[]; N];
                for (row, x_blocks) in x_blocks.iter_mut().enumerate() {
                    *x_blocks = &x[row * inputs..][..inputs].as_chunks().0[..blocks];
                }
                // Their addresses are not taken, or they would lie in memory.
                let mut lanes = [[_mm256_setzero_ps(); N]; M];
                let step = next.bytes / blocks.max(1);
                for block in 0..blocks {
                    if N == GROUP {
                        fetch_near(next.start.wrapping_add(block * step));
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

inner_products!(inner_products_f32, f32, load_f32, |w: f32| w);
inner_products!(inner_products_bf16, bf16, load_bf16, |w: bf16| w.to_f32());

#[cfg(target_arch = "x86_64")]
use x86::{fetch_near, fetch_nearest, load_bf16, load_f32, sum};

/// The lanes of an inner product in a register.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256, _MM_HINT_T0, _MM_HINT_T1, _mm_add_ps, _mm_cvtss_f32, _mm_loadu_si128,
        _mm_movehdup_ps, _mm_movehl_ps, _mm_prefetch, _mm256_castps256_ps128, _mm256_castsi256_ps,
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

    /// Fetches what will be read soon into the second-level cache.
    #[inline]
    pub(super) fn fetch_near<T>(place: *const T) {
        // SAFETY: as above.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(place.cast()) };
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

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(n: usize, speed: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * speed).sin()).collect()
    }

    #[test]
    fn products_of_few_rows_have_the_values_of_f64_on_every_path() {
        for inputs in [1, 7, 8, 15, 16, 50] {
            let (n, outputs) = (7, 11);
            let (x, weight) = (wave(n * inputs, 0.7), wave(outputs * inputs, 0.4));
            let halves: Vec<bf16> = weight.iter().map(|&w| bf16::from_f32(w)).collect();
            for isa in Isa::available() {
                let (mut y, mut y_of_halves) = (vec![0.0; n * outputs], vec![0.0; n * outputs]);
                let mut rows: Vec<&mut [f32]> = y.chunks_mut(outputs).collect();
                inner_products_f32(isa, &x, &weight, inputs, &mut rows, Next::behind(&weight));
                let mut rows: Vec<&mut [f32]> = y_of_halves.chunks_mut(outputs).collect();
                let next = Next::behind(&halves);
                inner_products_bf16(isa, &x, &halves, inputs, &mut rows, next);
                for (index, (y, of_halves)) in y.iter().zip(&y_of_halves).enumerate() {
                    let (row, output) = (index / outputs, index % outputs);
                    let x = &x[row * inputs..(row + 1) * inputs];
                    let exact = |weight: &dyn Fn(usize) -> f32| -> f64 {
                        let weights = (output * inputs..(output + 1) * inputs).map(weight);
                        x.iter().zip(weights).map(|(&x, w)| f64::from(x) * f64::from(w)).sum()
                    };
                    assert!((f64::from(*y) - exact(&|i| weight[i])).abs() < 1e-5, "{isa:?}");
                    let expected = exact(&|i| halves[i].to_f32());
                    assert!((f64::from(*of_halves) - expected).abs() < 1e-5, "{isa:?}");
                }
            }
        }
    }

    #[test]
    fn row_has_the_same_bits_alone_and_among_others() {
        let (n, inputs, outputs) = (11, 300, 400);
        let (x, weight) = (wave(n * inputs, 0.7), wave(outputs * inputs, 0.4));
        let together = few_rows(&x, &weight, [n, inputs, outputs]);
        for row in 0..n {
            let alone = few_rows(&x[row * inputs..][..inputs], &weight, [1, inputs, outputs]);
            assert_eq!(alone, together[row * outputs..][..outputs], "row {row}");
        }
    }
}
