//! Blocking, threads, and which operands are packed.
//!
//! ```text
//! for each group of k blocks, rows and columns, of which the packed operands fit the last cache
//!   pack the columns of B, and the rows of A unless they are lanes as they lie, in parallel
//!   in parallel over blocks of C:
//!     for each k block
//!       A packed: for each panel of B, for each panel of A, from the second-level cache
//!       else:     for each panel of A, for each panel of B, from the second-level cache
//!         register tile
//! ```
//!
//! An element of C is the sum over the steps of a k block, in order, added block by block, in
//! order. As blocks depend on k alone, its bits depend neither on the threads nor on what is
//! packed, nor on how many rows and columns there are beside it, but for the next cases.
//!
//! A product may have a second pair of operands, A′·B′, with few k. They are packed behind the last
//! k block, as if its rows and columns went on; where A is read where it lies, a tile adds them as
//! one more block, while its part of C is still in the first-level cache.
//!
//! Very few rows or columns, as when text is generated, are computed as inner products: each
//! operand is read once. Where one operand has few rows or columns, packing the other would cost as
//! much as the product: then a tile reads the large one where it lies, if its elements are lanes
//! already. If it is on the side where a tile cannot do that, the transposed product is computed.

use rayon::prelude::*;

use super::MatRef;
use super::leaf::{Lane, LanesOfA, LanesOfB, Leaf, Target};
use super::scratch::{Scratch, Slot};
use super::side::{Blocks, Side, is_lanes, rows_collide};
use super::tile::DOT_ROWS;

/// Rows or columns up to which a product is computed as inner products.
const VECTORS: usize = 5;
/// Rows to one task of inner products.
const DOT_BLOCK: usize = 64;
/// Columns up to which A is read where it lies.
const FEW_COLUMNS: usize = 48;
/// Rows up to which B is read where it lies: each panel of rows goes through all of it.
const FEW_ROWS: usize = 16;
/// What a tile's loads and its start cost, in rows of it.
const TILE_LOADS: usize = 2;
/// Lanes that are packed at a time, of both operands: 4 MiB, to stay in the last cache.
const GROUP_LANES: usize = 1 << 20;
/// Lanes to one block of C of the operand that stays in the second-level cache: half of one of 512
/// KiB.
const BLOCK_LANES: usize = 1 << 16;
/// Panels that one job packs.
const PACK_PANELS: usize = 8;
/// Tiles of a block of C: so few that threads wait for the last one only shortly, and enough to be
/// worth handing over.
const BLOCK_TILES: usize = 16;
/// Blocks of rows to a thread at least, where there are few columns.
const ROW_BLOCKS_PER_THREAD: usize = 4;

/// C = base + α·(A·B + A′·B′). In what follows rows are those of A, and columns those of B, also
/// where C is written transposed.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub(super) leaf: &'static Leaf,
    pub(super) a: MatRef<'a>,
    pub(super) b: MatRef<'a>,
    /// A′ and B′.
    pub(super) more: Option<[MatRef<'a>; 2]>,
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

/// What is packed at present, or would be if it were not read where it lies.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Group {
    first_panel: usize,
    panels: usize,
    first_block: usize,
    blocks: usize,
}

/// The size of equal parts of `count`, each at most `most`.
fn even_part(count: usize, most: usize) -> usize {
    count.div_ceil(count.div_ceil(most))
}

/// Does `count` pieces of work, on other threads of the pool too where they are `shared`.
pub(super) fn for_each(count: usize, shared: bool, work: impl Fn(usize) + Send + Sync) {
    if shared && count > 1 {
        (0..count).into_par_iter().with_max_len(1).for_each(work);
    } else {
        (0..count).for_each(work);
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
        let more = self.more.map(|[a, b]| [b.t(), a.t()]);
        Self { a: self.b.t(), b: self.a.t(), more, c, ..self }
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
            let (a, b) = self.sides();
            if few_columns && a.direct {
                return self.compute(a, Side { direct: false, ..b });
            }
            if few_rows && b.direct {
                return self.compute(Side { direct: false, ..a }, b);
            }
            let (turned_a, turned_b) = turned.sides();
            if turned.b.columns <= FEW_COLUMNS && turned_a.direct {
                return turned.compute(turned_a, Side { direct: false, ..turned_b });
            }
            if turned.a.rows <= FEW_ROWS && turned_b.direct {
                return turned.compute(Side { direct: false, ..turned_a }, turned_b);
            }
            let a = Side { direct: a.direct && !rows_collide(&self.a), ..a };
            let b = Side { direct: false, ..b };
            // All of the turned product's elements are put one by one: it must be worth that.
            if !a.direct && turned.tile_cost() * 4 < self.tile_cost() * 3 {
                let packed = |side| Side { direct: false, ..side };
                return turned.compute(packed(turned_a), packed(turned_b));
            }
            self.compute(a, b);
        }
    }

    fn sides(&self) -> (Side<'a>, Side<'a>) {
        let [more_a, more_b] = self.more.map_or([None; 2], |more| more.map(Some));
        (Side::rows_of(self.a, more_a, self.leaf), Side::columns_of(self.b, more_b, self.leaf))
    }

    /// What a step of k costs in tiles, that have few rows or columns at the edges: in rows of a
    /// tile, of which its loads are some more.
    fn tile_cost(&self) -> usize {
        let row_panels = self.a.rows.div_ceil(self.leaf.rows);
        let column_panels = self.b.columns.div_ceil(self.leaf.columns);
        (self.a.rows + row_panels * TILE_LOADS) * column_panels
    }

    /// Whether the rows of A and the columns of B lie in memory as inner products read them.
    fn is_dots(&self) -> bool {
        let along_k = self.more.is_none() && !self.a.transposed && self.b.transposed;
        along_k && self.leaf.depth == 1 && [self.a, self.b].iter().all(|x| is_lanes(x, self.leaf))
    }

    /// # Safety
    /// As for [`Product::run`], where [`Product::is_dots`].
    unsafe fn dots(&self) {
        let Self { leaf, a, b, alpha, c: destination, .. } = *self;
        for_each(a.rows.div_ceil(DOT_BLOCK), self.shared, |block| {
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

    /// # Safety
    /// As for [`Product::run`].
    unsafe fn compute(self, a: Side<'_>, b: Side<'_>) {
        let blocks =
            Blocks::new(self.leaf, self.a.columns, self.more.map_or(0, |[a, _]| a.columns));
        let (a_panels, b_panels) = (a.group_panels(), b.group_panels());
        let (a_lanes, b_lanes) = (a.panel_lanes(blocks), b.panel_lanes(blocks));
        let per_block = if a.direct { 0 } else { a_panels * a_lanes }
            + if b.direct { 0 } else { b_panels * b_lanes };
        let group_blocks = (GROUP_LANES / per_block.max(1)).clamp(1, blocks.count);

        // Of an operand that is read where it lies, a partial panel of B is still packed, and A′.
        let a_scratch = match (a.direct, a.more) {
            (true, None) => 0,
            (true, Some(_)) => a_panels * a_lanes,
            (false, _) => a_panels * a_lanes * group_blocks,
        };
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
        let panels = match (side.direct, side.is_b) {
            (false, _) => group.panels,
            (true, true) => 1,
            // A′ is there once.
            (true, false) => 0,
        };
        (panels * panel, panel)
    }

    /// Jobs that pack the panels of a group, for each k block of it.
    fn pack_jobs(group: Group) -> usize {
        group.panels.div_ceil(PACK_PANELS)
    }

    /// # Safety
    /// As for [`Product::run`]; the buffers hold the groups.
    unsafe fn pack(&self, pack_a: bool, pack_b: bool) {
        let a_blocks = match (self.a.direct, self.a.more) {
            (false, _) => self.a_group.blocks,
            // Behind the last k block.
            (true, Some(_))
                if self.a_group.first_block + self.a_group.blocks == self.blocks.count =>
            {
                1
            }
            (true, _) => 0,
        };
        let a_jobs = if pack_a { Self::pack_jobs(self.a_group) * a_blocks } else { 0 };
        let b_last = self.b_group.first_panel + self.b_group.panels - 1;
        let b_jobs = if !pack_b || self.b.reads_direct(b_last) {
            0
        } else if self.b.direct {
            self.b_group.blocks
        } else {
            Self::pack_jobs(self.b_group) * self.b_group.blocks
        };
        for_each(a_jobs + b_jobs, self.product.shared, |job| {
            let (side, group, target, job) = if job < a_jobs {
                (self.a, self.a_group, self.packed.a, job)
            } else {
                (self.b, self.b_group, self.packed.b, job - a_jobs)
            };
            let (block, first, panels) = if side.direct && side.is_b {
                (job, group.panels - 1, 1)
            } else {
                let jobs = Self::pack_jobs(group);
                let first = job % jobs * PACK_PANELS;
                let block = if side.direct { group.blocks - 1 } else { job / jobs };
                (block, first, PACK_PANELS.min(group.panels - first))
            };
            let (block_stride, panel_stride) = self.strides(side, group);
            let slot = if side.direct && side.is_b { 0 } else { first };
            // SAFETY: as the caller promises; the slot lies inside of the buffer.
            unsafe {
                let target = target.add(block * block_stride + slot * panel_stride);
                let first = group.first_panel + first;
                let block = group.first_block + block;
                side.pack(self.product.leaf, first..first + panels, (self.blocks, block), target);
            }
        });
    }

    /// # Safety
    /// As for [`Product::run`]; what is not read where it lies is packed.
    unsafe fn multiply(&self) {
        let (a_panels, b_panels, k_blocks) =
            (self.a_group.panels, self.b_group.panels, self.a_group.blocks);
        let threads = if self.product.shared { rayon::current_num_threads() } else { 1 };
        let most_rows =
            if threads > 1 { a_panels.div_ceil(threads * ROW_BLOCKS_PER_THREAD) } else { a_panels };
        let fitting =
            |side: &Side<'_>| (BLOCK_LANES / (side.panel_lanes(self.blocks) * k_blocks)).max(1);
        let filling = |panels: usize| BLOCK_TILES.div_ceil(panels * k_blocks);
        // The operand of which several panels stay in the second-level cache: B where A is read
        // where it lies, which takes a line of the first-level cache for every row.
        let (rows, columns) = if self.a.direct {
            let columns = even_part(b_panels, fitting(self.b));
            (even_part(a_panels, filling(columns).clamp(1, most_rows)), columns)
        } else {
            let rows = even_part(a_panels, fitting(self.a).min(most_rows));
            (rows, even_part(b_panels, filling(rows)))
        };
        let (row_blocks, column_blocks) = (a_panels.div_ceil(rows), b_panels.div_ceil(columns));
        for_each(row_blocks * column_blocks, self.product.shared, |block| {
            // Blocks next to each other have these panels in common.
            let (row, column) = if self.a.direct {
                (block % row_blocks, block / row_blocks)
            } else {
                (block / column_blocks, block % column_blocks)
            };
            let rows = row * rows..(row * rows + rows).min(a_panels);
            let columns = column * columns..(column * columns + columns).min(b_panels);
            for block in 0..k_blocks {
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
        let k_block = self.a_group.first_block + block;
        let (first_k, _) = self.blocks.range(k_block);
        let [own_steps, more_steps] = self.blocks.steps(k_block);
        // SAFETY: as the caller promises, all offsets lie inside of the views, of the packed
        // groups or of C.
        unsafe {
            let packed_a = {
                let (block_stride, panel_stride) = self.strides(self.a, self.a_group);
                let start = self.packed.a.wrapping_add(block * block_stride + i * panel_stride);
                LanesOfA { start, row: 1, step: leaf.a_stride }
            };
            let (a, kernels, steps) = if self.a.direct {
                let view = &self.a.view;
                let start = view.elements.lanes(view.start + row * view.stride + first_k);
                let row = if leaf.depth == 2 { view.stride / 2 } else { view.stride };
                (LanesOfA { start, row, step: 1 }, leaf.direct, own_steps)
            } else {
                (packed_a, leaf.packed, own_steps + more_steps)
            };
            let b = if self.b.reads_direct(j_panel) {
                let view = &self.b.view;
                let start = view.elements.lanes(view.start + first_k * view.stride + column);
                LanesOfB::near(start, view.stride)
            } else {
                let (block_stride, panel_stride) = self.strides(self.b, self.b_group);
                let slot = if self.b.direct { 0 } else { j };
                let start = self.packed.b.add(block * block_stride + slot * panel_stride);
                LanesOfB::near(start, leaf.columns)
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
            let (kernel, more_kernel) = (kernels[rows - 1], leaf.packed[rows - 1]);
            let compute = |target: Target| {
                kernel(steps, a, b, target);
                if self.a.direct && more_steps > 0 {
                    let b = LanesOfB { start: b.start.add(own_steps * b.step), ..b };
                    let base = target.c.cast_const();
                    let target = Target { base, base_stride: target.c_stride, ..target };
                    more_kernel(more_steps, packed_a, b, target);
                }
            };
            let alpha = self.product.alpha;
            let whole =
                columns == leaf.columns && c.column == 1 && (base.is_null() || base_column == 1);
            if whole {
                let target = Target { c: at, c_stride: c.row, base, base_stride: base_row, alpha };
                return compute(target);
            }
            // The tile that does not fit is computed beside C.
            let mut beside = [0f32; MAX_TILE];
            debug_assert!(leaf.rows * leaf.columns <= MAX_TILE);
            let target = Target::overwritten(beside.as_mut_ptr(), leaf.columns, alpha);
            compute(target);
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
