//! CPU form of [`crate::ops::attention`].
//!
//! The unit of work is one head of one segment. Queries, keys and values are laid out unit by unit:
//! queries `[n, D]`, keys and values `[p + n, D]` where the segment continues a prefix of p tokens,
//! whose keys and values are copied in front of its own. So a unit's products run on contiguous
//! memory, and its results are a slice of its own.

pub(in crate::ops) mod cached;
mod kernels;

use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

use self::kernels::{
    Block, causal_softmax, causal_softmax_backward, inner_product, rotate, rotate_back,
};
use super::gemm::{MatMut, MatRef, Threads, gemm, gemm_add};
use super::isa::Isa;
use super::step::{contiguous, dims, from_values, node, tensor, values};
use crate::batch::Segment;
use crate::models::rope::RotaryTable;
use crate::ops::attention::{Heads, Scores};

/// Queries whose scores are held at a time; a block skips the keys after its last query.
const QUERY_BLOCK: usize = 128;

pub(in crate::ops) fn attention(
    qkv: Tensor<2>,
    heads: Heads,
    scores: Scores,
    segments: &[Segment],
    rotary: &RotaryTable,
) -> Tensor<2> {
    let qkv = node(qkv);
    let step = Attention.prepare::<NoCheckpointing>([qkv.node()]).compute_bound();
    let qkv = contiguous(qkv.into_primitive());
    let layout = Layout::new(heads, scores, segments, rotary);
    let mut inputs = layout.split(&qkv);
    let output = layout.forward(&mut inputs);
    let output = from_values(output, [dims(&qkv)[0], heads.query_width()]);
    tensor(match step.stateful() {
        OpsKind::Tracked(step) => {
            let saved = Saved { layout, inputs: Arc::new(inputs), output: output.clone() };
            step.finish(saved, output)
        }
        OpsKind::UnTracked(step) => step.finish(output),
    })
}

#[derive(Debug)]
struct Attention;

#[derive(Debug, Clone)]
struct Saved {
    layout: Layout,
    inputs: Arc<Inputs>,
    output: FlexTensor,
}

impl Backward<Flex, 1> for Attention {
    type State = Saved;

    fn backward(
        self,
        ops: Ops<Saved, 1>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let d_output = contiguous(gradients.consume::<Flex>(&ops.node));
        let [Some(parent)] = ops.parents else { return };
        let Saved { layout, inputs, output } = ops.state;
        let d_inputs = layout.backward(&inputs, values(&output), values(&d_output));
        let d_qkv = layout.merge(d_inputs);
        let shape = [dims(&output)[0], layout.heads.qkv_width()];
        gradients.register::<Flex>(parent.id, from_values(d_qkv, shape));
    }
}

/// What all units share.
#[derive(Debug, Clone)]
struct Layout {
    isa: Isa,
    heads: Heads,
    scores: Scores,
    segments: Arc<[Placed]>,
    rotary: RotaryTable,
}

/// A segment, and where it lies among the keys.
#[derive(Debug, Clone)]
struct Placed {
    tokens: Range<usize>,
    /// Its prefix's place among the segments.
    prefix: Option<usize>,
    /// p.
    prefix_len: usize,
    /// Keys of one head that lie before its own.
    first_key: usize,
}

impl Placed {
    /// n.
    fn queries(&self) -> usize {
        self.tokens.len()
    }

    /// p + n.
    fn keys(&self) -> usize {
        self.prefix_len + self.tokens.len()
    }
}

/// q̂, k̂ and v, or their gradients, unit by unit.
#[derive(Debug)]
struct Inputs {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// log Σ exp of each query's scores, `[n]` unit by unit; empty until they are known.
    log_sum: Vec<f32>,
}

impl Layout {
    fn new(heads: Heads, scores: Scores, segments: &[Segment], rotary: &RotaryTable) -> Self {
        let mut first_key = 0;
        let placed = segments.iter().map(|Segment { tokens, prefix }| {
            let placed = Placed {
                tokens: tokens.clone(),
                prefix: segments
                    .iter()
                    .position(|other| !prefix.is_empty() && other.tokens == *prefix),
                prefix_len: prefix.len(),
                first_key,
            };
            first_key += placed.keys();
            placed
        });
        let segments = placed.collect();
        Self { isa: Isa::detect(), heads, scores, segments, rotary: rotary.clone() }
    }

    fn tokens(&self) -> usize {
        self.segments.last().map_or(0, |segment| segment.tokens.end)
    }

    /// Keys of one head, those copied from prefixes included.
    fn keys(&self) -> usize {
        self.segments.last().map_or(0, |segment| segment.first_key + segment.keys())
    }

    /// The block of the queries `queries` of a segment, and the keys that one of them sees.
    fn block(&self, segment: &Placed, queries: Range<usize>) -> (Block, Range<usize>) {
        let first = segment.prefix_len + queries.start;
        let seen = self.scores.first_key(first)..segment.prefix_len + queries.end;
        let block = Block {
            keys: seen.len(),
            first_position: first - seen.start,
            scale: self.scores.scale,
            softcap: self.scores.softcap,
            window: self.scores.window.unwrap_or(usize::MAX),
        };
        (block, seen)
    }

    /// Scores of the greatest block of a segment.
    fn block_scores(&self, segment: &Placed) -> usize {
        let queries = QUERY_BLOCK.min(segment.queries());
        let keys = match self.scores.window {
            Some(window) => segment.keys().min(window.saturating_add(queries - 1)),
            None => segment.keys(),
        };
        queries * keys
    }

    /// All units of `count` heads: segment by segment, and in each head by head.
    fn units(&self, count: usize) -> impl Iterator<Item = (&Placed, usize)> {
        self.segments.iter().flat_map(move |segment| (0..count).map(move |head| (segment, head)))
    }

    /// Where a unit's queries lie in a buffer with `width` values for each.
    fn query_unit(&self, segment: &Placed, head: usize, width: usize) -> Range<usize> {
        let start = segment.tokens.start * self.heads.query + head * segment.queries();
        start * width..(start + segment.queries()) * width
    }

    /// Where a unit's keys lie, and likewise its values.
    fn key_unit(&self, segment: &Placed, key_head: usize) -> Range<usize> {
        let start = segment.first_key * self.heads.key_value + key_head * segment.keys();
        start * self.heads.dim..(start + segment.keys()) * self.heads.dim
    }

    /// Cuts a buffer with `width` values for each query into units.
    fn cut_queries<'a>(&self, buffer: &'a mut [f32], width: usize) -> Vec<&'a mut [f32]> {
        let lengths = self.units(self.heads.query).map(|(segment, _)| segment.queries() * width);
        cut(buffer, lengths)
    }

    /// Cuts a buffer of keys or values into units.
    fn cut_keys<'a>(&self, buffer: &'a mut [f32]) -> Vec<&'a mut [f32]> {
        let (count, dim) = (self.heads.key_value, self.heads.dim);
        cut(buffer, self.units(count).map(|(segment, _)| segment.keys() * dim))
    }

    /// Takes rows apart into units, and rotates queries and keys.
    fn split(&self, qkv: &FlexTensor) -> Inputs {
        let (heads, dim) = (self.heads, self.heads.dim);
        let rows = MatrixRows { values: values(qkv), width: heads.qkv_width() };
        // One row's values of one head, at the row's position.
        let take = |token: usize, position: usize, first: usize, rotated: bool, y: &mut [f32]| {
            let source = rows.part(token, first, dim);
            if rotated {
                let (cos, sin) = self.rotary.row(position);
                rotate(self.isa, source, cos, sin, y);
            } else {
                y.copy_from_slice(source);
            }
        };
        let mut q = vec![0.0; self.tokens() * heads.query_width()];
        let units: Vec<_> = self.units(heads.query).zip(self.cut_queries(&mut q, dim)).collect();
        units.into_par_iter().for_each(|((segment, head), unit)| {
            for (i, y) in unit.chunks_exact_mut(dim).enumerate() {
                let (token, position) = (segment.tokens.start + i, segment.prefix_len + i);
                take(token, position, head * dim, true, y);
            }
        });
        let gather = |first_column: usize, rotated: bool| {
            let mut buffer = vec![0.0; self.keys() * heads.key_value_width()];
            let units: Vec<_> =
                self.units(heads.key_value).zip(self.cut_keys(&mut buffer)).collect();
            units.into_par_iter().for_each(|((segment, head), unit)| {
                let prefix =
                    segment.prefix.map_or(0..0, |index| self.segments[index].tokens.clone());
                let tokens = prefix.chain(segment.tokens.clone());
                for ((position, token), y) in tokens.enumerate().zip(unit.chunks_exact_mut(dim)) {
                    take(token, position, first_column + head * dim, rotated, y);
                }
            });
            buffer
        };
        let k = gather(heads.query_width(), true);
        let v = gather(heads.query_width() + heads.key_value_width(), false);
        Inputs { q, k, v, log_sum: Vec::new() }
    }

    /// The inverse of [`Layout::split`] for gradients: those of copied keys and values are added
    /// to the originals'.
    fn merge(&self, mut inputs: Inputs) -> Vec<f32> {
        self.return_copies(&mut inputs.k);
        self.return_copies(&mut inputs.v);
        let (heads, dim) = (self.heads, self.heads.dim);
        let width = heads.qkv_width();
        let mut rows = vec![0.0; self.tokens() * width];
        let by_segment = cut(&mut rows, self.segments.iter().map(|s| s.queries() * width));
        self.segments.par_iter().zip(by_segment).for_each(|(segment, rows)| {
            rows.par_chunks_exact_mut(width).enumerate().for_each(|(i, row)| {
                let position = segment.prefix_len + i;
                let (cos, sin) = self.rotary.row(position);
                let (q_row, rest) = row.split_at_mut(heads.query_width());
                let (k_row, v_row) = rest.split_at_mut(heads.key_value_width());
                for (head, target) in q_row.chunks_exact_mut(dim).enumerate() {
                    let unit = &inputs.q[self.query_unit(segment, head, dim)];
                    rotate_back(self.isa, &unit[i * dim..][..dim], cos, sin, target);
                }
                for (head, target) in k_row.chunks_exact_mut(dim).enumerate() {
                    let unit = &inputs.k[self.key_unit(segment, head)];
                    rotate_back(self.isa, &unit[position * dim..][..dim], cos, sin, target);
                }
                for (head, target) in v_row.chunks_exact_mut(dim).enumerate() {
                    let unit = &inputs.v[self.key_unit(segment, head)];
                    target.copy_from_slice(&unit[position * dim..][..dim]);
                }
            });
        });
        rows
    }

    /// Adds the gradients of copied keys to those of the prefixes they were copied from, in the
    /// order of the segments.
    fn return_copies(&self, gradients: &mut [f32]) {
        for segment in self.segments.iter() {
            let Some(prefix) = segment.prefix else { continue };
            for head in 0..self.heads.key_value {
                let source = self.key_unit(segment, head);
                let target = self.key_unit(&self.segments[prefix], head);
                // A prefix lies before what continues it.
                let (earlier, later) = gradients.split_at_mut(source.start);
                let sums = &mut earlier[target];
                sums.iter_mut().zip(later).for_each(|(sum, value)| *sum += *value);
            }
        }
    }

    /// o, as rows `[tokens, H·D]`; fills `log_sum`.
    fn forward(&self, inputs: &mut Inputs) -> Vec<f32> {
        let (heads, dim) = (self.heads, self.heads.dim);
        let mut log_sum = vec![0.0; self.tokens() * heads.query];
        let mut by_unit = vec![0.0; self.tokens() * heads.query_width()];
        let units: Vec<_> = self
            .units(heads.query)
            .zip(self.cut_queries(&mut by_unit, dim))
            .zip(self.cut_queries(&mut log_sum, 1))
            .collect();
        units.into_par_iter().for_each_init(Vec::new, |scores, (((segment, head), o), log_sum)| {
            let (q, k, v) = self.unit_inputs(inputs, segment, head);
            scores.resize(self.block_scores(segment), 0.0);
            let blocks = o.chunks_mut(QUERY_BLOCK * dim).zip(log_sum.chunks_mut(QUERY_BLOCK));
            for (block, (o, log_sum)) in blocks.enumerate() {
                let (first, queries) = (block * QUERY_BLOCK, log_sum.len());
                let (block, seen) = self.block(segment, first..first + queries);
                let keys = block.keys;
                let scores = &mut scores[..queries * keys];
                let target = MatMut::new(scores, queries, keys);
                let q = q.rows(first..first + queries);
                gemm(target, 1.0, q, k.rows(seen.clone()).t(), Threads::One);
                causal_softmax(self.isa, block, scores, log_sum);
                let p = MatRef::new(scores, queries, keys);
                gemm(MatMut::new(o, queries, dim), 1.0, p, v.rows(seen), Threads::One);
            }
        });
        inputs.log_sum = log_sum;
        self.join_heads(&by_unit)
    }

    /// Units of query heads to rows.
    fn join_heads(&self, by_unit: &[f32]) -> Vec<f32> {
        let (count, dim) = (self.heads.query, self.heads.dim);
        let mut rows = Vec::with_capacity(by_unit.len());
        for segment in self.segments.iter() {
            for i in 0..segment.queries() {
                for head in 0..count {
                    let start = self.query_unit(segment, head, dim).start + i * dim;
                    rows.extend_from_slice(&by_unit[start..start + dim]);
                }
            }
        }
        rows
    }

    /// q̂, k̂ and v of one query head.
    fn unit_inputs<'a>(
        &self,
        inputs: &'a Inputs,
        segment: &Placed,
        head: usize,
    ) -> (MatRef<'a>, MatRef<'a>, MatRef<'a>) {
        let dim = self.heads.dim;
        let own = self.query_unit(segment, head, dim);
        let shared = self.key_unit(segment, head / self.heads.group());
        (
            MatRef::new(&inputs.q[own], segment.queries(), dim),
            MatRef::new(&inputs.k[shared.clone()], segment.keys(), dim),
            MatRef::new(&inputs.v[shared], segment.keys(), dim),
        )
    }

    /// The gradients of q̂, k̂ and v, from o and do as rows.
    fn backward(&self, inputs: &Inputs, output: &[f32], d_output: &[f32]) -> Inputs {
        let (heads, dim) = (self.heads, self.heads.dim);
        let mut dq = vec![0.0; inputs.q.len()];
        let units: Vec<_> = self.units(heads.query).zip(self.cut_queries(&mut dq, dim)).collect();
        // Each query head has its own share of dk and dv; the shares of a group are then added in
        // the order of its heads.
        let shares: Vec<(Vec<f32>, Vec<f32>)> = units
            .into_par_iter()
            .map_init(Scratch::default, |scratch, ((segment, head), dq)| {
                let unit = UnitBackward { layout: self, inputs, output, d_output, segment, head };
                unit.run(scratch, dq)
            })
            .collect();
        let mut dk = vec![0.0; inputs.k.len()];
        let mut dv = vec![0.0; inputs.v.len()];
        let groups: Vec<_> = self
            .cut_keys(&mut dk)
            .into_iter()
            .zip(self.cut_keys(&mut dv))
            .zip(shares.chunks(heads.group()))
            .collect();
        groups.into_par_iter().for_each(|((dk, dv), shares)| {
            for (dk_share, dv_share) in shares {
                dk.iter_mut().zip(dk_share).for_each(|(sum, value)| *sum += value);
                dv.iter_mut().zip(dv_share).for_each(|(sum, value)| *sum += value);
            }
        });
        Inputs { q: dq, k: dk, v: dv, log_sum: Vec::new() }
    }
}

/// Buffers that a thread keeps from unit to unit.
#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    d_scores: Vec<f32>,
    inner: Vec<f32>,
}

/// The backward pass of one query head of one segment.
struct UnitBackward<'a> {
    layout: &'a Layout,
    inputs: &'a Inputs,
    output: &'a [f32],
    d_output: &'a [f32],
    segment: &'a Placed,
    head: usize,
}

impl UnitBackward<'_> {
    /// Writes dq̂; returns this head's shares of dk̂ and dv.
    fn run(&self, scratch: &mut Scratch, dq: &mut [f32]) -> (Vec<f32>, Vec<f32>) {
        let Layout { isa, heads, .. } = *self.layout;
        let dim = heads.dim;
        let (q, k, v) = self.layout.unit_inputs(self.inputs, self.segment, self.head);
        let log_sum = &self.inputs.log_sum[self.layout.query_unit(self.segment, self.head, 1)];
        let columns = self.head * dim..(self.head + 1) * dim;
        let d_output = MatRef::new(self.d_output, self.layout.tokens(), heads.query_width())
            .rows(self.segment.tokens.clone())
            .columns(columns.clone());

        let width = heads.query_width();
        let (o_rows, do_rows) = (
            MatrixRows { values: self.output, width },
            MatrixRows { values: self.d_output, width },
        );
        scratch.inner.clear();
        scratch.inner.extend(self.segment.tokens.clone().map(|token| {
            inner_product(
                isa,
                do_rows.part(token, columns.start, dim),
                o_rows.part(token, columns.start, dim),
            )
        }));
        let block_size = self.layout.block_scores(self.segment);
        scratch.scores.resize(block_size, 0.0);
        scratch.d_scores.resize(block_size, 0.0);

        let keys = self.segment.keys();
        let (mut dk, mut dv) = (vec![0.0; keys * dim], vec![0.0; keys * dim]);
        for (block, dq) in dq.chunks_mut(QUERY_BLOCK * dim).enumerate() {
            let (first, queries) = (block * QUERY_BLOCK, dq.len() / dim);
            let rows = first..first + queries;
            let (block, seen) = self.layout.block(self.segment, rows.clone());
            let keys = block.keys;
            let scores = &mut scratch.scores[..queries * keys];
            let d_scores = &mut scratch.d_scores[..queries * keys];
            let (q, d_output) = (q.rows(rows.clone()), d_output.rows(rows.clone()));
            let (k, v) = (k.rows(seen.clone()), v.rows(seen.clone()));
            gemm(MatMut::new(scores, queries, keys), 1.0, q, k.t(), Threads::One);
            gemm(MatMut::new(d_scores, queries, keys), 1.0, d_output, v.t(), Threads::One);
            let (log_sum, inner) = (&log_sum[rows.clone()], &scratch.inner[rows]);
            causal_softmax_backward(isa, block, scores, d_scores, log_sum, inner);
            let p = MatRef::new(scores, queries, keys);
            let ds = MatRef::new(d_scores, queries, keys);
            gemm(MatMut::new(dq, queries, dim), 1.0, ds, k, Threads::One);
            let dk = MatMut::new(&mut dk[seen.start * dim..seen.end * dim], keys, dim);
            gemm_add(dk, 1.0, ds.t(), q, Threads::One);
            let dv = MatMut::new(&mut dv[seen.start * dim..seen.end * dim], keys, dim);
            gemm_add(dv, 1.0, p.t(), d_output, Threads::One);
        }
        (dk, dv)
    }
}

/// Cuts a buffer into consecutive parts of these lengths.
fn cut(buffer: &mut [f32], lengths: impl Iterator<Item = usize>) -> Vec<&mut [f32]> {
    let mut rest = buffer;
    lengths.map(|length| rest.split_off_mut(..length).expect("a part")).collect()
}

/// Rows of a matrix, to read parts of them.
struct MatrixRows<'a> {
    values: &'a [f32],
    width: usize,
}

impl<'a> MatrixRows<'a> {
    /// `length` values of row `row` from column `first` on.
    fn part(&self, row: usize, first: usize, length: usize) -> &'a [f32] {
        &self.values[row * self.width + first..][..length]
    }
}
