//! Packing: any operand to panels of lanes, in the order in which a tile reads them.
//!
//! Two cases, whichever side of the product the operand is on. Where k runs along the rows of the
//! matrix in memory, blocks of it are transposed in registers. Where k is the row's number, rows
//! are copied, or for lanes of two k zipped in pairs. A last odd k gets a partner of 0; what a
//! panel has beyond the operand is of no use to anyone.

use half::bf16;

use super::leaf::Lane;

/// Lanes behind each panel: whole vectors are stored, also where fewer lanes are meant; and panels
/// whose size is a multiple of 4096 bytes would share their sets of the first-level cache.
const PADDING: usize = 32;

/// Lanes from the start of one panel to that of the next.
pub(super) fn panel_stride(steps: usize, lanes_per_step: usize) -> usize {
    // Whole cache lines, so that panels stay aligned.
    (steps * lanes_per_step).next_multiple_of(16) + PADDING
}

/// What packing reads.
#[derive(Clone, Copy)]
pub(super) enum Memory {
    F32(*const f32),
    Bf16(*const bf16),
}

/// One panel after the other of one block of k. The operand's rows (A) or columns (B) are called
/// items here.
pub(super) struct PackJob {
    /// At the first item and the first k.
    pub(super) source: Memory,
    /// Elements from one row of the matrix in memory to the next.
    pub(super) stride: usize,
    /// Whether a row in memory holds the k of one item; else it holds the items of one k.
    pub(super) k_in_rows: bool,
    pub(super) items: usize,
    pub(super) k: usize,
    /// Items of a panel.
    pub(super) width: usize,
    /// Lanes to a step of k: the panel's width or more.
    pub(super) lanes_per_step: usize,
    /// Lanes from one panel to the next, by [`panel_stride`].
    pub(super) panel_stride: usize,
    /// Valid for all panels with the padding of each.
    pub(super) target: *mut Lane,
}

/// What packing needs of an instruction set, in vectors of L lanes.
///
/// Safety of all methods: the CPU has the instructions; a pointer is valid for as many elements as
/// are asked for, or for a whole vector in `store`.
pub(super) trait PackVector<const L: usize>: Copy {
    /// k that one lane holds.
    const DEPTH: usize;
    type V: Copy;
    unsafe fn zero() -> Self::V;
    /// Lanes of successive k from `count` elements, at most L · DEPTH; then zeros.
    unsafe fn along_f32(elements: *const f32, count: usize) -> Self::V;
    unsafe fn along_bf16(elements: *const bf16, count: usize) -> Self::V;
    /// Lanes of successive items, `count` of them, then zeros: one k from `first`, and in lanes of
    /// two k the other from `second`, which is null where there is none.
    unsafe fn across_f32(first: *const f32, second: *const f32, count: usize) -> Self::V;
    unsafe fn across_bf16(first: *const bf16, second: *const bf16, count: usize) -> Self::V;
    unsafe fn transpose(rows: [Self::V; L]) -> [Self::V; L];
    unsafe fn store(lanes: *mut Lane, vector: Self::V);
    /// Brings the line of `address` into the second-level cache; any address will do.
    unsafe fn prefetch_second_level(address: *const u8);
}

/// An element in memory: which of a [`PackVector`]'s methods read it.
trait Element: Copy {
    unsafe fn along<P: PackVector<L>, const L: usize>(elements: *const Self, count: usize) -> P::V;
    unsafe fn across<P: PackVector<L>, const L: usize>(
        first: *const Self,
        second: *const Self,
        count: usize,
    ) -> P::V;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn along<P: PackVector<L>, const L: usize>(elements: *const f32, count: usize) -> P::V {
        // SAFETY: as the caller promises.
        unsafe { P::along_f32(elements, count) }
    }

    #[inline(always)]
    unsafe fn across<P: PackVector<L>, const L: usize>(
        first: *const f32,
        second: *const f32,
        count: usize,
    ) -> P::V {
        // SAFETY: as the caller promises.
        unsafe { P::across_f32(first, second, count) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn along<P: PackVector<L>, const L: usize>(elements: *const bf16, count: usize) -> P::V {
        // SAFETY: as the caller promises.
        unsafe { P::along_bf16(elements, count) }
    }

    #[inline(always)]
    unsafe fn across<P: PackVector<L>, const L: usize>(
        first: *const bf16,
        second: *const bf16,
        count: usize,
    ) -> P::V {
        // SAFETY: as the caller promises.
        unsafe { P::across_bf16(first, second, count) }
    }
}

/// # Safety
/// The CPU has the instructions of `P`; the job's source and target are valid as it says.
#[inline(always)]
pub(super) unsafe fn pack<P: PackVector<L>, const L: usize>(job: &PackJob) {
    // SAFETY: as the caller promises.
    unsafe {
        match (job.source, job.k_in_rows) {
            (Memory::F32(source), true) => transposed::<P, f32, L>(job, source),
            (Memory::Bf16(source), true) => transposed::<P, bf16, L>(job, source),
            (Memory::F32(source), false) => copied::<P, f32, L>(job, source),
            (Memory::Bf16(source), false) => copied::<P, bf16, L>(job, source),
        }
    }
}

/// Item i, k at `source[i · stride + k]`.
#[inline(always)]
unsafe fn transposed<P: PackVector<L>, E: Element, const L: usize>(
    job: &PackJob,
    source: *const E,
) {
    let steps = job.k.div_ceil(P::DEPTH);
    // Of blocks of L steps all but the last are full.
    let full = job.k / (L * P::DEPTH) * L;
    for p in 0..job.items.div_ceil(job.width) {
        let first_item = p * job.width;
        let items = job.width.min(job.items - first_item);
        for first_lane in (0..job.lanes_per_step).step_by(L) {
            // Beyond the operand its last item is repeated: no one reads these lanes' sums.
            let last = items.saturating_sub(first_lane + 1).min(L - 1);
            let first_item = (first_item + first_lane).min(job.items - 1);
            let block = Block { job, source, first_item, last, panel: p, first_lane };
            // SAFETY: as the caller promises.
            unsafe {
                for first_step in (0..full).step_by(L) {
                    block.transpose::<P, L, true>(first_step, L);
                }
                if full < steps {
                    block.transpose::<P, L, false>(full, steps - full);
                }
            }
        }
    }
}

/// L lanes of a panel, along k.
struct Block<'a, E> {
    job: &'a PackJob,
    source: *const E,
    first_item: usize,
    /// The item of the last lane that has one of its own, from the first on.
    last: usize,
    panel: usize,
    first_lane: usize,
}

impl<E: Element> Block<'_, E> {
    /// `steps` of them, which are L where `FULL`.
    #[inline(always)]
    unsafe fn transpose<P: PackVector<L>, const L: usize, const FULL: bool>(
        &self,
        first_step: usize,
        steps: usize,
    ) {
        let job = self.job;
        let first_k = first_step * P::DEPTH;
        // SAFETY: items and k lie inside of the source. Stores of whole vectors lie inside of the
        // panel and its padding: what a store leaves beyond its step is overwritten by the next
        // one, as steps ascend.
        unsafe {
            let corner = self.source.wrapping_add(self.first_item * job.stride + first_k);
            let mut rows = [P::zero(); L];
            for (i, row) in rows.iter_mut().enumerate() {
                let elements = corner.wrapping_add(i.min(self.last).wrapping_mul(job.stride));
                // So many rows are too many streams for the hardware, which also would not know
                // that the rows below are next.
                P::prefetch_second_level(elements.wrapping_add(L.wrapping_mul(job.stride)).cast());
                let count = if FULL { L * P::DEPTH } else { job.k - first_k };
                *row = E::along::<P, L>(elements, count);
            }
            let columns = P::transpose(rows);
            let target = job.target.wrapping_add(
                self.panel * job.panel_stride + first_step * job.lanes_per_step + self.first_lane,
            );
            for (step, column) in columns.into_iter().enumerate() {
                if FULL || step < steps {
                    P::store(target.wrapping_add(step.wrapping_mul(job.lanes_per_step)), column);
                }
            }
        }
    }
}

/// Item i, k at `source[k · stride + i]`. Steps outside, panels inside: a row is read from end to
/// end.
#[inline(always)]
unsafe fn copied<P: PackVector<L>, E: Element, const L: usize>(job: &PackJob, source: *const E) {
    // A job has a short part of each row: the hardware would read on behind it, not in later rows.
    const ROWS_AHEAD: usize = 32;
    let steps = job.k.div_ceil(P::DEPTH);
    let panel = job.panel_stride;
    for step in 0..steps {
        let k = step * P::DEPTH;
        for p in 0..job.items.div_ceil(job.width) {
            let first_item = p * job.width;
            let items = job.width.min(job.items - first_item);
            for first_lane in (0..job.lanes_per_step).step_by(L) {
                let present = items.saturating_sub(first_lane).min(L);
                // SAFETY: as in `transposed`.
                unsafe {
                    let first = source.wrapping_add(k * job.stride + first_item + first_lane);
                    for row in ROWS_AHEAD..ROWS_AHEAD + P::DEPTH {
                        let ahead = first.wrapping_add(row.wrapping_mul(job.stride));
                        P::prefetch_second_level(ahead.cast());
                    }
                    let second = if P::DEPTH == 2 && k + 1 < job.k {
                        first.wrapping_add(job.stride)
                    } else {
                        std::ptr::null()
                    };
                    let vector = if present == L {
                        E::across::<P, L>(first, second, L)
                    } else {
                        E::across::<P, L>(first, second, present)
                    };
                    let target = job.target.add(p * panel + step * job.lanes_per_step + first_lane);
                    P::store(target, vector);
                }
            }
        }
    }
}

/// `x` rounded to the nearest bf16, ties to even, as the f32 of that value.
#[inline(always)]
pub(in crate::ops::cpu) fn round_to_bf16(x: u32) -> u32 {
    // Half of the last place that stays, less one bit where that place is even.
    let rounded = x.wrapping_add(0x7fff + ((x >> 16) & 1));
    // A NaN must not be carried over into an infinity.
    let is_nan = x & 0x7fff_ffff > 0x7f80_0000;
    (if is_nan { x | 0x0040_0000 } else { rounded }) & 0xffff_0000
}
