//! Matrix products on views into slices, over the `gemm` crate.

#![expect(
    unsafe_code,
    reason = "`gemm::gemm` takes raw pointers; every view's bounds are checked when it is made"
)]

use std::ops::Range;

use gemm::Parallelism;

/// Below this many multiply-adds, handing work to other threads costs more than it saves.
const PARALLEL_MIN_MULTIPLY_ADDS: usize = 4_000_000;

/// A matrix inside a slice: element (i, j) is at `i · row_stride + j · column_stride`.
#[derive(Clone, Copy)]
pub(super) struct MatRef<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> MatRef<'a> {
    /// A row-major matrix that fills `data`.
    pub(super) fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns, "a {rows} x {columns} matrix");
        Self { data, rows, columns, row_stride: columns, column_stride: 1 }
    }

    /// Columns `range`, as a view.
    pub(super) fn columns(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.columns, "columns {range:?}");
        // An empty view may start behind the last element.
        let start = (range.start * self.column_stride).min(self.data.len());
        Self { data: &self.data[start..], columns: range.len(), ..self }
    }

    /// Rows `range`, as a view.
    pub(super) fn rows(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?}");
        let start = (range.start * self.row_stride).min(self.data.len());
        Self { data: &self.data[start..], rows: range.len(), ..self }
    }

    /// The transposed matrix, as a view.
    pub(super) fn t(self) -> Self {
        Self {
            data: self.data,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }
}

/// A row-major matrix inside a slice, to be written.
pub(super) struct MatMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
}

impl<'a> MatMut<'a> {
    /// A matrix that fills `data`.
    pub(super) fn new(data: &'a mut [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns, "a {rows} x {columns} matrix");
        Self { data, rows, columns, row_stride: columns }
    }

    /// Columns `range`, as a view.
    pub(super) fn columns(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.columns, "columns {range:?}");
        let start = range.start.min(self.data.len());
        Self { data: &mut self.data[start..], columns: range.len(), ..self }
    }
}

/// Whether a product may use other threads.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Threads {
    /// When it is large enough to gain from them.
    Shared,
    /// Never: the caller already runs one product on each thread.
    One,
}

/// C = α·A·B.
pub(super) fn gemm(c: MatMut<'_>, alpha: f32, a: MatRef<'_>, b: MatRef<'_>, threads: Threads) {
    let target = c.target();
    // SAFETY: `target` is the view of a unique borrow, inside of its slice.
    unsafe { write(target, false, alpha, a, b, threads) }
}

/// C += α·A·B.
pub(super) fn gemm_add(c: MatMut<'_>, alpha: f32, a: MatRef<'_>, b: MatRef<'_>, threads: Threads) {
    let target = c.target();
    // SAFETY: as in `gemm`.
    unsafe { write(target, true, alpha, a, b, threads) }
}

/// α·A·B in a new row-major matrix, whose memory is written once: zeroing it first would cost a
/// tenth of the product's time.
pub(super) fn product(alpha: f32, a: MatRef<'_>, b: MatRef<'_>, threads: Threads) -> Vec<f32> {
    let length = a.rows * b.columns;
    if a.columns == 0 {
        return vec![0.0; length];
    }
    let mut values = Vec::with_capacity(length);
    let target = Target {
        data: values.as_mut_ptr(),
        rows: a.rows,
        columns: b.columns,
        row_stride: b.columns,
    };
    // SAFETY: the capacity holds rows · columns elements. The product writes every one of them
    // and, as it does not add to the target, reads none.
    unsafe {
        write(target, false, alpha, a, b, threads);
        values.set_len(length);
    }
    values
}

/// Where a product goes: `rows` x `columns` elements, rows `row_stride` apart.
struct Target {
    data: *mut f32,
    rows: usize,
    columns: usize,
    row_stride: usize,
}

impl MatMut<'_> {
    fn target(self) -> Target {
        assert_inside(self.data.len(), self.rows, self.columns, self.row_stride, 1);
        let Self { data, rows, columns, row_stride } = self;
        Target { data: data.as_mut_ptr(), rows, columns, row_stride }
    }
}

/// # Safety
/// The target's elements must be valid for writes, for reads too when `add`, and not aliased.
unsafe fn write(c: Target, add: bool, alpha: f32, a: MatRef<'_>, b: MatRef<'_>, threads: Threads) {
    assert_eq!((c.rows, c.columns), (a.rows, b.columns), "shape of the product");
    assert_eq!(a.columns, b.rows, "inner dimension of the product");
    assert_inside(a.data.len(), a.rows, a.columns, a.row_stride, a.column_stride);
    assert_inside(b.data.len(), b.rows, b.columns, b.row_stride, b.column_stride);
    let multiply_adds = c.rows * c.columns * a.columns;
    let parallelism = if threads == Threads::Shared && multiply_adds > PARALLEL_MIN_MULTIPLY_ADDS {
        // 0 stands for all threads of the current rayon pool.
        Parallelism::Rayon(0)
    } else {
        Parallelism::None
    };
    // SAFETY: all three views lie inside of their memory, as just checked or promised by the
    // caller. Strides fit `isize` because the slices do. CPU features are detected by the crate.
    unsafe {
        gemm::gemm(
            c.rows,
            c.columns,
            a.columns,
            c.data,
            1,
            c.row_stride as isize,
            add,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Checks that a view's last element lies inside of its slice.
fn assert_inside(
    length: usize,
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
) {
    if rows > 0 && columns > 0 {
        let last = (rows - 1) * row_stride + (columns - 1) * column_stride;
        assert!(last < length, "a view of {rows} x {columns} leaves its {length} elements");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Σₖ a[i, k]·b[k, j] by the definition.
    fn naive(a: MatRef<'_>, b: MatRef<'_>) -> Vec<f32> {
        let at = |m: MatRef<'_>, i: usize, j: usize| m.data[i * m.row_stride + j * m.column_stride];
        (0..a.rows * b.columns)
            .map(|n| {
                let (i, j) = (n / b.columns, n % b.columns);
                (0..a.columns).map(|k| at(a, i, k) * at(b, k, j)).sum()
            })
            .collect()
    }

    fn integers(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7 + 3) % 11) as f32 - 5.0).collect()
    }

    #[test]
    fn product_of_transposed_and_column_views_equals_the_definition() {
        let (a, b) = (integers(5 * 7), integers(6 * 9));
        let a = MatRef::new(&a, 5, 7).columns(1..5);
        let b = MatRef::new(&b, 6, 9).columns(2..6).t();
        assert_eq!(product(1.0, a, b, Threads::Shared), naive(a, b));
        let b = b.t().rows(1..5);
        assert_eq!(product(1.0, a, b, Threads::One), naive(a, b));
    }

    #[test]
    fn sum_goes_into_the_chosen_columns_only() {
        let (a, b) = (integers(6), integers(6));
        let (a, b) = (MatRef::new(&a, 2, 3), MatRef::new(&b, 3, 2));
        let mut c = vec![1.0; 2 * 5];
        gemm_add(MatMut::new(&mut c, 2, 5).columns(2..4), 2.0, a, b, Threads::One);
        let p = naive(a, b);
        let (d, e, f, g) = (p[0], p[1], p[2], p[3]);
        let sum = |x: f32| 1.0 + 2.0 * x;
        assert_eq!(c, [1.0, 1.0, sum(d), sum(e), 1.0, 1.0, 1.0, sum(f), sum(g), 1.0]);
    }

    #[test]
    fn product_over_nothing_is_zero() {
        let (a, b) = (MatRef::new(&[], 2, 0), MatRef::new(&[], 0, 3));
        assert_eq!(product(1.0, a, b, Threads::Shared), [0.0; 6]);
    }

    #[test]
    #[should_panic(expected = "leaves its")]
    fn view_that_leaves_its_slice_is_refused() {
        let data = [0.0; 6];
        let view = MatRef { data: &data, rows: 2, columns: 3, row_stride: 4, column_stride: 1 };
        let _ = product(1.0, view, MatRef::new(&[0.0; 3], 3, 1), Threads::One);
    }
}
