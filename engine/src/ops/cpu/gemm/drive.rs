//! Blocking, threads, and which operands are packed.
//!
//! ```text
//! for each group of k blocks, rows and columns, of which the packed operands fit the last cache
//!   pack the rows of A and the columns of B, in parallel
//!   in parallel over blocks of C:
//!     for each k block
//!       for each panel of B, which stays in the first-level cache
//!         for each panel of A, from the second-level cache
//!           register tile
//! ```
//!
//! An element of C is the sum over the steps of a k block, in order, added block by block, in
//! order. As blocks depend on k alone, its bits depend neither on the threads nor on what is
//! packed, nor on how many rows and columns there are beside it, but for the next case.
//!
//! Very few rows or columns, as when text is generated, are computed as inner products: each
//! operand is read once. Where one operand has few rows or columns, packing the other would cost as much as the product:
//! then a tile reads the large one where it lies, if its elements are lanes already. If it is on
//! the side where a tile cannot do that, the transposed product is computed.

use rayon::prelude::*;

use super::leaf::{Lane, LanesOfA, LanesOfB, Leaf, Target};
use super::pack::{PackJob, panel_stride};
use super::scratch::{Scratch, Slot};
use super::tile::DOT_ROWS;
use super::{Elements, MatRef};

/// Rows or columns up to which a product is computed as inner products.
const VECTORS: usize = 5;
/// Rows to one task of inner products.
const DOT_BLOCK: usize = 64;
/// Columns up to which A is read where it lies.
const FEW_COLUMNS: usize = 48;
/// Rows up to which B is read where it lies: each panel of rows goes through all of it.
const FEW_ROWS: usize = 16;
/// Rows, and columns, that are packed at a time.
const GROUP_ITEMS: usize = 2048;
/// Lanes that are packed at a time, of both operands: 4 MiB, to stay in the last cache.
const GROUP_LANES: usize = 1 << 20;
/// Lanes of A to one block of C: half of a second-level cache of 512 KiB.
const BLOCK_LANES: usize = 1 << 16;
/// Panels that one job packs.
const PACK_PANELS: usize = 8;
/// Blocks of C to a thread, so that threads that fell behind cost little.
const BLOCKS_PER_THREAD: usize = 4;

/// C = base + α·A·B. In what follows rows are those of A, and columns those of B, also where C is
/// written transposed.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub(super) leaf: &'static Leaf,
    pub(super) a: MatRef<'a>,
    pub(super) b: MatRef<'a>,
    pub(super) alpha: f32,
    pub(super) c: Destination,
    /// Whether other threads of the pool take part.
    pub(super) shared: bool,
}

/// C and its base: element (i, j) is at `i · row + j · column`.
#[derive(Clone, Copy)]
pub(super) struct Destination {
    pub(super) c: *mut f32,
    pub(super) row: usize,
    pub(super) column: usize,
    /// Null for none.
    pub(super) base: *const f32,
    pub(super) base_row: usize,
    pub(super) base_column: usize,
}

// SAFETY: who makes one promises that the memory is valid; blocks of C are disjoint.
unsafe impl Send for Destination {}
// SAFETY: as above.
unsafe impl Sync for Destination {}

/// An operand as tiles read it.
struct Side<'a> {
    view: MatRef<'a>,
    /// Rows of A, or columns of B.
    items: usize,
    /// Whether a row in memory holds the k of one item.
    k_in_rows: bool,
    /// Read where it lies.
    direct: bool,
    width: usize,
    lanes_per_step: usize,
}

/// What is packed at present, or would be if it were not read where it lies.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Group {
    first_panel: usize,
    panels: usize,
    first_block: usize,
    blocks: usize,
}

/// How k is cut.
#[derive(Clone, Copy)]
struct Blocks {
    k: usize,
    depth: usize,
    /// Steps of a block; the last one may have fewer.
    steps: usize,
    count: usize,
}

impl Blocks {
    fn new(leaf: &Leaf, k: usize) -> Self {
        let steps = k.div_ceil(leaf.depth);
        let count = steps.div_ceil(leaf.steps).max(1);
        Self { k, depth: leaf.depth, steps: steps.div_ceil(count).max(1), count }
    }

    /// The first k of a block, and how many there are.
    fn range(self, block: usize) -> (usize, usize) {
        let first = block * self.steps * self.depth;
        (first, (self.steps * self.depth).min(self.k.saturating_sub(first)))
    }
}

impl<'a> Side<'a> {
    fn rows_of(a: MatRef<'a>, leaf: &Leaf) -> Self {
        let k_in_rows = !a.transposed;
        Self {
            view: a,
            items: a.rows,
            k_in_rows,
            direct: k_in_rows && is_lanes(&a, leaf),
            width: leaf.rows,
            lanes_per_step: leaf.a_stride,
        }
    }

    fn columns_of(b: MatRef<'a>, leaf: &Leaf) -> Self {
        let k_in_rows = b.transposed;
        Self {
            view: b,
            items: b.columns,
            k_in_rows,
            // A pair of k is two rows apart here.
            direct: !k_in_rows && leaf.depth == 1 && is_lanes(&b, leaf),
            width: leaf.columns,
            lanes_per_step: leaf.columns,
        }
    }

    fn panels(&self) -> usize {
        self.items.div_ceil(self.width)
    }

    /// Panels of a group of at most [`GROUP_ITEMS`].
    fn group_panels(&self) -> usize {
        let panels = self.panels();
        let groups = self.items.div_ceil(GROUP_ITEMS).max(1);
        panels.div_ceil(groups).max(1)
    }

    /// Lanes of one panel of one full k block, padding included.
    fn panel_lanes(&self, blocks: Blocks) -> usize {
        panel_stride(blocks.steps, self.lanes_per_step)
    }

    /// Whether a panel is read where it lies: of B only a full one, as a tile reads whole vectors.
    fn reads_direct(&self, panel: usize, is_b: bool) -> bool {
        self.direct && (!is_b || (panel + 1) * self.width <= self.items)
    }

    /// Packs some panels of one k block.
    ///
    /// # Safety
    /// The CPU has the leaf's instructions; `target` is valid for the panels.
    unsafe fn pack(
        &self,
        leaf: &Leaf,
        first_panel: usize,
        panels: usize,
        (first_k, k): (usize, usize),
        panel_stride: usize,
        target: *mut Lane,
    ) {
        let first = first_panel * self.width;
        let items = (panels * self.width).min(self.items - first);
        let [row, column] = if self.k_in_rows { [first, first_k] } else { [first_k, first] };
        let (rows, columns) = if self.k_in_rows { (items, k) } else { (k, items) };
        let position = self.view.start + row * self.view.stride + column;
        let mut decoded = None;
        let (source, stride) = match self.view.elements.memory(position) {
            Some(source) => (source, self.view.stride),
            None => {
                let scratch = decoded.insert(Scratch::take(Slot::Decoded, rows * columns));
                (self.view.decode(position, rows, columns, scratch), columns)
            }
        };
        let job = PackJob {
            source,
            stride,
            k_in_rows: self.k_in_rows,
            items,
            k,
            width: self.width,
            lanes_per_step: self.lanes_per_step,
            panel_stride,
            target,
        };
        // SAFETY: the view lies inside of its memory, and the target is as the caller promises.
        unsafe { (leaf.pack)(&job) }
    }
}

/// Whether the elements in memory are lanes as the leaf's tile reads them.
fn is_lanes(view: &MatRef<'_>, leaf: &Leaf) -> bool {
    match view.elements {
        Elements::F32(_) => leaf.depth == 1 && !leaf.rounds,
        // Pairs must not reach over the end of a row.
        Elements::Bf16(_) => {
            leaf.depth == 2 && view.stride.is_multiple_of(2) && view.columns.is_multiple_of(2)
        }
        Elements::Encoded(_) => false,
    }
}

impl<'a> Product<'a> {
    /// The same product, Cᵀ = base + α·Bᵀ·Aᵀ.
    fn transposed(self) -> Self {
        let Destination { c, row, column, base, base_row, base_column } = self.c;
        let c = Destination {
            c,
            row: column,
            column: row,
            base,
            base_row: base_column,
            base_column: base_row,
        };
        Self { a: self.b.t(), b: self.a.t(), c, ..self }
    }

    /// Computes it.
    ///
    /// # Safety
    /// The CPU has the leaf's instructions; the views lie inside of their memory; the destination
    /// is valid for writes, its base for reads, and neither A nor B overlap it. C has at least one
    /// element, and k is at least 1.
    pub(super) unsafe fn run(self) {
        // SAFETY: as the caller promises.
        unsafe {
            // Vectors, more or less: inner products read both operands once.
            if self.b.columns <= VECTORS && self.is_dots() {
                return self.dots();
            }
            let turned = self.transposed();
            if turned.b.columns <= VECTORS && turned.is_dots() {
                return turned.dots();
            }
            let few_rows = self.a.rows <= FEW_ROWS;
            let few_columns = self.b.columns <= FEW_COLUMNS;
            let a = Side::rows_of(self.a, self.leaf);
            let b = Side::columns_of(self.b, self.leaf);
            if few_columns && a.direct {
                return self.compute(a, Side { direct: false, ..b });
            }
            if few_rows && b.direct {
                return self.compute(Side { direct: false, ..a }, b);
            }
            let turned_a = Side::rows_of(turned.a, self.leaf);
            let turned_b = Side::columns_of(turned.b, self.leaf);
            if turned.b.columns <= FEW_COLUMNS && turned_a.direct {
                return turned.compute(turned_a, Side { direct: false, ..turned_b });
            }
            if turned.a.rows <= FEW_ROWS && turned_b.direct {
                return turned.compute(Side { direct: false, ..turned_a }, turned_b);
            }
            self.compute(Side { direct: false, ..a }, Side { direct: false, ..b });
        }
    }

    /// Whether the rows of A and the columns of B lie in memory as inner products read them.
    fn is_dots(&self) -> bool {
        let along_k = !self.a.transposed && self.b.transposed;
        along_k && self.leaf.depth == 1 && [self.a, self.b].iter().all(|x| is_lanes(x, self.leaf))
    }

    /// # Safety
    /// As for [`Product::run`], where [`Product::is_dots`].
    unsafe fn dots(&self) {
        let Self { leaf, a, b, alpha, c: destination, .. } = *self;
        self.for_each(a.rows.div_ceil(DOT_BLOCK), |block| {
            // As a whole: its pointers alone may not go to other threads.
            let c = destination;
            let end = (block * DOT_BLOCK + DOT_BLOCK).min(a.rows);
            let mut row = block * DOT_BLOCK;
            while row < end {
                // Fewer rows than are computed at a time: one of them, several times.
                let (count, stride) =
                    if end - row >= DOT_ROWS { (DOT_ROWS, a.stride) } else { (1, 0) };
                let start = a.elements.lanes(a.start + row * a.stride);
                let lanes = LanesOfA { start, row: stride, step: 1 };
                for column in 0..b.columns {
                    let mut sums = [0f32; DOT_ROWS];
                    let vector = b.elements.lanes(b.start + column * b.stride);
                    // SAFETY: as the caller promises, all offsets lie inside of the views and of C.
                    unsafe {
                        (leaf.dots)(a.columns, lanes, vector, sums.as_mut_ptr());
                        for (row, sum) in (row..).zip(&sums[..count]) {
                            let mut value = alpha * sum;
                            if !c.base.is_null() {
                                value += *c.base.add(row * c.base_row + column * c.base_column);
                            }
                            *c.c.add(row * c.row + column * c.column) = value;
                        }
                    }
                }
                row += count;
            }
        });
    }

    fn for_each(&self, count: usize, work: impl Fn(usize) + Send + Sync) {
        if self.shared && count > 1 {
            (0..count).into_par_iter().with_max_len(1).for_each(work);
        } else {
            (0..count).for_each(work);
        }
    }

    /// # Safety
    /// As for [`Product::run`].
    unsafe fn compute(self, a: Side<'_>, b: Side<'_>) {
        let blocks = Blocks::new(self.leaf, self.a.columns);
        let (a_panels, b_panels) = (a.group_panels(), b.group_panels());
        let (a_lanes, b_lanes) = (a.panel_lanes(blocks), b.panel_lanes(blocks));
        let per_block = if a.direct { 0 } else { a_panels * a_lanes }
            + if b.direct { 0 } else { b_panels * b_lanes };
        let group_blocks = (GROUP_LANES / per_block.max(1)).clamp(1, blocks.count);

        // A partial panel of an operand that is read where it lies is still packed.
        let a_scratch = if a.direct { 0 } else { a_panels * a_lanes * group_blocks };
        let b_scratch = (if b.direct { 1 } else { b_panels }) * b_lanes * group_blocks;
        let mut a_scratch = (a_scratch > 0).then(|| Scratch::take(Slot::A, a_scratch));
        let mut b_scratch = Scratch::take(Slot::B, b_scratch);
        let packed = Packed {
            a: a_scratch.as_mut().map_or(std::ptr::null_mut(), Scratch::as_mut_ptr),
            b: b_scratch.as_mut_ptr(),
        };
        let (mut packed_a, mut packed_b) = (None, None);

        let groups = |panels: usize, group: usize| {
            (0..panels).step_by(group).map(move |first| (first, group.min(panels - first)))
        };
        for (first_block, block_count) in groups(blocks.count, group_blocks) {
            let group = |(first_panel, panels)| Group {
                first_panel,
                panels,
                first_block,
                blocks: block_count,
            };
            let work = |a_group: Group, b_group: Group| Work {
                product: &self,
                a: &a,
                b: &b,
                a_group,
                b_group,
                blocks,
                packed,
            };
            let mut visit = |a_group: Group, b_group: Group| {
                let work = work(a_group, b_group);
                // SAFETY: as the caller promises; the buffers hold a group of each operand.
                unsafe {
                    work.pack(
                        packed_a.replace(a_group) != Some(a_group),
                        packed_b.replace(b_group) != Some(b_group),
                    );
                    work.multiply();
                }
            };
            // The operand with more groups changes in the inner loop, and the other stays packed.
            if a.panels().div_ceil(a_panels) > b.panels().div_ceil(b_panels) {
                for columns in groups(b.panels(), b_panels) {
                    for rows in groups(a.panels(), a_panels) {
                        visit(group(rows), group(columns));
                    }
                }
            } else {
                for rows in groups(a.panels(), a_panels) {
                    for columns in groups(b.panels(), b_panels) {
                        visit(group(rows), group(columns));
                    }
                }
            }
        }
    }
}

/// Where the packed panels of the groups at hand are.
#[derive(Clone, Copy)]
struct Packed {
    a: *mut Lane,
    b: *mut Lane,
}

// SAFETY: jobs write disjoint panels, and none reads before all are written.
unsafe impl Send for Packed {}
// SAFETY: as above.
unsafe impl Sync for Packed {}

/// The product of one group of rows and one of columns over some k blocks.
struct Work<'a> {
    product: &'a Product<'a>,
    a: &'a Side<'a>,
    b: &'a Side<'a>,
    a_group: Group,
    b_group: Group,
    blocks: Blocks,
    packed: Packed,
}

// SAFETY: all that it points to is read only, but for what its pointers' types answer for.
unsafe impl Sync for Work<'_> {}

impl Work<'_> {
    /// Lanes from one k block to the next in a group's buffer, and from one panel to the next.
    fn strides(&self, side: &Side<'_>, group: Group) -> (usize, usize) {
        let panel = side.panel_lanes(self.blocks);
        let panels = if side.direct { 1 } else { group.panels };
        (panels * panel, panel)
    }

    /// # Safety
    /// As for [`Product::run`]; the buffers hold the groups.
    unsafe fn pack(&self, pack_a: bool, pack_b: bool) {
        let a_jobs = if !pack_a || self.a.direct {
            0
        } else {
            self.a_group.panels.div_ceil(PACK_PANELS) * self.a_group.blocks
        };
        let b_last = self.b_group.first_panel + self.b_group.panels - 1;
        let b_jobs = if !pack_b || self.b.reads_direct(b_last, true) {
            0
        } else if self.b.direct {
            self.b_group.blocks
        } else {
            self.b_group.panels.div_ceil(PACK_PANELS) * self.b_group.blocks
        };
        self.product.for_each(a_jobs + b_jobs, |job| {
            let (side, group, target, job) = if job < a_jobs {
                (self.a, self.a_group, self.packed.a, job)
            } else {
                (self.b, self.b_group, self.packed.b, job - a_jobs)
            };
            let (block, first, panels) = if side.direct {
                (job, group.panels - 1, 1)
            } else {
                let jobs = group.panels.div_ceil(PACK_PANELS);
                let first = job % jobs * PACK_PANELS;
                (job / jobs, first, PACK_PANELS.min(group.panels - first))
            };
            let (block_stride, panel_stride) = self.strides(side, group);
            let slot = if side.direct { 0 } else { first };
            let range = self.blocks.range(group.first_block + block);
            // SAFETY: as the caller promises; the slot lies inside of the buffer.
            unsafe {
                let target = target.add(block * block_stride + slot * panel_stride);
                let first = group.first_panel + first;
                side.pack(self.product.leaf, first, panels, range, panel_stride, target);
            }
        });
    }

    /// # Safety
    /// As for [`Product::run`]; what is not read where it lies is packed.
    unsafe fn multiply(&self) {
        let threads = if self.product.shared { rayon::current_num_threads() } else { 1 };
        let (a_panels, b_panels) = (self.a_group.panels, self.b_group.panels);
        let block_panels = (BLOCK_LANES / self.a.panel_lanes(self.blocks)).max(1);
        let wanted = if threads > 1 { threads * BLOCKS_PER_THREAD } else { 1 };
        let row_blocks = a_panels.div_ceil(block_panels).max(wanted.min(a_panels) / 2).max(1);
        let rows = a_panels.div_ceil(row_blocks);
        let row_blocks = a_panels.div_ceil(rows);
        let column_blocks = wanted.div_ceil(row_blocks).min(b_panels);
        let columns = b_panels.div_ceil(column_blocks);
        let column_blocks = b_panels.div_ceil(columns);
        self.product.for_each(row_blocks * column_blocks, |block| {
            let (row, column) = (block / column_blocks * rows, block % column_blocks * columns);
            let rows = row..(row + rows).min(a_panels);
            let columns = column..(column + columns).min(b_panels);
            for block in 0..self.a_group.blocks {
                // SAFETY: as the caller promises; blocks of C are disjoint.
                unsafe {
                    if self.a.direct {
                        for i in rows.clone() {
                            columns.clone().for_each(|j| self.tile(block, i, j));
                        }
                    } else {
                        for j in columns.clone() {
                            rows.clone().for_each(|i| self.tile(block, i, j));
                        }
                    }
                }
            }
        });
    }

    /// Panel i of A times panel j of B, counted within the groups, over one k block.
    ///
    /// # Safety
    /// As for [`Work::multiply`].
    #[inline]
    unsafe fn tile(&self, block: usize, i: usize, j: usize) {
        let (leaf, c) = (self.product.leaf, &self.product.c);
        let (i_panel, j_panel) = (self.a_group.first_panel + i, self.b_group.first_panel + j);
        let (row, column) = (i_panel * leaf.rows, j_panel * leaf.columns);
        let rows = leaf.rows.min(self.a.items - row);
        let columns = leaf.columns.min(self.b.items - column);
        let (first_k, k) = self.blocks.range(self.a_group.first_block + block);
        let steps = k.div_ceil(leaf.depth);
        // SAFETY: as the caller promises, all offsets lie inside of the views, of the packed
        // groups or of C.
        unsafe {
            let (a, kernels) = if self.a.direct {
                let view = &self.a.view;
                let start = view.elements.lanes(view.start + row * view.stride + first_k);
                let row = view.stride / leaf.depth;
                (LanesOfA { start, row, step: 1 }, leaf.direct)
            } else {
                let (block_stride, panel_stride) = self.strides(self.a, self.a_group);
                let start = self.packed.a.add(block * block_stride + i * panel_stride);
                (LanesOfA { start, row: 1, step: leaf.a_stride }, leaf.packed)
            };
            let b = if self.b.reads_direct(j_panel, true) {
                let view = &self.b.view;
                let start = view.elements.lanes(view.start + first_k * view.stride + column);
                LanesOfB { start, step: view.stride }
            } else {
                let (block_stride, panel_stride) = self.strides(self.b, self.b_group);
                let slot = if self.b.direct { 0 } else { j };
                let start = self.packed.b.add(block * block_stride + slot * panel_stride);
                LanesOfB { start, step: leaf.columns }
            };
            let at = c.c.add(row * c.row + column * c.column);
            // Behind the first k block, the sums so far are the base.
            let (base, base_row, base_column) = if first_k > 0 {
                (at.cast_const(), c.row, c.column)
            } else if c.base.is_null() {
                (c.base, 0, 0)
            } else {
                (c.base.add(row * c.base_row + column * c.base_column), c.base_row, c.base_column)
            };
            let kernel = kernels[rows - 1];
            let alpha = self.product.alpha;
            let whole =
                columns == leaf.columns && c.column == 1 && (base.is_null() || base_column == 1);
            if whole {
                let target = Target { c: at, c_stride: c.row, base, base_stride: base_row, alpha };
                return kernel(steps, a, b, target);
            }
            // The tile that does not fit is computed beside C.
            let mut beside = [0f32; MAX_TILE];
            debug_assert!(leaf.rows * leaf.columns <= MAX_TILE);
            let target = Target {
                c: beside.as_mut_ptr(),
                c_stride: leaf.columns,
                base: std::ptr::null(),
                base_stride: 0,
                alpha,
            };
            kernel(steps, a, b, target);
            let put = |i: usize, j: usize| {
                let mut value = beside[i * leaf.columns + j];
                if !base.is_null() {
                    value += *base.add(i * base_row + j * base_column);
                }
                *at.add(i * c.row + j * c.column) = value;
            };
            // In the order of memory.
            if c.row < c.column {
                (0..columns).for_each(|j| (0..rows).for_each(|i| put(i, j)));
            } else {
                (0..rows).for_each(|i| (0..columns).for_each(|j| put(i, j)));
            }
        }
    }
}

/// Elements of the largest tile.
const MAX_TILE: usize = 14 * 32;
