//! Operands as tiles read them: cut into blocks of k and panels, packed or where they lie.

use std::ops::Range;

use half::bf16;

use super::leaf::{Lane, Leaf};
use super::pack::{PackJob, panel_stride};
use super::scratch::{Scratch, Slot};
use super::{Elements, MatRef};

/// Rows, and columns, that are packed at a time.
const GROUP_ITEMS: usize = 2048;
/// Bytes of a page, and of one way of a first-level cache.
const PAGE: usize = 4096;

/// An operand as tiles read it.
pub(super) struct Side<'a> {
    pub(super) view: MatRef<'a>,
    /// A′ or B′.
    pub(super) more: Option<MatRef<'a>>,
    /// Whether this is B.
    pub(super) is_b: bool,
    /// Rows of A, or columns of B.
    pub(super) items: usize,
    /// Read where it lies.
    pub(super) direct: bool,
    pub(super) width: usize,
    pub(super) lanes_per_step: usize,
}

/// How k is cut.
#[derive(Clone, Copy)]
pub(super) struct Blocks {
    k: usize,
    depth: usize,
    /// Steps of a block; the last one may have fewer.
    steps: usize,
    pub(super) count: usize,
    /// k of the second pair of operands, behind the last block.
    more: usize,
    /// Steps of the last block, and of the second pair behind it.
    last: [usize; 2],
}

impl Blocks {
    pub(super) fn new(leaf: &Leaf, k: usize, more: usize) -> Self {
        let steps = k.div_ceil(leaf.depth);
        let count = steps.div_ceil(leaf.steps).max(1);
        let most = steps.div_ceil(count).max(1);
        let last = [steps.saturating_sub(most * (count - 1)), more.div_ceil(leaf.depth)];
        Self { k, depth: leaf.depth, steps: most, count, more, last }
    }

    /// Steps of a block, and of the second pair of operands behind it.
    pub(super) fn steps(self, block: usize) -> [usize; 2] {
        if block + 1 == self.count { self.last } else { [self.steps, 0] }
    }

    /// The first k of a block, and how many there are.
    pub(super) fn range(self, block: usize) -> (usize, usize) {
        let first = block * self.steps * self.depth;
        (first, (self.steps * self.depth).min(self.k.saturating_sub(first)))
    }
}

impl<'a> Side<'a> {
    pub(super) fn rows_of(a: MatRef<'a>, more: Option<MatRef<'a>>, leaf: &Leaf) -> Self {
        Self {
            view: a,
            more,
            is_b: false,
            items: a.rows,
            direct: !a.transposed && is_lanes(&a, leaf),
            width: leaf.rows,
            lanes_per_step: leaf.a_stride,
        }
    }

    pub(super) fn columns_of(b: MatRef<'a>, more: Option<MatRef<'a>>, leaf: &Leaf) -> Self {
        Self {
            view: b,
            more,
            is_b: true,
            items: b.columns,
            // A pair of k is two rows apart here.
            direct: more.is_none() && !b.transposed && leaf.depth == 1 && is_lanes(&b, leaf),
            width: leaf.columns,
            lanes_per_step: leaf.columns,
        }
    }

    pub(super) fn panels(&self) -> usize {
        self.items.div_ceil(self.width)
    }

    /// Panels of a group of at most [`GROUP_ITEMS`].
    pub(super) fn group_panels(&self) -> usize {
        let panels = self.panels();
        let groups = self.items.div_ceil(GROUP_ITEMS).max(1);
        panels.div_ceil(groups).max(1)
    }

    /// Whether only the second operand is packed.
    fn packs_only_more(&self) -> bool {
        self.direct && !self.is_b
    }

    /// Lanes of one packed panel of one full k block, padding included.
    pub(super) fn panel_lanes(&self, blocks: Blocks) -> usize {
        let [_, more] = blocks.last;
        let steps = if self.packs_only_more() { more } else { blocks.steps + more };
        panel_stride(steps, self.lanes_per_step)
    }

    /// Whether a panel is read where it lies: of B only a full one, as a tile reads whole vectors.
    pub(super) fn reads_direct(&self, panel: usize) -> bool {
        self.direct && (!self.is_b || (panel + 1) * self.width <= self.items)
    }

    /// Packs some panels of one k block, and of the second operand what comes behind it.
    ///
    /// # Safety
    /// The CPU has the leaf's instructions; `target` is valid for the panels.
    pub(super) unsafe fn pack(
        &self,
        leaf: &Leaf,
        panels: Range<usize>,
        (blocks, block): (Blocks, usize),
        target: *mut Lane,
    ) {
        let stride = self.panel_lanes(blocks);
        let (first_k, k) = blocks.range(block);
        // SAFETY: as the caller promises. A panel has room for the block's steps and those behind
        // it, which are written last, as packing may write a little more than is asked for.
        unsafe {
            let mut target = target;
            if !self.packs_only_more() {
                self.pack_view(leaf, &self.view, panels.clone(), (first_k, k), stride, target);
                target = target.add(blocks.steps(block)[0] * self.lanes_per_step);
            }
            if let Some(more) = self.more.as_ref().filter(|_| blocks.steps(block)[1] > 0) {
                self.pack_view(leaf, more, panels, (0, blocks.more), stride, target);
            }
        }
    }

    /// # Safety
    /// As for [`Side::pack`].
    unsafe fn pack_view(
        &self,
        leaf: &Leaf,
        view: &MatRef<'_>,
        panels: Range<usize>,
        (first_k, k): (usize, usize),
        panel_stride: usize,
        target: *mut Lane,
    ) {
        // Whether a row in memory holds the k of one item.
        let k_in_rows = view.transposed == self.is_b;
        let first = panels.start * self.width;
        let items = (panels.len() * self.width).min(self.items - first);
        let [row, column] = if k_in_rows { [first, first_k] } else { [first_k, first] };
        let (rows, columns) = if k_in_rows { (items, k) } else { (k, items) };
        let position = view.start + row * view.stride + column;
        let mut decoded = None;
        let (source, stride) = match view.elements.memory(position) {
            Some(source) => (source, view.stride),
            None => {
                let scratch = decoded.insert(Scratch::take(Slot::Decoded, rows * columns));
                (view.decode(position, rows, columns, scratch), columns)
            }
        };
        let job = PackJob {
            source,
            stride,
            k_in_rows,
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

/// Whether the rows of a matrix in memory begin at the same place of a page: the lines of a tile's
/// rows would then share their sets of the first-level cache.
pub(super) fn rows_collide(view: &MatRef<'_>) -> bool {
    let bytes = if view.elements.is_bf16() { size_of::<bf16>() } else { size_of::<f32>() };
    (view.stride * bytes).is_multiple_of(PAGE)
}

/// Whether the elements in memory are lanes as the leaf's tile reads them.
pub(super) fn is_lanes(view: &MatRef<'_>, leaf: &Leaf) -> bool {
    match view.elements {
        Elements::F32(_) => leaf.depth == 1 && !leaf.rounds,
        // Pairs must not reach over the end of a row.
        Elements::Bf16(_) => {
            leaf.depth == 2 && view.stride.is_multiple_of(2) && view.columns.is_multiple_of(2)
        }
        Elements::Widened(_) | Elements::Encoded(_) => false,
    }
}
