//! The leaves for AVX-512: tiles of 14 x 32, which are 28 of the 32 registers, and of up to 16 x 16
//! where B is kept in panels.
//!
//! With AVX512-BF16 one instruction multiplies the pairs of 16 lanes and adds them to 16 sums; else
//! lanes are f32. What is not an instruction of [`Instructions`] is the same code in the tests,
//! where a model of these runs on any machine.

use half::bf16;

use super::instructions::{Instructions, Native};
use super::leaf::{Dots, Kernel, Lane, Leaf};
use super::pack::{PackJob, PackVector, pack, round_to_bf16};
use super::panel_leaf::{Widen, panel_leaf};
use super::tile::{TileVector, kernels};

const LANES: usize = 16;

/// Lanes of one f32; packing rounds to bf16 when `ROUNDS`.
#[derive(Clone, Copy)]
pub(super) struct Single<I, const ROUNDS: bool>(core::marker::PhantomData<I>);

/// Lanes of a pair of bf16.
#[derive(Clone, Copy)]
pub(super) struct Pair<I>(core::marker::PhantomData<I>);

/// The methods in which a lane's content makes no difference.
macro_rules! common_tile_methods {
    () => {
        const LANES: usize = LANES;
        const STEPS: usize = 1;
        const ROWS_PER_POINTER: usize = usize::MAX;
        type Sums = I::V;
        type Lanes = I::V;

        #[inline(always)]
        unsafe fn zero() -> I::V {
            // SAFETY: as the caller promises, here and below: the CPU has the instructions, and
            // pointers are valid for what is read or written.
            unsafe { I::setzero() }
        }

        #[inline(always)]
        unsafe fn splat(lane: *const Lane) -> I::V {
            // SAFETY: as above.
            unsafe { I::set1_epi32(lane) }
        }

        #[inline(always)]
        unsafe fn load(lanes: *const Lane) -> I::V {
            // SAFETY: as above.
            unsafe { I::loadu(lanes.cast()) }
        }

        #[inline(always)]
        unsafe fn load_sums(values: *const f32) -> I::V {
            // SAFETY: as above.
            unsafe { I::loadu(values.cast()) }
        }

        #[inline(always)]
        unsafe fn store_sums(values: *mut f32, sums: I::V) {
            // SAFETY: as above.
            unsafe { I::storeu(values.cast(), sums) }
        }

        #[inline(always)]
        unsafe fn scale(alpha: f32, sums: I::V) -> I::V {
            // SAFETY: as above.
            unsafe { I::mul_ps(I::set1_epi32((&raw const alpha).cast()), sums) }
        }

        #[inline(always)]
        unsafe fn scale_add(alpha: f32, sums: I::V, base: I::V) -> I::V {
            // SAFETY: as above.
            unsafe { I::fmadd_ps(I::set1_epi32((&raw const alpha).cast()), sums, base) }
        }

        #[inline(always)]
        unsafe fn prefetch(address: *const u8) {
            I::prefetch(address);
        }

        #[inline(always)]
        unsafe fn prefetch_second_level(address: *const u8) {
            I::prefetch_second_level(address);
        }
    };
}

macro_rules! common_pack_methods {
    () => {
        type V = I::V;

        #[inline(always)]
        unsafe fn zero() -> I::V {
            // SAFETY: as above.
            unsafe { I::setzero() }
        }

        #[inline(always)]
        unsafe fn transpose(rows: [I::V; LANES]) -> [I::V; LANES] {
            // SAFETY: as above.
            unsafe { transpose::<I>(rows) }
        }

        #[inline(always)]
        unsafe fn store(lanes: *mut Lane, vector: I::V) {
            // SAFETY: as above.
            unsafe { I::storeu(lanes.cast(), vector) }
        }

        #[inline(always)]
        unsafe fn prefetch_second_level(address: *const u8) {
            I::prefetch_second_level(address);
        }
    };
}

impl<I: Instructions> TileVector for Single<I, false> {
    common_tile_methods!();

    #[inline(always)]
    unsafe fn multiply_add(sums: I::V, a: I::V, b: I::V) -> I::V {
        // SAFETY: as above.
        unsafe { I::fmadd_ps(a, b, sums) }
    }
}

impl<I: Instructions> Widen for Single<I, false> {
    #[inline(always)]
    unsafe fn widened(values: *const bf16) -> I::V {
        // SAFETY: as above.
        unsafe { Self::along_bf16(values, LANES) }
    }
}

impl<I: Instructions> TileVector for Pair<I> {
    common_tile_methods!();

    #[inline(always)]
    unsafe fn multiply_add(sums: I::V, a: I::V, b: I::V) -> I::V {
        // SAFETY: as above.
        unsafe { I::dpbf16_ps(sums, a, b) }
    }
}

impl<I: Instructions, const ROUNDS: bool> PackVector<LANES> for Single<I, ROUNDS> {
    const DEPTH: usize = 1;
    common_pack_methods!();

    #[inline(always)]
    unsafe fn along_f32(elements: *const f32, count: usize) -> I::V {
        // SAFETY: as above; a masked load touches only the lanes of its mask.
        unsafe {
            let vector = if count == LANES {
                I::loadu(elements.cast())
            } else {
                I::maskz_loadu_epi32(low_bits(count) as u16, elements.cast())
            };
            if ROUNDS { I::from_array(I::to_array(vector).map(round_to_bf16)) } else { vector }
        }
    }

    #[inline(always)]
    unsafe fn along_bf16(elements: *const bf16, count: usize) -> I::V {
        // SAFETY: as above. An element becomes the low half of its lane, then the high one.
        unsafe {
            let words = I::maskz_loadu_epi16_half(low_bits(count) as u16, elements.cast());
            I::slli_epi32_16(I::cvtepu16_epi32(words))
        }
    }

    #[inline(always)]
    unsafe fn across_f32(first: *const f32, _: *const f32, count: usize) -> I::V {
        // SAFETY: as the caller promises.
        unsafe { Self::along_f32(first, count) }
    }

    #[inline(always)]
    unsafe fn across_bf16(first: *const bf16, _: *const bf16, count: usize) -> I::V {
        // SAFETY: as the caller promises.
        unsafe { Self::along_bf16(first, count) }
    }
}

impl<I: Instructions> PackVector<LANES> for Pair<I> {
    const DEPTH: usize = 2;
    common_pack_methods!();

    #[inline(always)]
    unsafe fn along_f32(elements: *const f32, count: usize) -> I::V {
        // SAFETY: as above.
        unsafe {
            let (low, high) = if count == 2 * LANES {
                (I::loadu(elements.cast()), I::loadu(elements.add(LANES).cast()))
            } else {
                let mask = low_bits(count);
                let behind = elements.wrapping_add(LANES);
                (
                    I::maskz_loadu_epi32(mask as u16, elements.cast()),
                    I::maskz_loadu_epi32((mask >> 16) as u16, behind.cast()),
                )
            };
            I::cvtne2ps_pbh(high, low)
        }
    }

    #[inline(always)]
    unsafe fn along_bf16(elements: *const bf16, count: usize) -> I::V {
        // SAFETY: as above.
        unsafe {
            if count == 2 * LANES {
                I::loadu(elements.cast())
            } else {
                I::maskz_loadu_epi16(low_bits(count), elements.cast())
            }
        }
    }

    #[inline(always)]
    unsafe fn across_f32(first: *const f32, second: *const f32, count: usize) -> I::V {
        let mask = low_bits(count) as u16;
        // SAFETY: as above.
        unsafe {
            let low = I::maskz_loadu_epi32(mask, first.cast());
            let high = if second.is_null() {
                I::setzero()
            } else {
                I::maskz_loadu_epi32(mask, second.cast())
            };
            interleave_halves::<I>(I::cvtne2ps_pbh(high, low))
        }
    }

    #[inline(always)]
    unsafe fn across_bf16(first: *const bf16, second: *const bf16, count: usize) -> I::V {
        let mask = low_bits(count) as u16;
        // SAFETY: as above.
        unsafe {
            let low = I::maskz_loadu_epi16_half(mask, first.cast());
            let high = if second.is_null() {
                I::setzero()
            } else {
                I::maskz_loadu_epi16_half(mask, second.cast())
            };
            interleave_halves::<I>(I::inserti64x4_high(low, high))
        }
    }
}

/// A mask of the lowest `count` bits, `count` at most 32.
#[inline(always)]
fn low_bits(count: usize) -> u32 {
    ((1u64 << count) - 1) as u32
}

/// Words 0 to 15 are one row and words 16 to 31 the next: makes pairs of them.
#[inline(always)]
unsafe fn interleave_halves<I: Instructions>(words: I::V) -> I::V {
    const ORDER: [u32; LANES] = {
        let mut order = [0; LANES];
        let mut i = 0;
        while i < LANES {
            order[i] = i as u32 | (16 + i as u32) << 16;
            i += 1;
        }
        order
    };
    // SAFETY: as the caller promises.
    unsafe { I::permutexvar_epi16(I::from_array(ORDER), words) }
}

/// Transposes 16 x 16 lanes.
#[inline(always)]
unsafe fn transpose<I: Instructions>(r: [I::V; LANES]) -> [I::V; LANES] {
    // SAFETY: as the caller promises.
    unsafe {
        let (mut t, mut u) = ([I::setzero(); LANES], [I::setzero(); LANES]);
        for i in 0..8 {
            t[2 * i] = I::unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = I::unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        // u[4i + c] holds in its quarter q column 4q + c of rows 4i to 4i + 3.
        for i in 0..4 {
            u[4 * i] = I::unpacklo_epi64(t[4 * i], t[4 * i + 2]);
            u[4 * i + 1] = I::unpackhi_epi64(t[4 * i], t[4 * i + 2]);
            u[4 * i + 2] = I::unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
            u[4 * i + 3] = I::unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
        }
        // Then 4 x 4 quarters are transposed, for each c: even quarters of two vectors side by
        // side, and odd ones.
        for c in 0..4 {
            let even = I::shuffle_i32x4_even(u[c], u[4 + c]);
            let odd = I::shuffle_i32x4_odd(u[c], u[4 + c]);
            let even_below = I::shuffle_i32x4_even(u[8 + c], u[12 + c]);
            let odd_below = I::shuffle_i32x4_odd(u[8 + c], u[12 + c]);
            t[c] = I::shuffle_i32x4_even(even, even_below);
            t[8 + c] = I::shuffle_i32x4_odd(even, even_below);
            t[4 + c] = I::shuffle_i32x4_even(odd, odd_below);
            t[12 + c] = I::shuffle_i32x4_odd(odd, odd_below);
        }
        t
    }
}

kernels! {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    single: Single<Native, false>, 2 vectors: 1 2 3 4 5 6 7 8 9 10 11 12 13 14
}

kernels! {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    pair: Pair<Native>, 2 vectors: 1 2 3 4 5 6 7 8 9 10 11 12 13 14
}

panel_leaf! {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    pub(super) PANELS: Single<Native, false>, 1 vectors, pack_single::<false>,
    rows: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn pack_single<const ROUNDS: bool>(job: &PackJob) {
    // SAFETY: as the caller promises.
    unsafe { pack::<Single<Native, ROUNDS>, LANES>(job) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn pack_pair(job: &PackJob) {
    // SAFETY: as the caller promises.
    unsafe { pack::<Pair<Native>, LANES>(job) }
}

/// A leaf with this file's tile.
const fn leaf(
    depth: usize,
    rounds: bool,
    [packed, direct]: [&'static [Kernel]; 2],
    dots: Dots,
    pack: unsafe fn(&PackJob),
) -> Leaf {
    Leaf {
        depth,
        rows: 14,
        columns: 2 * LANES,
        // Whole vectors to a step: stores that cross cache lines are slow.
        a_stride: LANES,
        rounds,
        steps: 384,
        packed,
        direct,
        dots,
        pack,
    }
}

/// The operands as they are.
pub(super) static FP32: Leaf =
    leaf(1, false, [single::PACKED, single::DIRECT], single::DOTS, pack_single::<false>);
/// Rounded to bf16 while they are packed, for CPUs that cannot multiply bf16.
pub(super) static ROUNDED: Leaf =
    leaf(1, true, [single::PACKED, single::DIRECT], single::DOTS, pack_single::<true>);
/// Pairs of bf16.
pub(super) static BF16: Leaf = leaf(2, true, [pair::PACKED, pair::DIRECT], pair::DOTS, pack_pair);

/// The same leaves on a model of the instructions, for any machine.
#[cfg(test)]
pub(super) mod modelled {
    use super::super::instructions_model::Model;
    use super::*;

    kernels! { single: Single<Model, false>, 2 vectors: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 }
    kernels! { pair: Pair<Model>, 2 vectors: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 }
    panel_leaf! {
        pub(in super::super) PANELS: Single<Model, false>, 1 vectors, pack_single::<false>,
        rows: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16
    }

    unsafe fn pack_single<const ROUNDS: bool>(job: &PackJob) {
        // SAFETY: as the caller promises.
        unsafe { pack::<Single<Model, ROUNDS>, LANES>(job) }
    }

    unsafe fn pack_pair(job: &PackJob) {
        // SAFETY: as the caller promises.
        unsafe { pack::<Pair<Model>, LANES>(job) }
    }

    pub(in super::super) static FP32: Leaf =
        leaf(1, false, [single::PACKED, single::DIRECT], single::DOTS, pack_single::<false>);
    pub(in super::super) static ROUNDED: Leaf =
        leaf(1, true, [single::PACKED, single::DIRECT], single::DOTS, pack_single::<true>);
    pub(in super::super) static BF16: Leaf =
        leaf(2, true, [pair::PACKED, pair::DIRECT], pair::DOTS, pack_pair);
}
