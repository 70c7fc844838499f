//! CPU form of [`crate::ops::cached_attention`].
//!
//! Each head's keys and values lie token by token, so that a new one is appended and what one unit
//! of work reads is one stream of memory. The one query of a sequence is multiplied by its keys one
//! after the other, in whose order its sums are made; the queries of a prompt are products of
//! matrices, as in training.

use burn::backend::Flex;
use burn::tensor::Tensor;
use rayon::prelude::*;

use super::kernels::{Block, causal_softmax, rotate};
use super::{QUERY_BLOCK, contiguous, from_values, values};
use crate::models::rope::RotaryTable;
use crate::ops::attention::{Heads, Scores};
use crate::ops::cached_attention::{Extension, KeyValues as Cache};
use crate::ops::cpu::gemm::{MatMut, MatRef, Threads, gemm};
use crate::ops::cpu::isa::{Isa, simd_kernels};
use crate::ops::cpu::math::{dot, exp, max, sum, tanh};

/// Those of each head of keys.
#[derive(Debug, Clone)]
pub(crate) struct KeyValues {
    heads: Vec<Head>,
    /// D.
    dim: usize,
}

/// k̂ and v of a head, each `[tokens, D]`.
#[derive(Debug, Clone, Default)]
struct Head {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl KeyValues {
    fn new(heads: Heads) -> Self {
        Self { heads: vec![Head::default(); heads.key_value], dim: heads.dim }
    }

    /// Those of the first `tokens` tokens.
    pub(crate) fn prefix(&self, tokens: usize) -> Self {
        let first = |x: &[f32]| x[..tokens * self.dim].to_vec();
        let heads = self.heads.iter();
        let heads = heads.map(|head| Head { keys: first(&head.keys), values: first(&head.values) });
        Self { heads: heads.collect(), dim: self.dim }
    }

    /// Appends a row's keys and values.
    fn push(&mut self, isa: Isa, row: &[f32], heads: Heads, (cos, sin): (&[f32], &[f32])) {
        let (keys, values) = row[heads.query_width()..].split_at(heads.key_value_width());
        let rows = keys.chunks_exact(heads.dim).zip(values.chunks_exact(heads.dim));
        for (head, (key, value)) in self.heads.iter_mut().zip(rows) {
            let start = head.keys.len();
            head.keys.resize(start + heads.dim, 0.0);
            rotate(isa, key, cos, sin, &mut head.keys[start..]);
            head.values.extend_from_slice(value);
        }
    }
}

pub(in crate::ops) fn cached_attention(
    qkv: Tensor<2>,
    heads: Heads,
    scores: Scores,
    rotary: &RotaryTable,
    extensions: &mut [Extension<'_>],
) -> Tensor<2> {
    let isa = Isa::detect();
    let qkv = contiguous(qkv.inner().try_into_primitive::<Flex>().expect("a tensor on the CPU"));
    let rows: Vec<&[f32]> = values(&qkv).chunks_exact(heads.qkv_width()).collect();
    for extension in extensions.iter_mut() {
        let cache = extension.cache.get_or_insert_with(|| Cache::Rows(KeyValues::new(heads)));
        let Cache::Rows(cache) = cache else { unreachable!("a cache stays with its form") };
        for (i, row) in rows[extension.rows.clone()].iter().enumerate() {
            cache.push(isa, row, heads, rotary.row(extension.first_position + i));
        }
    }
    let sequences: Vec<Sequence<'_>> = extensions
        .iter()
        .map(|extension| {
            let Some(Cache::Rows(cache)) = &*extension.cache else { unreachable!("made above") };
            let first_position = extension.first_position;
            Sequence { rows: &rows[extension.rows.clone()], first_position, cache }
        })
        .collect();
    // A unit is one head of keys of one sequence, with the query heads that read it.
    let units: Vec<(&Sequence<'_>, usize)> = sequences
        .iter()
        .flat_map(|sequence| (0..heads.key_value).map(move |head| (sequence, head)))
        .collect();
    let shared = Shared { isa, heads, scores, rotary };
    let by_unit: Vec<Vec<f32>> = units
        .into_par_iter()
        .map(|(sequence, head)| match sequence.rows {
            [row] => shared.one_query(sequence, row, head),
            _ => shared.queries(sequence, head),
        })
        .collect();
    let mut output = Vec::with_capacity(rows.len() * heads.query_width());
    let unit_width = heads.group() * heads.dim;
    for (sequence, units) in sequences.iter().zip(by_unit.chunks_exact(heads.key_value)) {
        for row in 0..sequence.rows.len() {
            for unit in units {
                output.extend_from_slice(&unit[row * unit_width..(row + 1) * unit_width]);
            }
        }
    }
    let output = from_values(output, [rows.len(), heads.query_width()]);
    Tensor::from_primitive::<Flex>(output).autodiff()
}

/// A sequence's new rows, which its cache holds already.
struct Sequence<'a> {
    rows: &'a [&'a [f32]],
    first_position: usize,
    cache: &'a KeyValues,
}

struct Shared<'a> {
    isa: Isa,
    heads: Heads,
    scores: Scores,
    rotary: &'a RotaryTable,
}

impl Shared<'_> {
    /// The q̂ of one query head of a row.
    fn rotated(&self, row: &[f32], head: usize, position: usize, q: &mut [f32]) {
        let dim = self.heads.dim;
        let (cos, sin) = self.rotary.row(position);
        rotate(self.isa, &row[head * dim..(head + 1) * dim], cos, sin, q);
    }

    /// Output of the query heads of key head `head` for a sequence's one row.
    fn one_query(&self, sequence: &Sequence<'_>, row: &[f32], head: usize) -> Vec<f32> {
        let Heads { dim, .. } = self.heads;
        let group = self.heads.group();
        let position = sequence.first_position;
        let seen = self.scores.first_key(position) * dim..(position + 1) * dim;
        let Head { keys, values } = &sequence.cache.heads[head];
        let (keys, values) = (&keys[seen.clone()], &values[seen]);
        let (mut q, mut scores) = (vec![0.0; dim], vec![0.0; keys.len() / dim]);
        let mut output = vec![0.0; group * dim];
        for (i, output) in output.chunks_exact_mut(dim).enumerate() {
            self.rotated(row, head * group + i, position, &mut q);
            attend_one(self.isa, self.scores, &q, keys, values, &mut scores, output);
        }
        output
    }

    /// Output of the query heads of key head `head`, `[n, group · D]`.
    fn queries(&self, sequence: &Sequence<'_>, head: usize) -> Vec<f32> {
        let Heads { dim, .. } = self.heads;
        let group = self.heads.group();
        let (n, first) = (sequence.rows.len(), sequence.first_position);
        let Head { keys, values } = &sequence.cache.heads[head];
        let [keys, values] = [keys, values].map(|x| MatRef::new(x, first + n, dim));
        let mut q = vec![0.0; n * dim];
        let (mut scores, mut log_sum) = (Vec::new(), Vec::new());
        let mut output = vec![0.0; n * group * dim];
        for i in 0..group {
            for (t, (row, q)) in sequence.rows.iter().zip(q.chunks_exact_mut(dim)).enumerate() {
                self.rotated(row, head * group + i, first + t, q);
            }
            for start in (0..n).step_by(QUERY_BLOCK) {
                let end = n.min(start + QUERY_BLOCK);
                let seen = self.scores.first_key(first + start)..first + end;
                let block = Block {
                    keys: seen.len(),
                    first_position: first + start - seen.start,
                    scale: self.scores.scale,
                    softcap: self.scores.softcap,
                    window: self.scores.window.unwrap_or(usize::MAX),
                };
                let queries = end - start;
                scores.resize(queries * block.keys, 0.0);
                log_sum.resize(queries, 0.0);
                let q = MatRef::new(&q[start * dim..end * dim], queries, dim);
                let target = MatMut::new(&mut scores, queries, block.keys);
                gemm(target, 1.0, q, keys.rows(seen.clone()).t(), Threads::One);
                causal_softmax(self.isa, block, &mut scores, &mut log_sum);
                let p = MatRef::new(&scores, queries, block.keys);
                let rows = &mut output[start * group * dim..end * group * dim];
                let target = MatMut::new(rows, queries, group * dim);
                let target = target.columns(i * dim..(i + 1) * dim);
                gemm(target, 1.0, p, values.rows(seen), Threads::One);
            }
        }
        output
    }
}

simd_kernels! {
    /// o = softmax(Ŝ)·v of one query, of as many keys as there are `scores`.
    fn attend_one(
        how: Scores, q: &[f32], keys: &[f32], values: &[f32], scores: &mut [f32],
        output: &mut [f32],
    ) {
        for (key, score) in keys.chunks_exact(q.len()).zip(scores.iter_mut()) {
            *score = how.scale * dot::<M>(q, key);
        }
        if let Some(cap) = how.softcap {
            for score in scores.iter_mut() {
                *score = cap * tanh::<M>(*score / cap);
            }
        }
        let greatest = max(scores);
        for score in scores.iter_mut() {
            *score = exp::<M>(*score - greatest);
        }
        let inverse = 1.0 / sum(scores);
        // So many sums stay in registers while all values are read.
        const WIDTH: usize = 32;
        let dim = q.len();
        for first in (0..dim).step_by(WIDTH) {
            let output = &mut output[first..dim.min(first + WIDTH)];
            let columns = values.chunks_exact(dim).map(|value| &value[first..first + output.len()]);
            let mut sums = [0f32; WIDTH];
            if output.len() == WIDTH {
                for (value, p) in columns.zip(scores.iter()) {
                    let value = &value[..WIDTH];
                    for i in 0..WIDTH {
                        sums[i] = M::mul_add(*p, value[i], sums[i]);
                    }
                }
            } else {
                for (value, p) in columns.zip(scores.iter()) {
                    for (sum, value) in sums.iter_mut().zip(value) {
                        *sum = M::mul_add(*p, *value, *sum);
                    }
                }
            }
            for (output, sum) in output.iter_mut().zip(sums) {
                *output = sum * inverse;
            }
        }
    }
}
