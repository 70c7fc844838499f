//! What an instruction set brings to a product with [`Panels`](super::panels::Panels).
//!
//! The register tile is that of [`tile`](super::tile), over one panel and as many rows of x as there
//! are registers for.

use std::marker::PhantomData;

use half::bf16;

use super::leaf::{Kernel, Lane};
use super::pack::PackJob;
use super::portable;
use super::tile::TileVector;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::ops::cpu::isa::{Isa, Level};

/// Kernels of one instruction set.
#[derive(Debug)]
pub(super) struct PanelLeaf {
    /// The kernel for 1 row of x, for 2, and so on, by panels of f32.
    pub(super) of_f32: &'static [Kernel],
    /// The same by panels of bf16.
    pub(super) of_bf16: &'static [Kernel],
    /// Packs rows of x.
    pub(super) pack: unsafe fn(&PackJob),
}

impl PanelLeaf {
    /// The leaf of an instruction set.
    pub(super) fn of(isa: Isa) -> &'static Self {
        match isa.level() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => &avx512::PANELS,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => &avx2::PANELS,
            Level::Portable => &portable::PANELS,
        }
    }

    /// The most rows of a tile.
    pub(super) fn rows(&self) -> usize {
        self.of_f32.len()
    }
}

/// How a vector reads lanes of f32 out of bf16.
///
/// Safety: as for [`TileVector`].
pub(super) trait Widen: TileVector {
    /// As many bf16 as there are lanes.
    unsafe fn widened(values: *const bf16) -> Self::Lanes;
}

/// Vectors of `V` where B is bf16 in memory.
#[derive(Clone, Copy)]
pub(super) struct Widened<V>(PhantomData<V>);

impl<V: Widen> TileVector for Widened<V> {
    const LANES: usize = V::LANES;
    const LANES_OF_B: usize = V::LANES / 2;
    type Sums = V::Sums;
    type Lanes = V::Lanes;

    #[inline(always)]
    unsafe fn load_b(lanes: *const Lane) -> V::Lanes {
        // SAFETY: as the caller promises, here and below.
        unsafe { V::widened(lanes.cast()) }
    }

    #[inline(always)]
    unsafe fn zero() -> V::Sums {
        // SAFETY: as above.
        unsafe { V::zero() }
    }

    #[inline(always)]
    unsafe fn splat(lane: *const Lane) -> V::Lanes {
        // SAFETY: as above.
        unsafe { V::splat(lane) }
    }

    #[inline(always)]
    unsafe fn load(lanes: *const Lane) -> V::Lanes {
        // SAFETY: as above.
        unsafe { V::load(lanes) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sums: V::Sums, a: V::Lanes, b: V::Lanes) -> V::Sums {
        // SAFETY: as above.
        unsafe { V::multiply_add(sums, a, b) }
    }

    #[inline(always)]
    unsafe fn load_sums(values: *const f32) -> V::Sums {
        // SAFETY: as above.
        unsafe { V::load_sums(values) }
    }

    #[inline(always)]
    unsafe fn store_sums(values: *mut f32, sums: V::Sums) {
        // SAFETY: as above.
        unsafe { V::store_sums(values, sums) }
    }

    #[inline(always)]
    unsafe fn scale(alpha: f32, sums: V::Sums) -> V::Sums {
        // SAFETY: as above.
        unsafe { V::scale(alpha, sums) }
    }

    #[inline(always)]
    unsafe fn scale_add(alpha: f32, sums: V::Sums, base: V::Sums) -> V::Sums {
        // SAFETY: as above.
        unsafe { V::scale_add(alpha, sums, base) }
    }

    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        // SAFETY: as above.
        unsafe { V::prefetch(address) }
    }
}

/// A leaf, with a kernel for each number of rows:
/// `panel_leaf! { pub NAME: V, N vectors, pack, rows: 1 2 … }` for panels of N vectors.
macro_rules! panel_leaf {
    (
        $(#[$attribute:meta])*
        $visibility:vis $name:ident: $vector:ty, $columns:literal vectors, $pack:expr, rows: $($rows:literal)*
    ) => {
        $visibility static $name: $crate::ops::cpu::gemm::panel_leaf::PanelLeaf = {
            use $crate::ops::cpu::gemm::leaf::{Kernel, LanesOfA, LanesOfB, Target};
            use $crate::ops::cpu::gemm::panel_leaf::{PanelLeaf, Widened};
            use $crate::ops::cpu::gemm::tile::tile;

            $(#[$attribute])*
            unsafe fn of_f32<const R: usize>(
                steps: usize, a: LanesOfA, b: LanesOfB, target: Target,
            ) {
                // SAFETY: as the caller promises.
                unsafe { tile::<$vector, R, $columns, false>(steps, a, b, target) }
            }

            $(#[$attribute])*
            unsafe fn of_bf16<const R: usize>(
                steps: usize, a: LanesOfA, b: LanesOfB, target: Target,
            ) {
                // SAFETY: as the caller promises.
                unsafe { tile::<Widened<$vector>, R, $columns, false>(steps, a, b, target) }
            }

            const OF_F32: &[Kernel] = &[$(of_f32::<$rows>),*];
            const OF_BF16: &[Kernel] = &[$(of_bf16::<$rows>),*];
            PanelLeaf { of_f32: OF_F32, of_bf16: OF_BF16, pack: $pack }
        };
    };
}
pub(super) use panel_leaf;
