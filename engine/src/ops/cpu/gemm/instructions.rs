//! The AVX-512 instructions that tiles and packing are made of.
//!
//! They stand behind a trait so that the tests can run the same code on a model of them. A vector
//! is 512 bits whatever they mean: 16 f32, 16 lanes, 32 bf16.

use core::arch::x86_64::*;

use super::tile::Unaligned;

/// Named after Intel's intrinsics. `_half` reads 256 bits, and leaves the others undefined.
///
/// Safety of all methods: the CPU has AVX-512 F, BW and VL, and BF16 for the two methods that
/// compute with it; pointers are valid for what is read or written, in any alignment.
pub(super) trait Instructions: Copy {
    type V: Copy;
    unsafe fn setzero() -> Self::V;
    unsafe fn set1_epi32(lane: *const u32) -> Self::V;
    unsafe fn loadu(bytes: *const u8) -> Self::V;
    unsafe fn storeu(bytes: *mut u8, v: Self::V);
    /// Reads only the lanes of the mask; the others are 0.
    unsafe fn maskz_loadu_epi32(mask: u16, lanes: *const u32) -> Self::V;
    unsafe fn maskz_loadu_epi16(mask: u32, words: *const u16) -> Self::V;
    unsafe fn maskz_loadu_epi16_half(mask: u16, words: *const u16) -> Self::V;
    /// The low 256 bits of `low`, and those of `high` above them.
    unsafe fn inserti64x4_high(low: Self::V, high: Self::V) -> Self::V;
    /// The low 16 words, each made a lane.
    unsafe fn cvtepu16_epi32(v: Self::V) -> Self::V;
    /// Each lane shifted left by 16 bits.
    unsafe fn slli_epi32_16(v: Self::V) -> Self::V;
    /// f32 to bf16: the first argument goes into the high 16 words.
    unsafe fn cvtne2ps_pbh(high: Self::V, low: Self::V) -> Self::V;
    /// sums + a·b over the pairs of bf16 in each lane.
    unsafe fn dpbf16_ps(sums: Self::V, a: Self::V, b: Self::V) -> Self::V;
    unsafe fn fmadd_ps(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn mul_ps(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn permutexvar_epi16(order: Self::V, v: Self::V) -> Self::V;
    unsafe fn unpacklo_epi32(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn unpackhi_epi32(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn unpacklo_epi64(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn unpackhi_epi64(a: Self::V, b: Self::V) -> Self::V;
    /// Quarters 0 and 2 of `a`, then of `b`: `shuffle_i32x4` with 0x88.
    unsafe fn shuffle_i32x4_even(a: Self::V, b: Self::V) -> Self::V;
    /// Quarters 1 and 3 of `a`, then of `b`: `shuffle_i32x4` with 0xdd.
    unsafe fn shuffle_i32x4_odd(a: Self::V, b: Self::V) -> Self::V;
    fn prefetch(address: *const u8);
    fn prefetch_second_level(address: *const u8);
    fn from_array(lanes: [u32; 16]) -> Self::V;
    fn to_array(v: Self::V) -> [u32; 16];
}

/// The instructions themselves.
#[derive(Clone, Copy)]
pub(super) struct Native;

/// Methods that are one intrinsic on vectors of integers.
macro_rules! intrinsics {
    ($($name:ident($($argument:ident),*) = $intrinsic:path;)*) => {$(
        #[inline(always)]
        unsafe fn $name($($argument: __m512i),*) -> __m512i {
            // SAFETY: as the caller promises.
            unsafe { $intrinsic($($argument),*) }
        }
    )*};
}

impl Instructions for Native {
    type V = __m512i;

    intrinsics! {
        setzero() = _mm512_setzero_si512;
        permutexvar_epi16(order, v) = _mm512_permutexvar_epi16;
        unpacklo_epi32(a, b) = _mm512_unpacklo_epi32;
        unpackhi_epi32(a, b) = _mm512_unpackhi_epi32;
        unpacklo_epi64(a, b) = _mm512_unpacklo_epi64;
        unpackhi_epi64(a, b) = _mm512_unpackhi_epi64;
        shuffle_i32x4_even(a, b) = _mm512_shuffle_i32x4::<0x88>;
        shuffle_i32x4_odd(a, b) = _mm512_shuffle_i32x4::<0xdd>;
        slli_epi32_16(v) = _mm512_slli_epi32::<16>;
    }

    #[inline(always)]
    unsafe fn set1_epi32(lane: *const u32) -> __m512i {
        // SAFETY: as the caller promises, here and below.
        unsafe { _mm512_set1_epi32((*lane.cast::<Unaligned<i32>>()).0) }
    }

    #[inline(always)]
    unsafe fn loadu(bytes: *const u8) -> __m512i {
        // SAFETY: as above.
        unsafe { (*bytes.cast::<Unaligned<__m512i>>()).0 }
    }

    #[inline(always)]
    unsafe fn storeu(bytes: *mut u8, v: __m512i) {
        // SAFETY: as above.
        unsafe { *bytes.cast::<Unaligned<__m512i>>() = Unaligned(v) }
    }

    #[inline(always)]
    unsafe fn maskz_loadu_epi32(mask: u16, lanes: *const u32) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_maskz_loadu_epi32(mask, lanes.cast()) }
    }

    #[inline(always)]
    unsafe fn maskz_loadu_epi16(mask: u32, words: *const u16) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_maskz_loadu_epi16(mask, words.cast()) }
    }

    #[inline(always)]
    unsafe fn maskz_loadu_epi16_half(mask: u16, words: *const u16) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(mask, words.cast())) }
    }

    #[inline(always)]
    unsafe fn inserti64x4_high(low: __m512i, high: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_inserti64x4::<1>(low, _mm512_castsi512_si256(high)) }
    }

    #[inline(always)]
    unsafe fn cvtepu16_epi32(v: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_cvtepu16_epi32(_mm512_castsi512_si256(v)) }
    }

    #[inline(always)]
    unsafe fn cvtne2ps_pbh(high: __m512i, low: __m512i) -> __m512i {
        // SAFETY: as above; vectors of one size, of which every bit pattern is valid.
        unsafe {
            let (high, low) = (_mm512_castsi512_ps(high), _mm512_castsi512_ps(low));
            core::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
        }
    }

    #[inline(always)]
    unsafe fn dpbf16_ps(sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: as above; vectors of one size, of which every bit pattern is valid.
        unsafe {
            let (a, b) = (
                core::mem::transmute::<__m512i, __m512bh>(a),
                core::mem::transmute::<__m512i, __m512bh>(b),
            );
            _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sums), a, b))
        }
    }

    #[inline(always)]
    unsafe fn fmadd_ps(a: __m512i, b: __m512i, c: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe {
            let (a, b) = (_mm512_castsi512_ps(a), _mm512_castsi512_ps(b));
            _mm512_castps_si512(_mm512_fmadd_ps(a, b, _mm512_castsi512_ps(c)))
        }
    }

    #[inline(always)]
    unsafe fn mul_ps(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe {
            let (a, b) = (_mm512_castsi512_ps(a), _mm512_castsi512_ps(b));
            _mm512_castps_si512(_mm512_mul_ps(a, b))
        }
    }

    #[inline(always)]
    fn prefetch(address: *const u8) {
        // SAFETY: a prefetch of any address is harmless; every x86-64 CPU has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }

    #[inline(always)]
    fn prefetch_second_level(address: *const u8) {
        // SAFETY: as above.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
    }

    #[inline(always)]
    fn from_array(lanes: [u32; 16]) -> __m512i {
        // SAFETY: both are 64 bytes of any value.
        unsafe { core::mem::transmute(lanes) }
    }

    #[inline(always)]
    fn to_array(v: __m512i) -> [u32; 16] {
        // SAFETY: both are 64 bytes of any value.
        unsafe { core::mem::transmute(v) }
    }
}
