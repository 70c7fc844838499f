//! The leaf for any CPU: tiles of 4 x 8 in plain Rust.

use half::bf16;

use super::leaf::{Lane, Leaf};
use super::pack::{PackJob, PackVector, pack, round_to_bf16};
use super::panel_leaf::{Widen, panel_leaf};
use super::tile::{TileVector, kernels};

const LANES: usize = 8;

/// Plain arrays; packing rounds to bf16 when `ROUNDS`.
#[derive(Clone, Copy)]
struct Portable<const ROUNDS: bool>;

impl TileVector for Portable<false> {
    const LANES: usize = LANES;
    const STEPS: usize = 1;
    const ROWS_PER_POINTER: usize = usize::MAX;
    type Sums = [f32; LANES];
    type Lanes = [f32; LANES];

    #[inline(always)]
    unsafe fn zero() -> [f32; LANES] {
        [0.0; LANES]
    }

    #[inline(always)]
    unsafe fn splat(lane: *const Lane) -> [f32; LANES] {
        // SAFETY: valid for one lane, as the caller promises; an operand that is not packed may
        // have any alignment.
        [f32::from_bits(unsafe { lane.read_unaligned() }); LANES]
    }

    #[inline(always)]
    unsafe fn load(lanes: *const Lane) -> [f32; LANES] {
        // SAFETY: valid for a vector, as the caller promises.
        unsafe { lanes.cast::<[f32; LANES]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn multiply_add(
        mut sums: [f32; LANES],
        a: [f32; LANES],
        b: [f32; LANES],
    ) -> [f32; LANES] {
        for i in 0..LANES {
            sums[i] += a[i] * b[i];
        }
        sums
    }

    #[inline(always)]
    unsafe fn load_sums(values: *const f32) -> [f32; LANES] {
        // SAFETY: valid for a vector, as the caller promises.
        unsafe { values.cast::<[f32; LANES]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store_sums(values: *mut f32, sums: [f32; LANES]) {
        // SAFETY: valid for a vector, as the caller promises.
        unsafe { values.cast::<[f32; LANES]>().write_unaligned(sums) }
    }

    #[inline(always)]
    unsafe fn scale(alpha: f32, sums: [f32; LANES]) -> [f32; LANES] {
        sums.map(|sum| alpha * sum)
    }

    #[inline(always)]
    unsafe fn scale_add(alpha: f32, sums: [f32; LANES], mut base: [f32; LANES]) -> [f32; LANES] {
        for i in 0..LANES {
            base[i] += alpha * sums[i];
        }
        base
    }

    #[inline(always)]
    unsafe fn prefetch(_address: *const u8) {}

    #[inline(always)]
    unsafe fn prefetch_second_level(_address: *const u8) {}
}

impl Widen for Portable<false> {
    #[inline(always)]
    unsafe fn widened(values: *const bf16) -> [f32; LANES] {
        // SAFETY: valid for a vector, as the caller promises.
        let values = unsafe { values.cast::<[bf16; LANES]>().read_unaligned() };
        values.map(bf16::to_f32)
    }
}

impl<const ROUNDS: bool> PackVector<LANES> for Portable<ROUNDS> {
    const DEPTH: usize = 1;
    type V = [u32; LANES];

    #[inline(always)]
    unsafe fn zero() -> [u32; LANES] {
        [0; LANES]
    }

    #[inline(always)]
    unsafe fn along_f32(elements: *const f32, count: usize) -> [u32; LANES] {
        let mut lanes = [0; LANES];
        for (i, lane) in lanes.iter_mut().enumerate().take(count) {
            // SAFETY: valid for `count` elements, as the caller promises.
            let bits = unsafe { *elements.add(i) }.to_bits();
            *lane = if ROUNDS { round_to_bf16(bits) } else { bits };
        }
        lanes
    }

    #[inline(always)]
    unsafe fn along_bf16(elements: *const bf16, count: usize) -> [u32; LANES] {
        let mut lanes = [0; LANES];
        for (i, lane) in lanes.iter_mut().enumerate().take(count) {
            // SAFETY: valid for `count` elements, as the caller promises.
            *lane = u32::from(unsafe { *elements.add(i) }.to_bits()) << 16;
        }
        lanes
    }

    #[inline(always)]
    unsafe fn across_f32(first: *const f32, _: *const f32, count: usize) -> [u32; LANES] {
        // SAFETY: as the caller promises.
        unsafe { Self::along_f32(first, count) }
    }

    #[inline(always)]
    unsafe fn across_bf16(first: *const bf16, _: *const bf16, count: usize) -> [u32; LANES] {
        // SAFETY: as the caller promises.
        unsafe { Self::along_bf16(first, count) }
    }

    #[inline(always)]
    unsafe fn transpose(rows: [[u32; LANES]; LANES]) -> [[u32; LANES]; LANES] {
        std::array::from_fn(|i| std::array::from_fn(|j| rows[j][i]))
    }

    #[inline(always)]
    unsafe fn store(lanes: *mut Lane, vector: [u32; LANES]) {
        // SAFETY: valid for a vector, as the caller promises.
        unsafe { lanes.cast::<[u32; LANES]>().write_unaligned(vector) }
    }

    #[inline(always)]
    unsafe fn prefetch_second_level(_address: *const u8) {}
}

kernels! { kernels: Portable<false>, 1 vectors: 1 2 3 4 }

panel_leaf! { pub(super) PANELS: Portable<false>, 2 vectors, pack_panels::<false>, rows: 1 2 }

unsafe fn pack_panels<const ROUNDS: bool>(job: &PackJob) {
    // SAFETY: as the caller promises.
    unsafe { pack::<Portable<ROUNDS>, LANES>(job) }
}

const fn leaf(rounds: bool, pack: unsafe fn(&PackJob)) -> Leaf {
    Leaf {
        depth: 1,
        rows: 4,
        columns: LANES,
        a_stride: 4,
        rounds,
        steps: 256,
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
