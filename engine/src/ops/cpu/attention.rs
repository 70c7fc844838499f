//! CPU form of [`crate::ops::attention`].
//!
//! The unit of work is one head of one segment. Queries, keys and values are laid out unit by unit:
//! queries `[n, D]`, keys and values `[p + n, D]` where the segment continues a prefix of p tokens,
//! whose keys and values are copied in front of its own. So a unit's products run on contiguous
//! memory, and its results are a slice of its own.
//!
//! In bf16 all products multiply bf16: q̂, k̂ and v are kept rounded, and so are do, P and dS where
//! they are multiplied. The softmax and all sums are in f32.

pub(in crate::ops) mod cached;
mod kernels;

use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

use self::kernels::{
    Block, causal_softmax, causal_softmax_backward, inner_product, rotate, rotate_back,
};
use super::bf16::{in_f32, round, rounded_values};
use super::gemm::{Elements, MatMut, MatRef, Threads, gemm, gemm_add};
use super::isa::Isa;
use super::step::{contiguous, dims, from_values, node, tensor, values};
use crate::batch::Segment;
use crate::models::rope::RotaryTable;
use crate::ops::attention::{Heads, Scores};

/// Rows of all heads that one task puts together at least.
const ROWS_PER_TASK: usize = 16;
/// Queries whose scores are held at a time; a block skips the keys after its last query.
const QUERY_BLOCK: usize = 64;

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
    let inputs = if scores.bf16 {
        layout.split(&qkv, Values::Bf16)
    } else {
        layout.split(&qkv, Values::F32)
    };
    let (output, log_sum) = layout.forward(&inputs);
    let output = from_values(output, [dims(&qkv)[0], heads.query_width()]);
    tensor(match step.stateful() {
        OpsKind::Tracked(step) => {
            let (inputs, log_sum) = (Arc::new(inputs), log_sum.into());
            let saved = Saved { layout, inputs, log_sum, output: output.clone() };
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
    /// log Σ exp of each query's scores, `[n]` unit by unit.
    log_sum: Arc<[f32]>,
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
        let d_output = in_f32(contiguous(gradients.consume::<Flex>(&ops.node)));
        let [Some(parent)] = ops.parents else { return };
        let shape = [dims(&d_output)[0], ops.state.layout.heads.qkv_width()];
        let d_qkv = ops.state.layout.merge(ops.state.backward(values(&d_output)));
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

/// q̂, k̂ and v, unit by unit.
#[derive(Debug)]
struct Inputs {
    q: Values,
    k: Values,
    v: Values,
}

/// Their gradients.
struct InputGradients {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

/// Numbers as products take them.
#[derive(Debug)]
enum Values {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

impl Values {
    fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
        }
    }

    /// Some of them, as rows of `width`.
    fn rows(&self, range: Range<usize>, width: usize) -> MatRef<'_> {
        let rows = range.len() / width;
        let elements = match self {
            Self::F32(values) => Elements::F32(&values[range]),
            Self::Bf16(values) => Elements::Bf16(&values[range]),
        };
        MatRef::of(elements, rows, width)
    }
}

/// What [`Values`] are made of.
trait Number: Clone + Default + Send {
    fn put(values: &[f32], target: &mut [Self]);
}

impl Number for f32 {
    fn put(values: &[f32], target: &mut [f32]) {
        target.copy_from_slice(values);
    }
}

impl Number for bf16 {
    fn put(values: &[f32], target: &mut [bf16]) {
        round(Isa::detect(), values, target);
    }
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
        (Block::new(self.scores, first, &seen), seen)
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
    fn cut_queries<'a, T>(&self, buffer: &'a mut [T], width: usize) -> Vec<&'a mut [T]> {
        let lengths = self.units(self.heads.query).map(|(segment, _)| segment.queries() * width);
        cut(buffer, lengths)
    }

    /// Cuts a buffer of keys or values into units.
    fn cut_keys<'a, T>(&self, buffer: &'a mut [T]) -> Vec<&'a mut [T]> {
        let (count, dim) = (self.heads.key_value, self.heads.dim);
        cut(buffer, self.units(count).map(|(segment, _)| segment.keys() * dim))
    }

    /// Takes rows apart into units, and rotates queries and keys; `kept` says as what they are kept.
    fn split<T: Number>(&self, qkv: &FlexTensor, kept: fn(Vec<T>) -> Values) -> Inputs {
        let (heads, dim) = (self.heads, self.heads.dim);
        let rows = MatrixRows { values: values(qkv), width: heads.qkv_width() };
        // Some tokens' values of one head, rotated where the position of the first is given.
        let fill = |unit: &mut [T],
                    tokens: &mut dyn Iterator<Item = usize>,
                    (column, first_position): (usize, Option<usize>),
                    rotated: &mut Vec<f32>| {
            rotated.resize(dim, 0.0);
            for (i, (token, y)) in tokens.zip(unit.chunks_exact_mut(dim)).enumerate() {
                let source = rows.part(token, column, dim);
                match first_position {
                    Some(first) => {
                        let (cos, sin) = self.rotary.row(first + i);
                        rotate(self.isa, source, cos, sin, rotated);
                        T::put(rotated, y);
                    }
                    None => T::put(source, y),
                }
            }
        };
        let mut q = vec![T::default(); self.tokens() * heads.query_width()];
        let units: Vec<_> = self.units(heads.query).zip(self.cut_queries(&mut q, dim)).collect();
        units.into_par_iter().for_each_init(Vec::new, |rotated, ((segment, head), unit)| {
            let mut tokens = segment.tokens.clone();
            fill(unit, &mut tokens, (head * dim, Some(segment.prefix_len)), rotated);
        });
        let gather = |first_column: usize, first_position: Option<usize>| {
            let mut buffer = vec![T::default(); self.keys() * heads.key_value_width()];
            let units: Vec<_> =
                self.units(heads.key_value).zip(self.cut_keys(&mut buffer)).collect();
            units.into_par_iter().for_each_init(Vec::new, |rotated, ((segment, head), unit)| {
                let prefix =
                    segment.prefix.map_or(0..0, |index| self.segments[index].tokens.clone());
                let mut tokens = prefix.chain(segment.tokens.clone());
                fill(unit, &mut tokens, (first_column + head * dim, first_position), rotated);
            });
            kept(buffer)
        };
        let k = gather(heads.query_width(), Some(0));
        let v = gather(heads.query_width() + heads.key_value_width(), None);
        Inputs { q: kept(q), k, v }
    }

    /// The inverse of [`Layout::split`] for gradients: those of copied keys and values are added
    /// to the originals'.
    fn merge(&self, mut inputs: InputGradients) -> Vec<f32> {
        self.return_copies(&mut inputs.k);
        self.return_copies(&mut inputs.v);
        let (heads, dim) = (self.heads, self.heads.dim);
        let width = heads.qkv_width();
        let mut rows = vec![0.0; self.tokens() * width];
        let by_segment = cut(&mut rows, self.segments.iter().map(|s| s.queries() * width));
        self.segments.par_iter().zip(by_segment).for_each(|(segment, rows)| {
            let rows = rows.par_chunks_exact_mut(width).with_min_len(ROWS_PER_TASK);
            rows.enumerate().for_each(|(i, row)| {
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

    /// o, as rows `[tokens, H·D]`, and log Σ exp of each query's scores, `[n]` unit by unit.
    fn forward(&self, inputs: &Inputs) -> (Vec<f32>, Vec<f32>) {
        let (heads, dim) = (self.heads, self.heads.dim);
        let mut log_sum = vec![0.0; self.tokens() * heads.query];
        let mut by_unit = vec![0.0; self.tokens() * heads.query_width()];
        let units: Vec<_> = self
            .units(heads.query)
            .zip(self.cut_queries(&mut by_unit, dim))
            .zip(self.cut_queries(&mut log_sum, 1))
            .collect();
        let scratch = <(Vec<f32>, Vec<bf16>)>::default;
        units.into_par_iter().for_each_init(scratch, |scratch, (((segment, head), o), log_sum)| {
            let (scores, rounded) = scratch;
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
                let p = factor(self.isa, self.scores.bf16, scores, keys, rounded);
                gemm(MatMut::new(o, queries, dim), 1.0, p, v.rows(seen), Threads::One);
            }
        });
        (self.join_heads(&by_unit), log_sum)
    }

    /// Units of query heads to rows.
    fn join_heads(&self, by_unit: &[f32]) -> Vec<f32> {
        let (width, dim) = (self.heads.query_width(), self.heads.dim);
        let mut rows = vec![0.0; by_unit.len()];
        let by_segment = cut(&mut rows, self.segments.iter().map(|s| s.queries() * width));
        self.segments.par_iter().zip(by_segment).for_each(|(segment, rows)| {
            rows.par_chunks_exact_mut(width).with_min_len(ROWS_PER_TASK).enumerate().for_each(
                |(i, row)| {
                    for (head, target) in row.chunks_exact_mut(dim).enumerate() {
                        let start = self.query_unit(segment, head, dim).start + i * dim;
                        target.copy_from_slice(&by_unit[start..start + dim]);
                    }
                },
            );
        });
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
        (inputs.q.rows(own, dim), inputs.k.rows(shared.clone(), dim), inputs.v.rows(shared, dim))
    }
}

impl Saved {
    /// The gradients of q̂, k̂ and v, from do as rows.
    fn backward(&self, d_output: &[f32]) -> InputGradients {
        let Self { layout, inputs, .. } = self;
        let (heads, dim) = (layout.heads, layout.heads.dim);
        let rounded = layout.scores.bf16.then(|| rounded_values(d_output));
        let factor = rounded.as_deref().map_or(Elements::F32(d_output), Elements::Bf16);
        let factor = MatRef::of(factor, layout.tokens(), heads.query_width());
        let mut dq = vec![0.0; inputs.q.len()];
        let units: Vec<_> =
            layout.units(heads.query).zip(layout.cut_queries(&mut dq, dim)).collect();
        // Each query head has its own share of dk and dv; the shares of a group are then added in
        // the order of its heads.
        let shares: Vec<(Vec<f32>, Vec<f32>)> = units
            .into_par_iter()
            .map_init(Scratch::default, |scratch, ((segment, head), dq)| {
                let unit = UnitBackward { saved: self, d_output, factor, segment, head };
                unit.run(scratch, dq)
            })
            .collect();
        let mut dk = vec![0.0; inputs.k.len()];
        let mut dv = vec![0.0; inputs.v.len()];
        let groups: Vec<_> = layout
            .cut_keys(&mut dk)
            .into_iter()
            .zip(layout.cut_keys(&mut dv))
            .zip(shares.chunks(heads.group()))
            .collect();
        groups.into_par_iter().for_each(|((dk, dv), shares)| {
            for (dk_share, dv_share) in shares {
                dk.iter_mut().zip(dk_share).for_each(|(sum, value)| *sum += value);
                dv.iter_mut().zip(dv_share).for_each(|(sum, value)| *sum += value);
            }
        });
        InputGradients { q: dq, k: dk, v: dv }
    }
}

/// Buffers that a thread keeps from unit to unit.
#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    d_scores: Vec<f32>,
    rounded: Vec<bf16>,
    d_rounded: Vec<bf16>,
    inner: Vec<f32>,
}

/// The backward pass of one query head of one segment.
struct UnitBackward<'a> {
    saved: &'a Saved,
    d_output: &'a [f32],
    /// The same as products multiply it.
    factor: MatRef<'a>,
    segment: &'a Placed,
    head: usize,
}

impl UnitBackward<'_> {
    /// Writes dq̂; returns this head's shares of dk̂ and dv.
    fn run(&self, scratch: &mut Scratch, dq: &mut [f32]) -> (Vec<f32>, Vec<f32>) {
        let Saved { layout, inputs, log_sum, output } = self.saved;
        let Layout { isa, heads, .. } = *layout;
        let dim = heads.dim;
        let (q, k, v) = layout.unit_inputs(inputs, self.segment, self.head);
        let log_sum = &log_sum[layout.query_unit(self.segment, self.head, 1)];
        let columns = self.head * dim..(self.head + 1) * dim;
        let d_output = self.factor.rows(self.segment.tokens.clone()).columns(columns.clone());

        let width = heads.query_width();
        let (o_rows, do_rows) = (
            MatrixRows { values: values(output), width },
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
        let block_size = layout.block_scores(self.segment);
        scratch.scores.resize(block_size, 0.0);
        scratch.d_scores.resize(block_size, 0.0);

        let keys = self.segment.keys();
        let (mut dk, mut dv) = (vec![0.0; keys * dim], vec![0.0; keys * dim]);
        for (block, dq) in dq.chunks_mut(QUERY_BLOCK * dim).enumerate() {
            let (first, queries) = (block * QUERY_BLOCK, dq.len() / dim);
            let rows = first..first + queries;
            let (block, seen) = layout.block(self.segment, rows.clone());
            let keys = block.keys;
            let scores = &mut scratch.scores[..queries * keys];
            let d_scores = &mut scratch.d_scores[..queries * keys];
            let (q, d_output) = (q.rows(rows.clone()), d_output.rows(rows.clone()));
            let (k, v) = (k.rows(seen.clone()), v.rows(seen.clone()));
            gemm(MatMut::new(scores, queries, keys), 1.0, q, k.t(), Threads::One);
            gemm(MatMut::new(d_scores, queries, keys), 1.0, d_output, v.t(), Threads::One);
            let (log_sum, inner) = (&log_sum[rows.clone()], &scratch.inner[rows]);
            causal_softmax_backward(isa, block, scores, d_scores, log_sum, inner);
            let p = factor(isa, layout.scores.bf16, scores, keys, &mut scratch.rounded);
            let ds = factor(isa, layout.scores.bf16, d_scores, keys, &mut scratch.d_rounded);
            gemm(MatMut::new(dq, queries, dim), 1.0, ds, k, Threads::One);
            let dk = MatMut::new(&mut dk[seen.start * dim..seen.end * dim], keys, dim);
            gemm_add(dk, 1.0, ds.t(), q, Threads::One);
            let dv = MatMut::new(&mut dv[seen.start * dim..seen.end * dim], keys, dim);
            gemm_add(dv, 1.0, p.t(), d_output, Threads::One);
        }
        (dk, dv)
    }
}

/// Rows of `width` as products multiply them; `scratch` holds them where these multiply bf16.
fn factor<'a>(
    isa: Isa,
    bf16: bool,
    values: &'a [f32],
    width: usize,
    scratch: &'a mut Vec<bf16>,
) -> MatRef<'a> {
    let elements = if bf16 {
        scratch.resize(values.len(), bf16::ZERO);
        round(isa, values, scratch);
        Elements::Bf16(scratch)
    } else {
        Elements::F32(values)
    };
    MatRef::of(elements, values.len() / width, width)
}

/// Cuts a buffer into consecutive parts of these lengths.
fn cut<T>(buffer: &mut [T], lengths: impl Iterator<Item = usize>) -> Vec<&mut [T]> {
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
