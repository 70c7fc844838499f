//! A matrix that many products multiply by: kept as their tiles read it.
//!
//! W `[out, in]` is cut into panels of 16 outputs, which hold for each input those outputs' weights
//! side by side. So x·Wᵀ reads W as one stream from end to end, once for up to as many rows of x as
//! a tile has, and packs none of it. Weights of bf16 are widened in registers: they are f32 that end
//! in zeros, and x is not rounded beside them.
//!
//! An element of the product is the sum over k in one go, in order. Its bits depend on its own row
//! and column alone: not on the rows beside it, on their number or on the threads.

use std::marker::PhantomData;
use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::drive::for_each;
use super::leaf::{Kernel, Lane, LanesOfA, LanesOfB, Target};
use super::pack::{Memory, PackJob, panel_stride};
use super::panel_leaf::PanelLeaf;
use super::scratch::{Scratch, Slot};
use super::{Base, Elements, MatMut, MatRef};
use crate::ops::cpu::isa::Isa;

/// Outputs of a panel.
pub(super) const WIDTH: usize = 16;
/// Rows of x that the widest tile takes.
const MOST_ROWS: usize = 16;
/// Bytes that a panel is asked for ahead of its use: the hardware does not look beyond the page that
/// it reads. While memory brings them, 16 rows are multiplied for a microsecond.
const AHEAD_BYTES: usize = 16 << 10;
/// Bytes of W that a task handles: they stay in a second-level cache while all of x goes by.
const TASK_BYTES: usize = 128 << 10;
/// Below this many multiply-adds, handing work to other threads costs more than it saves.
const PARALLEL_MIN_MULTIPLY_ADDS: usize = 1 << 16;

/// W in panels, one after the other.
#[derive(Debug)]
pub(crate) struct Panels {
    outputs: usize,
    inputs: usize,
    steps: Steps,
}

/// The weights of one input for all outputs of a panel, input by input.
#[derive(Debug)]
enum Steps {
    F32(Vec<StepOfF32>),
    Bf16(Vec<StepOfBf16>),
}

/// A line of the cache.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct StepOfF32([f32; WIDTH]);

/// Half a line.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
struct StepOfBf16([bf16; WIDTH]);

impl Panels {
    /// The panels of f32 that lie row by row.
    pub(in crate::ops) fn of_f32(weight: &[f32], [outputs, inputs]: [usize; 2]) -> Self {
        let steps = Steps::F32(steps(weight, [outputs, inputs], StepOfF32));
        Self { outputs, inputs, steps }
    }

    /// The panels of bf16 that lie row by row.
    pub(in crate::ops) fn of_bf16(weight: &[bf16], [outputs, inputs]: [usize; 2]) -> Self {
        let steps = Steps::Bf16(steps(weight, [outputs, inputs], StepOfBf16));
        Self { outputs, inputs, steps }
    }

    /// Rows and columns of W.
    pub(in crate::ops) fn dims(&self) -> [usize; 2] {
        [self.outputs, self.inputs]
    }

    /// Whether weights are kept in bf16.
    pub(in crate::ops) fn is_bf16(&self) -> bool {
        matches!(self.steps, Steps::Bf16(_))
    }

    /// One row of W.
    pub(in crate::ops) fn row(&self, output: usize, row: &mut [f32]) {
        assert!(output < self.outputs && row.len() == self.inputs, "a row of the matrix");
        let first = output / WIDTH * self.inputs;
        let panel = first..first + self.inputs;
        let column = output % WIDTH;
        match &self.steps {
            Steps::F32(steps) => {
                row.iter_mut().zip(&steps[panel]).for_each(|(w, step)| *w = step.0[column]);
            }
            Steps::Bf16(steps) => {
                let steps = &steps[panel];
                row.iter_mut().zip(steps).for_each(|(w, step)| *w = step.0[column].to_f32());
            }
        }
    }

    /// x·Wᵀ.
    pub(in crate::ops) fn product(&self, x: MatRef<'_>) -> Vec<f32> {
        self.product_by(PanelLeaf::of(Isa::detect()), x)
    }

    fn product_by(&self, leaf: &PanelLeaf, x: MatRef<'_>) -> Vec<f32> {
        let elements = x.rows * self.outputs;
        if self.inputs == 0 {
            return vec![0.0; elements];
        }
        let mut y = Vec::with_capacity(elements);
        let target = Target::overwritten(y.as_mut_ptr(), self.outputs, 1.0);
        // SAFETY: the capacity holds the product, which writes every element and has no base.
        unsafe {
            self.multiply(leaf, x, target);
            y.set_len(elements);
        }
        y
    }

    /// y ← y + α·x·Wᵀ.
    pub(in crate::ops) fn add_product(&self, y: MatMut<'_>, alpha: f32, x: MatRef<'_>) {
        self.add_product_by(PanelLeaf::of(Isa::detect()), y, alpha, x);
    }

    fn add_product_by(&self, leaf: &PanelLeaf, y: MatMut<'_>, alpha: f32, x: MatRef<'_>) {
        assert_eq!((y.rows, y.columns), (x.rows, self.outputs), "shape of the product");
        let y = y.target(Base::Itself);
        let target = Target {
            c: y.data,
            c_stride: y.row_stride,
            base: y.data,
            base_stride: y.row_stride,
            alpha,
        };
        // SAFETY: `target` is the view of a unique borrow, inside of its slice.
        unsafe { self.multiply(leaf, x, target) }
    }

    /// # Safety
    /// The CPU has the leaf's instructions. The target is valid for the rows of x and the rows of W,
    /// for reads too where it is its own base, and not aliased.
    unsafe fn multiply(&self, leaf: &PanelLeaf, x: MatRef<'_>, target: Target) {
        let Self { outputs, inputs, .. } = *self;
        assert_eq!(x.columns, inputs, "inner dimension of the product");
        x.assert_inside();
        if inputs == 0 || x.rows == 0 || outputs == 0 {
            return;
        }
        let is_shared = x.rows * inputs * outputs >= PARALLEL_MIN_MULTIPLY_ADDS;
        let kernels = match self.steps {
            Steps::F32(_) => leaf.of_f32,
            Steps::Bf16(_) => leaf.of_bf16,
        };
        let rows = Groups::pack(leaf, x, is_shared);
        let lanes = |panel| self.lanes(panel);
        let product = PanelProduct { kernels, rows, lanes, outputs, inputs, target };
        let panels = outputs.div_ceil(WIDTH);
        let per_task = (TASK_BYTES / (inputs * self.step_bytes())).clamp(1, panels);
        for_each(panels.div_ceil(per_task), is_shared, |task| {
            // As a whole: its pointers alone may not go to other threads.
            let product = &product;
            // SAFETY: as the caller promises; tasks have disjoint panels, and so disjoint columns.
            unsafe { product.panels(task * per_task..((task + 1) * per_task).min(panels)) }
        });
    }

    /// Bytes of a step.
    fn step_bytes(&self) -> usize {
        match self.steps {
            Steps::F32(_) => size_of::<StepOfF32>(),
            Steps::Bf16(_) => size_of::<StepOfBf16>(),
        }
    }

    /// Where a kernel reads panel number `panel`.
    fn lanes(&self, panel: usize) -> LanesOfB {
        let first = panel * self.inputs;
        let start = match &self.steps {
            Steps::F32(steps) => steps[first..].as_ptr().cast(),
            Steps::Bf16(steps) => steps[first..].as_ptr().cast(),
        };
        let bytes = self.step_bytes();
        let [step, ahead] = [bytes, AHEAD_BYTES].map(|bytes| bytes / size_of::<Lane>());
        LanesOfB { start, step, ahead }
    }
}

/// The steps of all panels; outputs behind the last one are 0.
fn steps<T: Copy + Default + Sync, S: Copy + Send>(
    weight: &[T],
    [outputs, inputs]: [usize; 2],
    step: fn([T; WIDTH]) -> S,
) -> Vec<S> {
    assert_eq!(weight.len(), outputs * inputs, "a {outputs} x {inputs} matrix");
    let mut steps = vec![step([T::default(); WIDTH]); outputs.div_ceil(WIDTH) * inputs];
    let rows = weight.par_chunks(WIDTH * inputs.max(1));
    steps.par_chunks_mut(inputs.max(1)).zip(rows).for_each(|(panel, rows)| {
        for (k, target) in panel.iter_mut().enumerate() {
            let mut side_by_side = [T::default(); WIDTH];
            for (value, row) in side_by_side.iter_mut().zip(rows.chunks_exact(inputs)) {
                *value = row[k];
            }
            *target = step(side_by_side);
        }
    });
    steps
}

/// Rows of x in groups, as many as a tile takes; of each group the rows' values for one step of k
/// lie side by side.
pub(super) struct Groups<'a> {
    rows: usize,
    /// Rows of a group; the last one may have fewer.
    width: usize,
    /// Lanes from one group to the next.
    stride: usize,
    start: *const Lane,
    /// What `start` points into.
    _memory: (Option<Scratch>, PhantomData<&'a [f32]>),
}

impl<'a> Groups<'a> {
    /// Of `x` with at least one element, inside of its slice.
    pub(super) fn pack(leaf: &PanelLeaf, x: MatRef<'a>, is_shared: bool) -> Self {
        let Elements::F32(values) = x.elements else { unreachable!("rows are f32") };
        assert!(!x.transposed, "rows lie in memory as rows");
        let width = leaf.rows().min(x.rows);
        let stride = panel_stride(x.columns, width);
        let row = |row: usize| values[x.start + row * x.stride..].as_ptr();
        if x.rows == 1 {
            let _memory = (None, PhantomData);
            return Self { rows: 1, width, stride, start: row(0).cast(), _memory };
        }
        let groups = x.rows.div_ceil(width);
        let mut scratch = Scratch::take(Slot::A, groups * stride);
        let target = Shared(scratch.as_mut_ptr());
        for_each(groups, is_shared, |group| {
            // As a whole: its pointer alone may not go to other threads.
            let target = &target;
            let items = width.min(x.rows - group * width);
            let job = PackJob {
                source: Memory::F32(row(group * width)),
                stride: x.stride,
                k_in_rows: true,
                items,
                k: x.columns,
                width: items,
                lanes_per_step: items,
                panel_stride: stride,
                target: target.0.wrapping_add(group * stride),
            };
            // SAFETY: the CPU has the leaf's instructions; the rows are there, and the scratch has
            // room for all groups and the padding of each.
            unsafe { (leaf.pack)(&job) };
        });
        let start = target.0.cast_const();
        Self { rows: x.rows, width, stride, start, _memory: (Some(scratch), PhantomData) }
    }
}

/// Memory whose parts go to different threads.
struct Shared(*mut Lane);

// SAFETY: who shares it gives each thread a part of its own.
unsafe impl Sync for Shared {}

/// base + α·x·Wᵀ.
pub(super) struct PanelProduct<'a, L> {
    /// Of the leaf, for the numbers that the panels hold.
    pub(super) kernels: &'static [Kernel],
    pub(super) rows: Groups<'a>,
    /// Where a kernel reads a panel.
    pub(super) lanes: L,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    pub(super) target: Target,
}

// SAFETY: all that it points to is read only, but for the target, of which tasks have disjoint
// columns.
unsafe impl<L: Sync> Sync for PanelProduct<'_, L> {}

impl<L: Fn(usize) -> LanesOfB> PanelProduct<'_, L> {
    /// The columns that some panels give.
    ///
    /// # Safety
    /// The CPU has the kernels' instructions; the panels are some of W's, and are where `lanes` has
    /// them; the target is valid for all rows of x and all outputs of W, for reads too where it is
    /// its own base, and no other thread uses these columns.
    pub(super) unsafe fn panels(&self, panels: Range<usize>) {
        let groups = &self.rows;
        for group in 0..groups.rows.div_ceil(groups.width) {
            let row = group * groups.width;
            let rows = groups.width.min(groups.rows - row);
            let kernel = self.kernels[rows - 1];
            let start = groups.start.wrapping_add(group * groups.stride);
            let x = LanesOfA { start, row: 1, step: rows };
            for panel in panels.clone() {
                let column = panel * WIDTH;
                let columns = WIDTH.min(self.outputs - column);
                let w = (self.lanes)(panel);
                // SAFETY: as the caller promises; a panel of fewer columns than a tile has is
                // computed beside the target.
                unsafe {
                    let target = self.target.at(row, column);
                    if columns == WIDTH {
                        kernel(self.inputs, x, w, target);
                        continue;
                    }
                    let mut beside = [[0f32; WIDTH]; MOST_ROWS];
                    let c = beside.as_mut_ptr().cast();
                    let mut tile = Target::overwritten(c, WIDTH, target.alpha);
                    if !target.base.is_null() {
                        for (i, sums) in beside[..rows].iter_mut().enumerate() {
                            let base = target.base.add(i * target.base_stride);
                            base.copy_to_nonoverlapping(sums.as_mut_ptr(), columns);
                        }
                        (tile.base, tile.base_stride) = (tile.c, WIDTH);
                    }
                    kernel(self.inputs, x, w, tile);
                    for (i, sums) in beside[..rows].iter().enumerate() {
                        let c = target.c.add(i * target.c_stride);
                        c.copy_from_nonoverlapping(sums.as_ptr(), columns);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Those that can run here.
    fn leaves() -> Vec<(String, &'static PanelLeaf)> {
        let mut leaves: Vec<_> = Isa::available()
            .into_iter()
            .map(|isa| (format!("{isa:?}"), PanelLeaf::of(isa)))
            .collect();
        #[cfg(target_arch = "x86_64")]
        leaves.push(("modelled AVX-512".to_owned(), &super::super::avx512::modelled::PANELS));
        leaves
    }

    fn wave(n: usize, speed: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * speed).sin()).collect()
    }

    /// The panels of `outputs` rows, and the numbers in them.
    fn weight([outputs, inputs]: [usize; 2], is_bf16: bool) -> (Panels, Vec<f32>) {
        let values = wave(outputs * inputs, 0.4);
        if !is_bf16 {
            return (Panels::of_f32(&values, [outputs, inputs]), values);
        }
        let values: Vec<bf16> = values.into_iter().map(bf16::from_f32).collect();
        let panels = Panels::of_bf16(&values, [outputs, inputs]);
        (panels, values.into_iter().map(bf16::to_f32).collect())
    }

    const SENTINEL: f32 = 12_345.0;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn product_of_any_shape_and_place_is_that_of_f64(
            rows in prop_oneof![1..9usize, 14..19usize, 31..40usize],
            outputs in 1..70usize, inputs in 1..100usize,
            is_bf16 in any::<bool>(), margin in 0..4usize, alpha in -2.0..2.0f32,
        ) {
            let (panels, values) = weight([outputs, inputs], is_bf16);
            let x = wave(rows * (inputs + 2 * margin), 0.7);
            let x = MatRef::new(&x, rows, inputs + 2 * margin).columns(margin..margin + inputs);
            let Elements::F32(x_values) = x.elements else { unreachable!() };
            let exact = |row: usize, output: usize| -> f64 {
                let x = &x_values[x.start + row * x.stride..][..inputs];
                let w = &values[output * inputs..][..inputs];
                x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum()
            };
            for (name, leaf) in leaves() {
                let y = panels.product_by(leaf, x);
                let width = outputs + 2 * margin;
                let mut sum = vec![SENTINEL; rows * width];
                let target = MatMut::new(&mut sum, rows, width).columns(margin..margin + outputs);
                panels.add_product_by(leaf, target, alpha, x);
                for (row, (y, sum)) in y.chunks(outputs).zip(sum.chunks(width)).enumerate() {
                    let (left, rest) = sum.split_at(margin);
                    let (sum, right) = rest.split_at(outputs);
                    prop_assert!(left.iter().chain(right).all(|&x| x == SENTINEL), "{name}");
                    for (output, (&y, &sum)) in y.iter().zip(sum).enumerate() {
                        let exact = exact(row, output);
                        prop_assert!((f64::from(y) - exact).abs() < 2e-5, "{name}");
                        let sum = f64::from(sum) - f64::from(SENTINEL);
                        prop_assert!((sum - f64::from(alpha) * exact).abs() < 2e-3, "{name}");
                    }
                }
            }
        }
    }

    #[test]
    fn row_has_the_same_bits_alone_and_among_others_on_every_path() {
        let (rows, [outputs, inputs]) = (37, [40, 300]);
        let x = wave(rows * inputs, 0.7);
        for is_bf16 in [false, true] {
            let (panels, _) = weight([outputs, inputs], is_bf16);
            for (name, leaf) in leaves() {
                let product = |rows: Range<usize>| {
                    let x = &x[rows.start * inputs..rows.end * inputs];
                    panels.product_by(leaf, MatRef::new(x, rows.len(), inputs))
                };
                let together = product(0..rows);
                for first in 0..rows {
                    for count in [1, 2, 5, 17].into_iter().filter(|count| first + count <= rows) {
                        let expected = &together[first * outputs..][..count * outputs];
                        assert_eq!(product(first..first + count), expected, "{name}");
                    }
                }
            }
        }
    }

    #[test]
    fn row_has_the_same_bits_on_one_thread_and_shared_by_several() {
        let (rows, [outputs, inputs]) = (11, [200, 300]);
        assert!(outputs * inputs < PARALLEL_MIN_MULTIPLY_ADDS);
        let (panels, _) = weight([outputs, inputs], false);
        let x = wave(rows * inputs, 0.7);
        let together = panels.product(MatRef::new(&x, rows, inputs));
        for (x, expected) in x.chunks(inputs).zip(together.chunks(outputs)) {
            assert_eq!(panels.product(MatRef::new(x, 1, inputs)), expected);
        }
    }

    #[test]
    fn rows_are_read_back_as_they_were() {
        for is_bf16 in [false, true] {
            let (panels, values) = weight([37, 50], is_bf16);
            for (output, expected) in values.chunks(50).enumerate() {
                let mut row = vec![0.0; 50];
                panels.row(output, &mut row);
                assert_eq!(row, expected);
            }
        }
    }

    #[test]
    fn products_without_rows_columns_or_k_are_empty_or_zero() {
        let product = |rows: usize, [outputs, inputs]: [usize; 2]| {
            let (panels, _) = weight([outputs, inputs], false);
            panels.product(MatRef::new(&vec![1.0; rows * inputs], rows, inputs))
        };
        assert_eq!(product(0, [3, 4]), [0.0; 0]);
        assert_eq!(product(2, [0, 4]), [0.0; 0]);
        assert_eq!(product(2, [3, 0]), [0.0; 6]);
    }
}
