//! Keys and values of a sequence so far, in panels: two matrices that grow token by token.
//!
//! They lie in pages of some tokens each, so that growing moves nothing, and sequences that begin
//! alike share the pages of their beginning.

use std::ops::Range;
use std::sync::Arc;

use super::leaf::{Lane, LanesOfB, Target};
use super::panel_leaf::PanelLeaf;
use super::panels::{Groups, PanelProduct, WIDTH};
use super::{Base, MatMut, MatRef};
use crate::ops::cpu::isa::Isa;

/// Tokens of a page.
pub(in crate::ops) const PAGE_TOKENS: usize = 64;
/// A line of the cache, in elements.
const LINE: usize = 16;

/// k̂ and v `[tokens, D]` of one head.
#[derive(Debug, Clone)]
pub(in crate::ops) struct History {
    pages: Vec<Arc<Page>>,
    tokens: usize,
    dim: usize,
}

impl History {
    /// Of no token yet, with D elements to each.
    pub(in crate::ops) fn new(dim: usize) -> Self {
        Self { pages: Vec::new(), tokens: 0, dim }
    }

    /// That of the first `tokens` tokens.
    pub(in crate::ops) fn prefix(&self, tokens: usize) -> Self {
        assert!(tokens <= self.tokens, "as many tokens as there are");
        Self { pages: self.pages[..tokens.div_ceil(PAGE_TOKENS)].to_vec(), tokens, ..*self }
    }

    /// Appends a token's key and value.
    pub(in crate::ops) fn push(&mut self, key: &[f32], value: &[f32]) {
        assert_eq!([key.len(), value.len()], [self.dim; 2], "elements of a key and a value");
        let (page, token) = (self.tokens / PAGE_TOKENS, self.tokens % PAGE_TOKENS);
        if token == 0 {
            self.pages.push(Arc::new(Page::new(self.dim)));
        }
        // A page that another sequence reads too is copied before it differs.
        Arc::make_mut(&mut self.pages[page]).write(token, key, value);
        self.tokens += 1;
    }

    /// The tokens of the panels of keys that contain those of `tokens`.
    pub(in crate::ops) fn whole_panels(tokens: Range<usize>) -> Range<usize> {
        tokens.start / WIDTH * WIDTH..tokens.end.next_multiple_of(WIDTH)
    }

    /// q·k̂ᵀ with the tokens of whole panels; with those that are not there yet it is some number.
    pub(in crate::ops) fn scores(&self, tokens: Range<usize>, q: MatRef<'_>, scores: MatMut<'_>) {
        self.scores_by(PanelLeaf::of(Isa::detect()), tokens, q, scores);
    }

    fn scores_by(&self, leaf: &PanelLeaf, tokens: Range<usize>, q: MatRef<'_>, scores: MatMut<'_>) {
        assert_eq!(tokens, Self::whole_panels(tokens.clone()), "whole panels");
        assert!(tokens.end <= self.tokens.next_multiple_of(WIDTH), "tokens that there are");
        assert_eq!([scores.rows, scores.columns], [q.rows, tokens.len()], "shape of the scores");
        assert_eq!(q.columns, self.dim, "elements of a query");
        q.assert_inside();
        if q.rows == 0 || tokens.is_empty() {
            return;
        }
        let first = tokens.start / WIDTH;
        let panels = tokens.len() / WIDTH;
        let of_panel = |panel: usize| {
            // The last keys ask for the first values.
            let next = if panel + 1 < panels {
                self.keys(first + panel + 1)
            } else {
                self.values(tokens.start / PAGE_TOKENS, 0)
            };
            lanes(self.keys(first + panel), next)
        };
        let rows = Groups::pack(leaf, q, false);
        let target = overwritten(scores);
        let (outputs, inputs) = (tokens.len(), self.dim);
        let kernels = leaf.of_f32;
        let product = PanelProduct { kernels, rows, lanes: of_panel, outputs, inputs, target };
        // SAFETY: the CPU has the leaf's instructions; the target is a unique borrow of the product's
        // shape, and the panels of keys are in the pages.
        unsafe { product.panels(0..panels) }
    }

    /// p·v of some tokens, added up page by page.
    pub(in crate::ops) fn sums(&self, tokens: Range<usize>, p: MatRef<'_>, sums: MatMut<'_>) {
        self.sums_by(PanelLeaf::of(Isa::detect()), tokens, p, sums);
    }

    fn sums_by(&self, leaf: &PanelLeaf, tokens: Range<usize>, p: MatRef<'_>, sums: MatMut<'_>) {
        assert!(tokens.end <= self.tokens, "tokens that there are");
        assert_eq!([sums.rows, sums.columns], [p.rows, self.dim], "shape of the sums");
        assert_eq!(p.columns, tokens.len(), "a probability for each token");
        assert!(!tokens.is_empty(), "some tokens");
        p.assert_inside();
        if p.rows == 0 {
            return;
        }
        let mut target = overwritten(sums);
        let mut token = tokens.start;
        while token < tokens.end {
            let page = token / PAGE_TOKENS;
            let end = tokens.end.min((page + 1) * PAGE_TOKENS);
            let skipped = token % PAGE_TOKENS * WIDTH;
            let panels = self.dim.div_ceil(WIDTH);
            let of_panel = |panel: usize| {
                let [this, next] = [panel, panel + 1].map(|panel| match panel < panels {
                    true => self.values(page, panel).wrapping_add(skipped),
                    false => self.values((page + 1).min(self.pages.len() - 1), 0),
                });
                lanes(this, next)
            };
            let of_page = p.columns(token - tokens.start..end - tokens.start);
            let rows = Groups::pack(leaf, of_page, false);
            let (kernels, outputs, inputs) = (leaf.of_f32, self.dim, end - token);
            let product = PanelProduct { kernels, rows, lanes: of_panel, outputs, inputs, target };
            // SAFETY: as for the scores; after the first page the target is read too.
            unsafe { product.panels(0..panels) }
            (target.base, target.base_stride) = (target.c, target.c_stride);
            token = end;
        }
    }

    /// Panel number `panel` of the keys.
    fn keys(&self, panel: usize) -> *const Lane {
        const OF_PAGE: usize = PAGE_TOKENS / WIDTH;
        let page = self.pages[panel / OF_PAGE].keys();
        page[panel % OF_PAGE * self.dim * WIDTH..].as_ptr().cast()
    }

    /// Panel number `panel` of a page's values.
    fn values(&self, page: usize, panel: usize) -> *const Lane {
        self.pages[page].values()[panel * PAGE_TOKENS * WIDTH..].as_ptr().cast()
    }
}

/// What a product is written to as it is.
fn overwritten(y: MatMut<'_>) -> Target {
    let y = y.target(Base::Nothing);
    Target::overwritten(y.data, y.row_stride, 1.0)
}

/// A panel at `start`, while which is read the one at `next` is asked for.
fn lanes(start: *const Lane, next: *const Lane) -> LanesOfB {
    let bytes = (next as usize).wrapping_sub(start as usize).cast_signed();
    let ahead = (bytes / size_of::<Lane>().cast_signed()).cast_unsigned();
    LanesOfB { start, step: WIDTH, ahead }
}

/// Keys in panels of 16 tokens, then values in panels of 16 elements; what is not there yet is 0.
#[derive(Debug)]
struct Page {
    /// The elements begin at the first line of the cache.
    memory: Vec<f32>,
    dim: usize,
}

impl Page {
    fn new(dim: usize) -> Self {
        let elements = PAGE_TOKENS * (dim + dim.next_multiple_of(WIDTH));
        Self { memory: vec![0.0; elements + LINE], dim }
    }

    fn start(&self) -> usize {
        let start = self.memory.as_ptr().align_offset(LINE * size_of::<f32>());
        start.min(LINE)
    }

    fn keys(&self) -> &[f32] {
        &self.memory[self.start()..][..PAGE_TOKENS * self.dim]
    }

    fn values(&self) -> &[f32] {
        let start = self.start() + PAGE_TOKENS * self.dim;
        &self.memory[start..][..PAGE_TOKENS * self.dim.next_multiple_of(WIDTH)]
    }

    fn write(&mut self, token: usize, key: &[f32], value: &[f32]) {
        let (start, dim) = (self.start(), self.dim);
        let (keys, values) = self.memory[start..].split_at_mut(PAGE_TOKENS * dim);
        let keys = &mut keys[token / WIDTH * dim * WIDTH..];
        for (step, key) in keys.chunks_exact_mut(WIDTH).zip(key) {
            step[token % WIDTH] = *key;
        }
        let panels = values.chunks_mut(PAGE_TOKENS * WIDTH);
        for (panel, value) in panels.zip(value.chunks(WIDTH)) {
            panel[token * WIDTH..][..value.len()].copy_from_slice(value);
        }
    }
}

impl Clone for Page {
    fn clone(&self) -> Self {
        // In other memory the first line is elsewhere.
        let mut clone = Self::new(self.dim);
        let (from, to) = (self.start(), clone.start());
        let elements = clone.memory.len() - LINE;
        clone.memory[to..][..elements].copy_from_slice(&self.memory[from..][..elements]);
        clone
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn wave(n: usize, speed: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * speed).sin()).collect()
    }

    /// Tokens `tokens` of a sequence whose keys and values are `keys` and `values`.
    fn extend(history: &mut History, tokens: Range<usize>, [keys, values]: [&[f32]; 2]) {
        let dim = history.dim;
        for token in tokens.map(|token| token * dim..(token + 1) * dim) {
            history.push(&keys[token.clone()], &values[token]);
        }
    }

    fn scores(leaf: &PanelLeaf, history: &History, q: &[f32]) -> Vec<f32> {
        let rows = q.len() / history.dim;
        let tokens = History::whole_panels(0..history.tokens);
        let mut scores = vec![0.0; rows * tokens.len()];
        let target = MatMut::new(&mut scores, rows, tokens.len());
        history.scores_by(leaf, tokens.clone(), MatRef::new(q, rows, history.dim), target);
        scores.chunks(tokens.len()).flat_map(|row| &row[..history.tokens]).copied().collect()
    }

    fn sums(leaf: &PanelLeaf, history: &History, tokens: Range<usize>, p: &[f32]) -> Vec<f32> {
        let rows = p.len() / tokens.len();
        let mut sums = vec![f32::NAN; rows * history.dim];
        let target = MatMut::new(&mut sums, rows, history.dim);
        history.sums_by(leaf, tokens.clone(), MatRef::new(p, rows, tokens.len()), target);
        sums
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn scores_and_sums_are_those_of_f64_wherever_pages_end(
            dim in prop_oneof![1..40usize, Just(64usize)],
            tokens in prop_oneof![1..20usize, 60..70usize, 125..200usize],
            rows in 1..20usize, start in 0..200usize,
        ) {
            let [keys, values] = [0.7, 0.4].map(|speed| wave(tokens * dim, speed));
            let mut history = History::new(dim);
            extend(&mut history, 0..tokens, [&keys, &values]);
            let q = wave(rows * dim, 0.3);
            let seen = start % tokens..tokens;
            let p = wave(rows * seen.len(), 0.9);
            for isa in Isa::available() {
                let leaf = PanelLeaf::of(isa);
                let got = scores(leaf, &history, &q);
                for (q, got) in q.chunks(dim).zip(got.chunks(tokens)) {
                    for (key, got) in keys.chunks(dim).zip(got) {
                        let products = q.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k));
                        prop_assert!((products.sum::<f64>() - f64::from(*got)).abs() < 2e-5);
                    }
                }
                let got = sums(leaf, &history, seen.clone(), &p);
                for (p, got) in p.chunks(seen.len()).zip(got.chunks(dim)) {
                    for (column, got) in got.iter().enumerate() {
                        let values = values[seen.start * dim..].chunks(dim);
                        let products = p
                            .iter()
                            .zip(values)
                            .map(|(p, value)| f64::from(*p) * f64::from(value[column]));
                        prop_assert!((products.sum::<f64>() - f64::from(*got)).abs() < 2e-5);
                    }
                }
            }
        }
    }

    #[test]
    fn sequences_that_begin_alike_share_pages_until_they_differ() {
        let (dim, tokens, common) = (6, 150, 100);
        let [keys, values] = [0.7, 0.4].map(|speed| wave(tokens * dim, speed));
        let [other_keys, other_values] = [0.2, 0.1].map(|speed| wave(tokens * dim, speed));
        let (original, other) = ([&keys[..], &values[..]], [&other_keys[..], &other_values[..]]);
        let mut whole = History::new(dim);
        extend(&mut whole, 0..tokens, original);
        let mut cut = whole.prefix(common);
        assert!(whole.pages.iter().zip(&cut.pages).all(|(whole, cut)| Arc::ptr_eq(whole, cut)));

        extend(&mut cut, common..tokens, other);
        assert!(Arc::ptr_eq(&whole.pages[0], &cut.pages[0]));
        assert!(!Arc::ptr_eq(&whole.pages[1], &cut.pages[1]));

        let mut expected = History::new(dim);
        extend(&mut expected, 0..common, original);
        extend(&mut expected, common..tokens, other);
        let mut unchanged = History::new(dim);
        extend(&mut unchanged, 0..tokens, original);
        let leaf = PanelLeaf::of(Isa::detect());
        let (q, p) = (wave(dim, 0.3), wave(tokens, 0.9));
        for (history, expected) in [(&cut, &expected), (&whole, &unchanged)] {
            assert_eq!(scores(leaf, history, &q), scores(leaf, expected, &q));
            assert_eq!(sums(leaf, history, 0..tokens, &p), sums(leaf, expected, 0..tokens, &p));
        }
    }
}
