//! The leaf for AVX2 with FMA: tiles of 6 x 16, which are 12 of the 16 registers.

use core::arch::x86_64::*;

use half::bf16;

use super::leaf::{Lane, Leaf};
use super::pack::{PackJob, PackVector, pack, round_to_bf16};
use super::panel_leaf::{Widen, panel_leaf};
use super::tile::{TileVector, Unaligned, kernels};

const LANES: usize = 8;

/// Vectors of 256 bits; packing rounds to bf16 when `ROUNDS`.
#[derive(Clone, Copy)]
struct Avx2<const ROUNDS: bool>;

impl TileVector for Avx2<false> {
    const LANES: usize = LANES;
    const STEPS: usize = 4;
    const ROWS_PER_POINTER: usize = 3;
    type Sums = __m256;
    type Lanes = __m256;

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: as the caller promises, here and below: the CPU has AVX2, and pointers are valid
        // for what is read or written.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn splat(lane: *const Lane) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_set1_ps((*lane.cast::<Unaligned<f32>>()).0) }
    }

    #[inline(always)]
    unsafe fn load(lanes: *const Lane) -> __m256 {
        // SAFETY: as above.
        unsafe { (*lanes.cast::<Unaligned<__m256>>()).0 }
    }

    #[inline(always)]
    unsafe fn multiply_add(sums: __m256, a: __m256, b: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_fmadd_ps(a, b, sums) }
    }

    #[inline(always)]
    unsafe fn load_sums(values: *const f32) -> __m256 {
        // SAFETY: as above.
        unsafe { (*values.cast::<Unaligned<__m256>>()).0 }
    }

    #[inline(always)]
    unsafe fn store_sums(values: *mut f32, sums: __m256) {
        // SAFETY: as above.
        unsafe { *values.cast::<Unaligned<__m256>>() = Unaligned(sums) }
    }

    #[inline(always)]
    unsafe fn scale(alpha: f32, sums: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_mul_ps(_mm256_set1_ps(alpha), sums) }
    }

    #[inline(always)]
    unsafe fn scale_add(alpha: f32, sums: __m256, base: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_fmadd_ps(_mm256_set1_ps(alpha), sums, base) }
    }

    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }

    #[inline(always)]
    unsafe fn prefetch_second_level(address: *const u8) {
        // SAFETY: as above.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
    }
}

impl Widen for Avx2<false> {
    #[inline(always)]
    unsafe fn widened(values: *const bf16) -> __m256 {
        // SAFETY: as above.
        unsafe { Self::along_bf16(values, LANES) }
    }
}

impl<const ROUNDS: bool> PackVector<LANES> for Avx2<ROUNDS> {
    const DEPTH: usize = 1;
    type V = __m256;

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn along_f32(elements: *const f32, count: usize) -> __m256 {
        // SAFETY: as above; a masked load touches only the lanes of its mask.
        let bits = unsafe {
            if count == LANES {
                (*elements.cast::<Unaligned<__m256>>()).0
            } else {
                let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
                let mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), lane);
                _mm256_maskload_ps(elements, mask)
            }
        };
        if ROUNDS { from_bits(to_bits(bits).map(round_to_bf16)) } else { bits }
    }

    #[inline(always)]
    unsafe fn along_bf16(elements: *const bf16, count: usize) -> __m256 {
        let mut values = [0u16; LANES];
        // SAFETY: as above.
        unsafe {
            if count == LANES {
                values = elements.cast::<[u16; LANES]>().read_unaligned();
            } else {
                core::ptr::copy_nonoverlapping(elements.cast(), values.as_mut_ptr(), count);
            }
        }
        from_bits(values.map(|bits| u32::from(bits) << 16))
    }

    #[inline(always)]
    unsafe fn across_f32(first: *const f32, _: *const f32, count: usize) -> __m256 {
        // SAFETY: as the caller promises.
        unsafe { Self::along_f32(first, count) }
    }

    #[inline(always)]
    unsafe fn across_bf16(first: *const bf16, _: *const bf16, count: usize) -> __m256 {
        // SAFETY: as the caller promises.
        unsafe { Self::along_bf16(first, count) }
    }

    #[inline(always)]
    unsafe fn transpose(r: [__m256; LANES]) -> [__m256; LANES] {
        // SAFETY: as above.
        unsafe {
            let zero = _mm256_setzero_ps();
            let (mut t, mut u) = ([zero; LANES], [zero; LANES]);
            for i in 0..4 {
                t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            // In each half: column c of rows 4i to 4i + 3, for c 0 to 3.
            for i in 0..2 {
                u[4 * i] = _mm256_shuffle_ps::<0x44>(t[4 * i], t[4 * i + 2]);
                u[4 * i + 1] = _mm256_shuffle_ps::<0xee>(t[4 * i], t[4 * i + 2]);
                u[4 * i + 2] = _mm256_shuffle_ps::<0x44>(t[4 * i + 1], t[4 * i + 3]);
                u[4 * i + 3] = _mm256_shuffle_ps::<0xee>(t[4 * i + 1], t[4 * i + 3]);
            }
            for c in 0..4 {
                t[c] = _mm256_permute2f128_ps::<0x20>(u[c], u[4 + c]);
                t[4 + c] = _mm256_permute2f128_ps::<0x31>(u[c], u[4 + c]);
            }
            t
        }
    }

    #[inline(always)]
    unsafe fn store(lanes: *mut Lane, vector: __m256) {
        // SAFETY: as above.
        unsafe { *lanes.cast::<Unaligned<__m256>>() = Unaligned(vector) }
    }

    #[inline(always)]
    unsafe fn prefetch_second_level(address: *const u8) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
    }
}

#[inline(always)]
fn to_bits(vector: __m256) -> [u32; LANES] {
    // SAFETY: both are 32 bytes of any value.
    unsafe { core::mem::transmute(vector) }
}

#[inline(always)]
fn from_bits(bits: [u32; LANES]) -> __m256 {
    // SAFETY: both are 32 bytes of any value.
    unsafe { core::mem::transmute(bits) }
}

kernels! {
    #[target_feature(enable = "avx2,fma")]
    kernels: Avx2<false>, 2 vectors: 1 2 3 4 5 6
}

panel_leaf! {
    #[target_feature(enable = "avx2,fma")]
    pub(super) PANELS: Avx2<false>, 2 vectors, pack_panels::<false>, rows: 1 2 3 4 5 6
}

#[target_feature(enable = "avx2,fma")]
unsafe fn pack_panels<const ROUNDS: bool>(job: &PackJob) {
    // SAFETY: as the caller promises.
    unsafe { pack::<Avx2<ROUNDS>, LANES>(job) }
}

const fn leaf(rounds: bool, pack: unsafe fn(&PackJob)) -> Leaf {
    Leaf {
        depth: 1,
        rows: 6,
        columns: 2 * LANES,
        a_stride: 6,
        rounds,
        // More than the first-level cache holds of B: what is read from the second is ahead of a
        // tile, and C is visited half as often.
        steps: 640,
        packed: kernels::PACKED,
        direct: kernels::DIRECT,
        dots: kernels::DOTS,
        pack,
    }
}

/// The operands as they are.
pub(super) static FP32: Leaf = leaf(false, pack_panels::<false>);
/// Rounded to bf16 while they are packed.
pub(super) static ROUNDED: Leaf = leaf(true, pack_panels::<true>);
