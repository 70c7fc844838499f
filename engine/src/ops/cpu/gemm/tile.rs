//! The register tile, written once for vectors of any width.
//!
//! R rows of N vectors stay in registers over all steps of k. A step loads the N vectors of B, and
//! for each row broadcasts its lane of A and multiplies and adds.
//!
//! The fewer instructions beside these, the better a tile shares a core: where another program runs
//! on the core's second thread, both together start as many a cycle as one did alone.

use std::hint::black_box;

use super::leaf::{Lane, LanesOfA, LanesOfB, Target};

/// What a tile needs of an instruction set. `Sums` are f32 and `Lanes` are as packed.
///
/// Safety of all methods: the CPU has the instructions, and a pointer is valid for a whole vector,
/// or in `splat` for one lane.
pub(super) trait TileVector: Copy {
    /// Lanes of a vector.
    const LANES: usize;
    /// Steps of k to one turn of the loop: several where a step takes so few cycles that counting
    /// it counts.
    const STEPS: usize;
    /// Rows of a tile up to which one pointer serves where A is not packed; the others have a second
    /// one. An address adds a register once, twice or four times.
    const ROWS_PER_POINTER: usize;
    type Sums: Copy;
    type Lanes: Copy;
    unsafe fn zero() -> Self::Sums;
    unsafe fn splat(lane: *const Lane) -> Self::Lanes;
    unsafe fn load(lanes: *const Lane) -> Self::Lanes;
    /// sums + a·b, lane by lane, over all k that a lane holds.
    unsafe fn multiply_add(sums: Self::Sums, a: Self::Lanes, b: Self::Lanes) -> Self::Sums;
    unsafe fn load_sums(values: *const f32) -> Self::Sums;
    unsafe fn store_sums(values: *mut f32, sums: Self::Sums);
    /// α·sums.
    unsafe fn scale(alpha: f32, sums: Self::Sums) -> Self::Sums;
    /// base + α·sums.
    unsafe fn scale_add(alpha: f32, sums: Self::Sums, base: Self::Sums) -> Self::Sums;
    /// Brings the line of `address` into the first-level cache; any address will do.
    unsafe fn prefetch(address: *const u8);
    /// Brings it into the second-level cache.
    unsafe fn prefetch_second_level(address: *const u8);
}

/// How B lies in memory for vectors `V`.
pub(super) trait FormOfB<V: TileVector> {
    /// Lanes that a vector takes there.
    const LANES: usize;
    /// Safety: as for [`TileVector`].
    unsafe fn load(lanes: *const Lane) -> V::Lanes;
}

/// As lanes.
pub(super) struct InLanes;

impl<V: TileVector> FormOfB<V> for InLanes {
    const LANES: usize = V::LANES;

    #[inline(always)]
    unsafe fn load(lanes: *const Lane) -> V::Lanes {
        // SAFETY: as the caller promises.
        unsafe { V::load(lanes) }
    }
}

/// Asks for the lanes of B that are read `ahead` of `lanes`.
///
/// From memory they come into the second-level cache, and shortly before they are read into the
/// first, which waits for so few lines at a time that a thread would get two thirds of what many
/// rows use up.
///
/// Safety: as for [`TileVector`].
#[inline(always)]
unsafe fn prefetch_b<V: TileVector, const FROM_MEMORY: bool>(lanes: *const Lane, ahead: usize) {
    const SHORTLY_BEFORE: usize = 512;
    let later = lanes.wrapping_add(ahead).cast();
    // SAFETY: as the caller promises.
    unsafe {
        if FROM_MEMORY {
            V::prefetch_second_level(later);
            V::prefetch(lanes.wrapping_add(SHORTLY_BEFORE).cast());
        } else {
            V::prefetch(later);
        }
    }
}

/// A vector at an address of any alignment. Reading it through a pointer is one instruction also in
/// a build with debug assertions, where the functions of `core` check their arguments.
#[derive(Clone, Copy)]
#[repr(C, packed)]
pub(super) struct Unaligned<V: Copy>(pub(super) V);

/// Where the rows of A are at one step of k: pointers to the first, and to the one behind those that
/// it serves.
struct RowsOfA {
    rows: [*const Lane; 2],
    stride: usize,
}

impl RowsOfA {
    #[inline(always)]
    fn new<V: TileVector, const R: usize, const DIRECT: bool>(a: LanesOfA) -> Self {
        if !DIRECT || R <= V::ROWS_PER_POINTER {
            return Self { rows: [a.start; 2], stride: if DIRECT { a.row } else { 1 } };
        }
        // If the compiler knew how they are related, it would compute each row's address from the
        // last one's, and every step would wait for all of these.
        let second = black_box(a.start.wrapping_add(V::ROWS_PER_POINTER * a.row));
        Self { rows: [a.start, second], stride: a.row }
    }

    #[inline(always)]
    fn row<V: TileVector, const DIRECT: bool>(&self, i: usize) -> *const Lane {
        if !DIRECT || i < V::ROWS_PER_POINTER {
            self.rows[0].wrapping_add(i.wrapping_mul(self.stride))
        } else {
            self.rows[1].wrapping_add((i - V::ROWS_PER_POINTER).wrapping_mul(self.stride))
        }
    }

    #[inline(always)]
    fn advance(&mut self, lanes: usize) {
        self.rows = self.rows.map(|row| row.wrapping_add(lanes));
    }
}

/// Reads A where it lies, if `DIRECT`; asks for B as for what is in no cache, if `FROM_MEMORY`.
///
/// # Safety
/// As for [`super::leaf::Kernel`].
#[expect(
    clippy::needless_range_loop,
    reason = "iterators over `sums` would keep the compiler from holding it in registers"
)]
#[inline(always)]
pub(super) unsafe fn tile<
    V: TileVector,
    B: FormOfB<V>,
    const R: usize,
    const N: usize,
    const DIRECT: bool,
    const FROM_MEMORY: bool,
>(
    steps: usize,
    a: LanesOfA,
    b: LanesOfB,
    target: Target,
) {
    // SAFETY: the caller promises what the methods of `V` ask for, and that rows, steps and
    // columns lie inside of the operands and of the target. Prefetches take any address.
    unsafe {
        // C comes near while the sums are made.
        for i in 0..R {
            let line = target.c.wrapping_add(i.wrapping_mul(target.c_stride));
            V::prefetch(line.cast());
            V::prefetch(line.wrapping_add(N * V::LANES - 1).cast());
        }
        let mut sums = [[V::zero(); N]; R];
        let (mut rows, mut b_lanes) = (RowsOfA::new::<V, R, DIRECT>(a), b.start);
        // A function would have `sums` go through the stack.
        macro_rules! add_step {
            () => {
                let mut columns = [B::load(b_lanes); N];
                for j in 1..N {
                    columns[j] = B::load(b_lanes.wrapping_add(j * B::LANES));
                }
                prefetch_b::<V, FROM_MEMORY>(b_lanes, b.ahead);
                for i in 0..R {
                    let row = V::splat(rows.row::<V, DIRECT>(i));
                    for j in 0..N {
                        sums[i][j] = V::multiply_add(sums[i][j], row, columns[j]);
                    }
                }
                rows.advance(if DIRECT { 1 } else { a.step });
                b_lanes = b_lanes.wrapping_add(b.step);
            };
        }
        for _ in 0..steps / V::STEPS {
            for _ in 0..V::STEPS {
                add_step!();
            }
        }
        if V::STEPS > 1 {
            for _ in 0..steps % V::STEPS {
                add_step!();
            }
        }
        // The choice stays outside of the loops: inside of them the compiler would no longer keep
        // `sums` in registers and send the tile through the stack.
        if target.base.is_null() {
            for i in 0..R {
                let c = target.c.wrapping_add(i.wrapping_mul(target.c_stride));
                for j in 0..N {
                    V::store_sums(c.wrapping_add(j * V::LANES), V::scale(target.alpha, sums[i][j]));
                }
            }
        } else {
            for i in 0..R {
                let c = target.c.wrapping_add(i.wrapping_mul(target.c_stride));
                let base = target.base.wrapping_add(i.wrapping_mul(target.base_stride));
                for j in 0..N {
                    let base = V::load_sums(base.wrapping_add(j * V::LANES));
                    let sum = V::scale_add(target.alpha, sums[i][j], base);
                    V::store_sums(c.wrapping_add(j * V::LANES), sum);
                }
            }
        }
    }
}

/// Rows that [`dots`] computes at a time.
pub(super) const DOT_ROWS: usize = 4;

/// Inner products of [`DOT_ROWS`] rows with one vector: two vectors of partial sums a row, which
/// are added lane by lane at the end.
///
/// # Safety
/// Rows and vector are readable over `k` lanes of one k each; `sums` is valid for the rows.
#[expect(
    clippy::needless_range_loop,
    reason = "iterators over `partial` would keep the compiler from holding it in registers"
)]
#[inline(always)]
pub(super) unsafe fn dots<V: TileVector>(k: usize, a: LanesOfA, b: *const Lane, sums: *mut f32) {
    // SAFETY: as the caller promises; the last, shorter part is read lane by lane.
    unsafe {
        let mut partial = [[V::zero(); 2]; DOT_ROWS];
        let pairs = k / (2 * V::LANES);
        for step in 0..pairs {
            let at = step * 2 * V::LANES;
            let columns = [V::load(b.wrapping_add(at)), V::load(b.wrapping_add(at + V::LANES))];
            for i in 0..DOT_ROWS {
                let row = a.start.wrapping_add(i.wrapping_mul(a.row).wrapping_add(at));
                for j in 0..2 {
                    let lanes = V::load(row.wrapping_add(j * V::LANES));
                    partial[i][j] = V::multiply_add(partial[i][j], lanes, columns[j]);
                }
            }
        }
        for i in 0..DOT_ROWS {
            let mut lanes = [0f32; 32];
            V::store_sums(lanes.as_mut_ptr(), partial[i][0]);
            V::store_sums(lanes.as_mut_ptr().add(V::LANES), partial[i][1]);
            let mut sum: f32 = lanes[..2 * V::LANES].iter().sum();
            let row = a.start.wrapping_add(i.wrapping_mul(a.row));
            for at in pairs * 2 * V::LANES..k {
                let [a, b] = [row, b].map(|lanes| (*lanes.add(at).cast::<Unaligned<f32>>()).0);
                sum += a * b;
            }
            *sums.add(i) = sum;
        }
    }
}

/// The kernels of a vector, one for each number of rows: `kernels! { name: V, N vectors: 1 2 … }`
/// makes a module `name` with `PACKED`, `DIRECT` and `DOTS`.
macro_rules! kernels {
    ($(#[$attribute:meta])* $name:ident: $vector:ty, $columns:literal vectors: $($rows:literal)*) => {
        mod $name {
            use super::*;
            use $crate::ops::cpu::gemm::leaf::{Dots, Kernel, LanesOfA, LanesOfB, Target};
            use $crate::ops::cpu::gemm::tile::{InLanes, tile};

            $(#[$attribute])*
            unsafe fn kernel<const R: usize, const DIRECT: bool>(
                steps: usize, a: LanesOfA, b: LanesOfB, target: Target,
            ) {
                // SAFETY: as the caller promises.
                unsafe { tile::<$vector, InLanes, R, $columns, DIRECT, false>(steps, a, b, target) }
            }

            $(#[$attribute])*
            unsafe fn dots(k: usize, a: LanesOfA, b: *const Lane, sums: *mut f32) {
                // SAFETY: as the caller promises.
                unsafe { $crate::ops::cpu::gemm::tile::dots::<$vector>(k, a, b, sums) }
            }

            pub(super) const DOTS: Dots = dots;
            pub(super) const PACKED: &[Kernel] = &[$(kernel::<$rows, false>),*];
            pub(super) const DIRECT: &[Kernel] = &[$(kernel::<$rows, true>),*];
        }
    };
}
pub(super) use kernels;
