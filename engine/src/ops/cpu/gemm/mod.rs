//! Matrix products on views into slices: C = base + α·A·B, with sums in f32. One may be of two pairs
//! of operands, A·B + A′·B′.
//!
//! A product of f32 by f32 is computed in f32. Where one of the operands is bf16 in memory, the
//! other is rounded to bf16 as well (to nearest, ties to even), so that the numbers are of one
//! class on every CPU, whether or not it multiplies bf16 itself. Encoded elements count as f32.
//!
//! [`drive`] cuts a product into tiles of its [`side`]s, [`pack`] lays the operands out for them, and a [`leaf`]
//! computes them: [`avx512`], [`avx2`] or [`portable`], chosen at run time.

#![expect(
    unsafe_code,
    reason = "tiles and packing work on raw pointers with vector instructions; every view's bounds \
              are checked before a product, and an `Isa` proves that the CPU has the instructions"
)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod drive;
mod history;
#[cfg(target_arch = "x86_64")]
mod instructions;
#[cfg(all(test, target_arch = "x86_64"))]
mod instructions_model;
mod leaf;
mod pack;
mod panel_leaf;
mod panels;
mod portable;
mod scratch;
mod side;
#[cfg(test)]
mod tests;
mod tile;

use std::ops::Range;

use half::bf16;

use self::drive::{Destination, Product};
pub(super) use self::history::History;
pub(in crate::ops) use self::history::PAGE_TOKENS;
use self::leaf::{Class, Lane, Leaf};
use self::pack::Memory;
pub(super) use self::pack::round_to_bf16;
pub(crate) use self::panels::Panels;
use self::scratch::Scratch;
use super::isa::Isa;

/// Below this many multiply-adds, handing work to other threads costs more than it saves.
const PARALLEL_MIN_MULTIPLY_ADDS: usize = 4_000_000;

/// The elements of a matrix, row by row.
#[derive(Clone, Copy)]
pub(in crate::ops) enum Elements<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    /// The f32 that these are, so that the other operand is not rounded.
    Widened(&'a [bf16]),
    /// Decoded while the operand is packed.
    Encoded(&'a dyn Decode),
}

/// Elements that have a form of their own in memory, such as quantised blocks.
pub(in crate::ops) trait Decode: Sync {
    /// How many elements there are.
    fn len(&self) -> usize;

    /// Writes the elements from number `first` on.
    fn decode(&self, first: usize, values: &mut [f32]);
}

impl Elements<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) | Self::Widened(values) => values.len(),
            Self::Encoded(values) => values.len(),
        }
    }

    fn is_bf16(&self) -> bool {
        matches!(self, Self::Bf16(_))
    }

    /// What packing reads from element `first` on; None where it must be decoded.
    fn memory(&self, first: usize) -> Option<Memory> {
        match self {
            Self::F32(values) => Some(Memory::F32(values.as_ptr().wrapping_add(first))),
            Self::Bf16(values) | Self::Widened(values) => {
                Some(Memory::Bf16(values.as_ptr().wrapping_add(first)))
            }
            Self::Encoded(_) => None,
        }
    }

    /// Elements that are lanes as they are, from element `first` on.
    fn lanes(&self, first: usize) -> *const Lane {
        match self {
            Self::F32(values) => values.as_ptr().wrapping_add(first).cast(),
            Self::Bf16(values) => values.as_ptr().wrapping_add(first).cast(),
            Self::Widened(_) | Self::Encoded(_) => unreachable!("other elements are packed"),
        }
    }
}

/// A matrix inside of a slice: rows of consecutive elements `stride` apart, or the transposed.
#[derive(Clone, Copy)]
pub(in crate::ops) struct MatRef<'a> {
    elements: Elements<'a>,
    start: usize,
    stride: usize,
    rows: usize,
    columns: usize,
    /// Whether the rows in memory are this matrix's columns.
    transposed: bool,
}

impl<'a> MatRef<'a> {
    /// A row-major matrix that fills `data`.
    pub(in crate::ops) fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::of(Elements::F32(data), rows, columns)
    }

    /// The same of elements of any kind.
    pub(in crate::ops) fn of(elements: Elements<'a>, rows: usize, columns: usize) -> Self {
        assert_eq!(elements.len(), rows * columns, "a {rows} x {columns} matrix");
        Self { elements, start: 0, stride: columns, rows, columns, transposed: false }
    }

    /// Columns `range`, as a view.
    pub(in crate::ops) fn columns(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.columns, "columns {range:?}");
        let step = if self.transposed { self.stride } else { 1 };
        Self { start: self.start + range.start * step, columns: range.len(), ..self }
    }

    /// Rows `range`, as a view.
    pub(in crate::ops) fn rows(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?}");
        let step = if self.transposed { 1 } else { self.stride };
        Self { start: self.start + range.start * step, rows: range.len(), ..self }
    }

    /// The transposed matrix, as a view.
    pub(in crate::ops) fn t(self) -> Self {
        Self { rows: self.columns, columns: self.rows, transposed: !self.transposed, ..self }
    }

    /// Checks that the last element lies inside of the slice.
    fn assert_inside(&self) {
        let (rows, columns) =
            if self.transposed { (self.columns, self.rows) } else { (self.rows, self.columns) };
        assert_inside(self.elements.len(), self.start, rows, columns, self.stride);
    }

    /// Decodes rows of `columns` elements, the first of which is number `first`.
    fn decode(&self, first: usize, rows: usize, columns: usize, scratch: &mut Scratch) -> Memory {
        let Elements::Encoded(encoded) = self.elements else {
            unreachable!("other elements are read as they are")
        };
        let start = scratch.as_mut_ptr().cast::<f32>();
        for row in 0..rows {
            // SAFETY: the scratch was taken for rows · columns lanes. It may be uninitialised, so
            // it is filled before it becomes a slice.
            let values = unsafe {
                let row = start.add(row * columns);
                row.write_bytes(0, columns);
                std::slice::from_raw_parts_mut(row, columns)
            };
            encoded.decode(first + row * self.stride, values);
        }
        Memory::F32(start)
    }
}

/// A row-major matrix inside a slice, to be written.
pub(in crate::ops) struct MatMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
}

impl<'a> MatMut<'a> {
    /// A matrix that fills `data`.
    pub(in crate::ops) fn new(data: &'a mut [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns, "a {rows} x {columns} matrix");
        Self { data, rows, columns, row_stride: columns }
    }

    /// Columns `range`, as a view.
    pub(in crate::ops) fn columns(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.columns, "columns {range:?}");
        let start = range.start.min(self.data.len());
        Self { data: &mut self.data[start..], columns: range.len(), ..self }
    }
}

/// Whether a product may use other threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::ops) enum Threads {
    /// When it is large enough to gain from them.
    Shared,
    /// Never: the caller already runs one product on each thread.
    One,
}

/// C = α·A·B.
pub(in crate::ops) fn gemm(
    c: MatMut<'_>,
    alpha: f32,
    a: MatRef<'_>,
    b: MatRef<'_>,
    threads: Threads,
) {
    let target = c.target(Base::Nothing);
    // SAFETY: `target` is the view of a unique borrow, inside of its slice.
    unsafe { write(target, alpha, Operands::of(a, b), threads, None) }
}

/// C += α·A·B.
pub(in crate::ops) fn gemm_add(
    c: MatMut<'_>,
    alpha: f32,
    a: MatRef<'_>,
    b: MatRef<'_>,
    threads: Threads,
) {
    let target = c.target(Base::Itself);
    // SAFETY: as in `gemm`.
    unsafe { write(target, alpha, Operands::of(a, b), threads, None) }
}

/// α·A·B in a new row-major matrix.
pub(in crate::ops) fn product(
    alpha: f32,
    a: MatRef<'_>,
    b: MatRef<'_>,
    threads: Threads,
) -> Vec<f32> {
    product_of(None, alpha, Operands::of(a, b), threads)
}

/// base + α·A·B in a new row-major matrix; `base` has the product's shape, row by row.
pub(in crate::ops) fn product_plus(
    base: &[f32],
    alpha: f32,
    a: MatRef<'_>,
    b: MatRef<'_>,
    threads: Threads,
) -> Vec<f32> {
    product_of(Some(base), alpha, Operands::of(a, b), threads)
}

/// base + A·B + A′·B′ in a new row-major matrix; what A′ and B′ are in memory does not count for the
/// numbers that are multiplied, but what A and B are.
pub(in crate::ops) fn product_of_two(
    base: Option<&[f32]>,
    [a, b]: [MatRef<'_>; 2],
    more: [MatRef<'_>; 2],
    threads: Threads,
) -> Vec<f32> {
    product_of(base, 1.0, Operands { a, b, more: Some(more) }, threads)
}

/// base + α·(A·B + A′·B′) in a new row-major matrix, whose memory is written once: zeroing it first
/// would cost a tenth of the product's time.
fn product_of(
    base: Option<&[f32]>,
    alpha: f32,
    operands: Operands<'_>,
    threads: Threads,
) -> Vec<f32> {
    let (rows, columns) = (operands.a.rows, operands.b.columns);
    let base = base.map_or(Base::Nothing, |base| {
        assert_eq!(base.len(), rows * columns, "the base of a {rows} x {columns} matrix");
        Base::Other(base)
    });
    let mut values = Vec::with_capacity(rows * columns);
    let target = Target { data: values.as_mut_ptr(), rows, columns, row_stride: columns, base };
    // SAFETY: the capacity holds rows · columns elements, and so does the base. The product writes
    // every one of them and, as it is not its own base, reads none.
    unsafe {
        write(target, alpha, operands, threads, None);
        values.set_len(rows * columns);
    }
    values
}

/// What is multiplied.
#[derive(Clone, Copy)]
struct Operands<'a> {
    a: MatRef<'a>,
    b: MatRef<'a>,
    /// A′ and B′.
    more: Option<[MatRef<'a>; 2]>,
}

impl<'a> Operands<'a> {
    fn of(a: MatRef<'a>, b: MatRef<'a>) -> Self {
        Self { a, b, more: None }
    }

    fn assert_fit(&self, c: &Target<'_>) {
        for [a, b] in [Some([self.a, self.b]), self.more].into_iter().flatten() {
            assert_eq!((c.rows, c.columns), (a.rows, b.columns), "shape of the product");
            assert_eq!(a.columns, b.rows, "inner dimension of the product");
            a.assert_inside();
            b.assert_inside();
        }
    }
}

/// What a product is added to.
#[derive(Clone, Copy)]
enum Base<'a> {
    Nothing,
    /// C.
    Itself,
    /// A matrix of C's shape, row by row.
    Other(&'a [f32]),
}

/// Where a product goes: `rows` x `columns` elements, rows `row_stride` apart.
#[derive(Clone, Copy)]
struct Target<'a> {
    data: *mut f32,
    rows: usize,
    columns: usize,
    row_stride: usize,
    base: Base<'a>,
}

impl<'a> MatMut<'a> {
    fn target<'b>(self, base: Base<'b>) -> Target<'b> {
        assert_inside(self.data.len(), 0, self.rows, self.columns, self.row_stride);
        let Self { data, rows, columns, row_stride } = self;
        Target { data: data.as_mut_ptr(), rows, columns, row_stride, base }
    }
}

/// `leaf` overrides the choice of the leaf, for tests and measurements.
///
/// # Safety
/// The target's elements must be valid for writes, for reads too when they are their own base, and
/// not aliased; the CPU has the instructions of `leaf`.
unsafe fn write(
    c: Target<'_>,
    alpha: f32,
    operands: Operands<'_>,
    threads: Threads,
    leaf: Option<&'static Leaf>,
) {
    operands.assert_fit(&c);
    let Operands { a, b, more } = operands;
    let more = more.filter(|[a, _]| a.columns > 0);
    if c.rows == 0 || c.columns == 0 {
        return;
    }
    let (base, base_row) = match c.base {
        Base::Nothing => (std::ptr::null(), 0),
        Base::Itself => (c.data.cast_const(), c.row_stride),
        Base::Other(base) => (base.as_ptr(), c.columns),
    };
    if a.columns == 0 {
        assert!(more.is_none(), "a second pair of operands beside a first one without k");
        for row in 0..c.rows {
            // SAFETY: the rows lie inside of the target and of the base.
            unsafe {
                let target = c.data.add(row * c.row_stride);
                match c.base {
                    Base::Nothing => target.write_bytes(0, c.columns),
                    Base::Itself => {}
                    Base::Other(_) => {
                        target.copy_from_nonoverlapping(base.add(row * base_row), c.columns);
                    }
                }
            }
        }
        return;
    }
    let class =
        if a.elements.is_bf16() || b.elements.is_bf16() { Class::Bf16 } else { Class::Fp32 };
    let leaf = leaf.unwrap_or_else(|| Leaf::of(Isa::detect(), class));
    let multiply_adds = c.rows * c.columns * a.columns;
    let product = Product {
        leaf,
        a,
        b,
        more,
        alpha,
        c: Destination { c: c.data, row: c.row_stride, column: 1, base, base_row, base_column: 1 },
        shared: threads == Threads::Shared && multiply_adds > PARALLEL_MIN_MULTIPLY_ADDS,
    };
    // SAFETY: both views lie inside of their memory, as just checked, and the target as the caller
    // promises; no dimension is 0. An `Isa` is made only after the CPU was asked.
    unsafe { product.run() }
}

/// Checks that the last element of a view lies inside of its slice.
fn assert_inside(length: usize, start: usize, rows: usize, columns: usize, stride: usize) {
    if rows > 0 && columns > 0 {
        let last = start + (rows - 1) * stride + columns - 1;
        assert!(last < length, "a view of {rows} x {columns} leaves its {length} elements");
    }
}
