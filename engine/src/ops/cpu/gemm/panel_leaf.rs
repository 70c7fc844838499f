//! What an instruction set brings to a product with [`Panels`](super::panels::Panels).
//!
//! The register tile is that of [`tile`](super::tile), over one panel and as many rows of x as there
//! are registers for.

use half::bf16;

use super::leaf::{Kernel, Lane};
use super::pack::PackJob;
use super::portable;
use super::tile::{FormOfB, TileVector};
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

/// Vectors that read lanes of f32 out of bf16.
///
/// Safety: as for [`TileVector`].
pub(super) trait Widen: TileVector {
    /// As many bf16 as there are lanes.
    unsafe fn widened(values: *const bf16) -> Self::Lanes;
}

/// As bf16, two of which are as long as a lane.
pub(super) struct InBf16;

impl<V: Widen> FormOfB<V> for InBf16 {
    const LANES: usize = V::LANES / 2;

    #[inline(always)]
    unsafe fn load(lanes: *const Lane) -> V::Lanes {
        // SAFETY: as the caller promises.
        unsafe { V::widened(lanes.cast()) }
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
            use $crate::ops::cpu::gemm::panel_leaf::{InBf16, PanelLeaf};
            use $crate::ops::cpu::gemm::tile::{InLanes, tile};

            $(#[$attribute])*
            unsafe fn of_f32<const R: usize>(
                steps: usize, a: LanesOfA, b: LanesOfB, target: Target,
            ) {
                // SAFETY: as the caller promises.
                unsafe { tile::<$vector, InLanes, R, $columns, false, true>(steps, a, b, target) }
            }

            $(#[$attribute])*
            unsafe fn of_bf16<const R: usize>(
                steps: usize, a: LanesOfA, b: LanesOfB, target: Target,
            ) {
                // SAFETY: as the caller promises.
                unsafe { tile::<$vector, InBf16, R, $columns, false, true>(steps, a, b, target) }
            }

            const OF_F32: &[Kernel] = &[$(of_f32::<$rows>),*];
            const OF_BF16: &[Kernel] = &[$(of_bf16::<$rows>),*];
            PanelLeaf { of_f32: OF_F32, of_bf16: OF_BF16, pack: $pack }
        };
    };
}
pub(super) use panel_leaf;
