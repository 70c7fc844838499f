//! CPU form of [`crate::ops::cached_attention`].
//!
//! Each head's keys and values lie as the products with queries and probabilities read them; a new
//! token's are written there by the unit of work that reads them next. All query heads that share a
//! head of keys are rows of one product.
//!
//! A row's numbers do not depend on which rows come in the same pass: a prompt read whole leaves
//! what it leaves when read token by token.

use burn::backend::Flex;
use burn::tensor::Tensor;
use rayon::prelude::*;

use super::kernels::{Block, causal_softmax, rotate};
use super::{QUERY_BLOCK, contiguous, from_values, values};
use crate::models::rope::RotaryTable;
use crate::ops::attention::{Heads, Scores};
use crate::ops::cached_attention::{Extension, KeyValues as Cache};
use crate::ops::cpu::gemm::{History, MatMut, MatRef};
use crate::ops::cpu::isa::Isa;

/// Those of each head of keys.
#[derive(Debug, Clone)]
pub(crate) struct KeyValues {
    heads: Vec<History>,
}

impl KeyValues {
    fn new(Heads { key_value, dim, .. }: Heads) -> Self {
        Self { heads: vec![History::new(dim); key_value] }
    }

    /// Those of the first `tokens` tokens.
    pub(crate) fn prefix(&self, tokens: usize) -> Self {
        Self { heads: self.heads.iter().map(|head| head.prefix(tokens)).collect() }
    }
}

pub(in crate::ops) fn cached_attention(
    qkv: Tensor<2>,
    heads: Heads,
    scores: Scores,
    rotary: &RotaryTable,
    extensions: &mut [Extension<'_>],
) -> Tensor<2> {
    let qkv = contiguous(qkv.inner().try_into_primitive::<Flex>().expect("a tensor on the CPU"));
    let width = heads.qkv_width();
    let rows = values(&qkv);
    let units: Vec<Unit<'_>> = extensions
        .iter_mut()
        .flat_map(|extension| {
            let rows = &rows[extension.rows.start * width..extension.rows.end * width];
            let first_position = extension.first_position;
            let cache = extension.cache.get_or_insert_with(|| Cache::Rows(KeyValues::new(heads)));
            let Cache::Rows(cache) = cache else { unreachable!("a cache stays with its form") };
            let each = cache.heads.iter_mut().enumerate();
            each.map(move |(head, history)| Unit { rows, first_position, head, history })
        })
        .collect();
    let shared = Shared { isa: Isa::detect(), heads, scores, rotary };
    let by_unit: Vec<Vec<f32>> = units.into_par_iter().map(|unit| shared.extend(unit)).collect();
    let mut output = Vec::with_capacity(rows.len() / width * heads.query_width());
    let unit_width = heads.group() * heads.dim;
    for units in by_unit.chunks_exact(heads.key_value) {
        for row in 0..units[0].len() / unit_width {
            for unit in units {
                output.extend_from_slice(&unit[row * unit_width..(row + 1) * unit_width]);
            }
        }
    }
    let output = from_values(output, [rows.len() / width, heads.query_width()]);
    Tensor::from_primitive::<Flex>(output).autodiff()
}

/// One head of keys of one sequence, with the query heads that read it.
struct Unit<'a> {
    /// The sequence's new rows.
    rows: &'a [f32],
    first_position: usize,
    head: usize,
    history: &'a mut History,
}

struct Shared<'a> {
    isa: Isa,
    heads: Heads,
    scores: Scores,
    rotary: &'a RotaryTable,
}

impl Shared<'_> {
    /// Head number `head` of a row of q, k and v, turned to its position.
    fn rotated(&self, row: &[f32], head: usize, position: usize, target: &mut [f32]) {
        let dim = self.heads.dim;
        let (cos, sin) = self.rotary.row(position);
        rotate(self.isa, &row[head * dim..(head + 1) * dim], cos, sin, target);
    }

    /// Appends the new rows' keys and values, and gives the output of the query heads
    /// `[n, group · D]`.
    fn extend(&self, unit: Unit<'_>) -> Vec<f32> {
        let Heads { query, key_value, dim } = self.heads;
        let Unit { rows, first_position: first, head, history } = unit;
        let group = self.heads.group();
        let rows: Vec<&[f32]> = rows.chunks_exact(self.heads.qkv_width()).collect();
        let mut key = vec![0.0; dim];
        for (i, row) in rows.iter().enumerate() {
            self.rotated(row, query + head, first + i, &mut key);
            history.push(&key, &row[(query + key_value + head) * dim..][..dim]);
        }
        let mut output = vec![0.0; rows.len() * group * dim];
        // The rows of a block are those of one query head, then those of the next.
        let most = (QUERY_BLOCK / group).max(1);
        let (mut q, mut scores, mut log_sum, mut sums) = (vec![], vec![], vec![], vec![]);
        for (block, output) in output.chunks_mut(most * group * dim).enumerate() {
            let start = block * most;
            let rows = &rows[start..rows.len().min(start + most)];
            let (start, n) = (first + start, rows.len());
            let seen = self.scores.first_key(start)..start + n;
            let panels = History::whole_panels(seen.clone());
            q.resize(group * n * dim, 0.0);
            for (i, q) in q.chunks_exact_mut(n * dim).enumerate() {
                for (t, (row, q)) in rows.iter().zip(q.chunks_exact_mut(dim)).enumerate() {
                    self.rotated(row, head * group + i, start + t, q);
                }
            }
            scores.resize(group * n * panels.len(), 0.0);
            log_sum.resize(n, 0.0);
            sums.resize(group * n * dim, 0.0);
            let target = MatMut::new(&mut scores, group * n, panels.len());
            history.scores(panels.clone(), MatRef::new(&q, group * n, dim), target);
            let block = Block::new(self.scores, start, &panels);
            for scores in scores.chunks_exact_mut(n * panels.len()) {
                causal_softmax(self.isa, block, scores, &mut log_sum);
            }
            let p = MatRef::new(&scores, group * n, panels.len());
            let p = p.columns(0..seen.end - panels.start);
            history.sums(panels.start..seen.end, p, MatMut::new(&mut sums, group * n, dim));
            for (i, sums) in sums.chunks_exact(n * dim).enumerate() {
                let columns = output.chunks_exact_mut(group * dim);
                for (output, sums) in columns.zip(sums.chunks_exact(dim)) {
                    output[i * dim..(i + 1) * dim].copy_from_slice(sums);
                }
            }
        }
        output
    }
}
