//! A register tile with the packing that feeds it: what an instruction set brings to a product.
//!
//! Packed memory is made of lanes of 32 bits. A lane holds one k: an f32; or two neighbouring k: a
//! pair of bf16, the earlier one in the low half. A panel of A holds, for each step of k, one lane
//! for each row; a panel of B one lane for each column.

use super::pack::PackJob;
use super::portable;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::ops::cpu::isa::{Isa, Level};

/// A lane of packed memory, as its bits.
pub(super) type Lane = u32;

/// The numbers that a product multiplies; sums are in f32 in both classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// The operands as they are.
    Fp32,
    /// Both operands rounded to bf16, to nearest, ties to even.
    Bf16,
}

/// The tile of C that one call of a kernel writes: C = base + α·A·B.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub(super) c: *mut f32,
    /// Elements from one row of C to the next.
    pub(super) c_stride: usize,
    /// What the product is added to, C itself or another matrix; null for nothing.
    pub(super) base: *const f32,
    pub(super) base_stride: usize,
    pub(super) alpha: f32,
}

impl Target {
    /// α·A·B, over whatever is there.
    pub(super) fn overwritten(c: *mut f32, c_stride: usize, alpha: f32) -> Self {
        Self { c, c_stride, base: std::ptr::null(), base_stride: 0, alpha }
    }

    /// The same from another element on.
    pub(super) fn at(self, row: usize, column: usize) -> Self {
        let c = self.c.wrapping_add(row * self.c_stride + column);
        let base = match self.base.is_null() {
            true => self.base,
            false => self.base.wrapping_add(row * self.base_stride + column),
        };
        Self { c, base, ..self }
    }
}

/// Where a kernel reads A: row i at step p is the lane at `i · row + p · step`.
#[derive(Clone, Copy)]
pub(super) struct LanesOfA {
    pub(super) start: *const Lane,
    /// 1 in a packed panel; read only by the kernels for operands that are not packed.
    pub(super) row: usize,
    pub(super) step: usize,
}

/// Where a kernel reads B: the lanes of step p begin at `p · step`.
#[derive(Clone, Copy)]
pub(super) struct LanesOfB {
    pub(super) start: *const Lane,
    pub(super) step: usize,
    /// Lanes that it is asked for ahead of its use.
    pub(super) ahead: usize,
}

impl LanesOfB {
    /// Lanes `step` apart from one step of k to the next, in or near the second-level cache.
    pub(super) fn near(start: *const Lane, step: usize) -> Self {
        const STEPS_AHEAD: usize = 12;
        Self { start, step, ahead: STEPS_AHEAD * step }
    }
}

/// Computes one tile over some steps of k.
///
/// Safety: the CPU has the leaf's instructions; both operands are readable over all steps, and the
/// target is valid for its rows and the tile's columns.
pub(super) type Kernel = unsafe fn(steps: usize, a: LanesOfA, b: LanesOfB, target: Target);

/// Inner products of four rows with one vector, both where they lie.
///
/// Safety: as for [`Kernel`].
pub(super) type Dots = unsafe fn(k: usize, a: LanesOfA, b: *const Lane, sums: *mut f32);

/// What one instruction set does for one class of numbers.
#[derive(Debug)]
pub(super) struct Leaf {
    /// k that one lane holds, 1 or 2.
    pub(super) depth: usize,
    /// Rows of a full tile.
    pub(super) rows: usize,
    /// Columns of a tile.
    pub(super) columns: usize,
    /// Lanes to one step of k in a panel of A: the tile's rows or more.
    pub(super) a_stride: usize,
    /// Whether packing rounds to bf16 what then stays an f32.
    pub(super) rounds: bool,
    /// The most steps of k between two visits of C.
    pub(super) steps: usize,
    /// The kernel for 1 row, for 2, and so on, reading packed panels of A.
    pub(super) packed: &'static [Kernel],
    /// The same, reading A where it lies.
    pub(super) direct: &'static [Kernel],
    pub(super) dots: Dots,
    /// Safety: as for [`Kernel`], over what the job says.
    pub(super) pack: unsafe fn(&PackJob),
}

impl Leaf {
    /// The leaf of an instruction set for a class of numbers.
    pub(super) fn of(isa: Isa, class: Class) -> &'static Self {
        match (isa.level(), class) {
            #[cfg(target_arch = "x86_64")]
            (Level::Avx512, Class::Fp32) => &avx512::FP32,
            #[cfg(target_arch = "x86_64")]
            (Level::Avx512, Class::Bf16) if isa.multiplies_bf16() => &avx512::BF16,
            #[cfg(target_arch = "x86_64")]
            (Level::Avx512, Class::Bf16) => &avx512::ROUNDED,
            #[cfg(target_arch = "x86_64")]
            (Level::Avx2, Class::Fp32) => &avx2::FP32,
            #[cfg(target_arch = "x86_64")]
            (Level::Avx2, Class::Bf16) => &avx2::ROUNDED,
            (Level::Portable, Class::Fp32) => &portable::FP32,
            (Level::Portable, Class::Bf16) => &portable::ROUNDED,
        }
    }
}
