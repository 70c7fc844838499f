//! The CPU's matrix product by itself, for measuring it beside others.

use super::cpu::gemm::{MatMut, MatRef, Threads, gemm};

/// How the operands of a product lie in memory; C is always row by row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// A `[m, k]` times the transposed of B `[n, k]`: a projection's forward pass.
    Nt,
    /// A `[m, k]` times B `[k, n]`: the gradient of its input.
    Nn,
    /// The transposed of A `[k, m]` times B `[k, n]`: the gradient of its weight.
    Tn,
}

/// C `[m, n]` = A·B in f32, on the threads of the current rayon pool.
///
/// # Panics
/// When a slice does not have the size that `m`, `n` and `k` ask for.
pub fn product(layout: Layout, [m, n, k]: [usize; 3], a: &[f32], b: &[f32], c: &mut [f32]) {
    let a = if layout == Layout::Tn { MatRef::new(a, k, m).t() } else { MatRef::new(a, m, k) };
    let b = if layout == Layout::Nt { MatRef::new(b, n, k).t() } else { MatRef::new(b, k, n) };
    gemm(MatMut::new(c, m, n), 1.0, a, b, Threads::Shared);
}
