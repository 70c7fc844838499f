//! CPU form of [`crate::ops::attention`].
//!
//! The unit of work is one head of one segment. Queries, keys and values are laid out unit by unit,
//! each `[n, D]`, so that a unit's products run on contiguous memory and its results are a slice
//! of its own.

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
use crate::models::rope::RotaryTable;
use crate::ops::attention::Heads;

/// Queries whose scores are held at a time; a block skips the keys after its last query.
const QUERY_BLOCK: usize = 128;

pub(in crate::ops) fn attention(
    qkv: Tensor<2>,
    heads: Heads,
    segments: &Arc<[Range<usize>]>,
    rotary: &RotaryTable,
) -> Tensor<2> {
    let qkv = node(qkv);
    let step = Attention.prepare::<NoCheckpointing>([qkv.node()]).compute_bound();
    let qkv = contiguous(qkv.into_primitive());
    let layout =
        Layout { isa: Isa::detect(), heads, segments: segments.clone(), rotary: rotary.clone() };
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
        let d_qkv = layout.merge(&d_inputs);
        let shape = [dims(&output)[0], layout.heads.qkv_width()];
        gradients.register::<Flex>(parent.id, from_values(d_qkv, shape));
    }
}

/// What all units share.
#[derive(Debug, Clone)]
struct Layout {
    isa: Isa,
    heads: Heads,
    segments: Arc<[Range<usize>]>,
    rotary: RotaryTable,
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
    fn tokens(&self) -> usize {
        self.segments.last().map_or(0, |segment| segment.end)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.heads.dim as f32).sqrt()
    }

    /// All units of `count` heads: segment by segment, and in each head by head.
    fn units(&self, count: usize) -> impl Iterator<Item = (&Range<usize>, usize)> {
        self.segments.iter().flat_map(move |segment| (0..count).map(move |head| (segment, head)))
    }

    /// Where a unit lies in a buffer of `count` heads with `width` values for each token.
    fn unit(
        &self,
        segment: &Range<usize>,
        head: usize,
        count: usize,
        width: usize,
    ) -> Range<usize> {
        let start = (segment.start * count + head * segment.len()) * width;
        start..start + segment.len() * width
    }

    /// Cuts a buffer of `count` heads with `width` values for each token into its units.
    fn cut<'a>(&self, buffer: &'a mut [f32], count: usize, width: usize) -> Vec<&'a mut [f32]> {
        let mut rest = buffer;
        self.units(count)
            .map(|(segment, _)| rest.split_off_mut(..segment.len() * width).expect("a unit"))
            .collect()
    }

    /// Takes rows apart into units, and rotates queries and keys.
    fn split(&self, qkv: &FlexTensor) -> Inputs {
        let (heads, dim) = (self.heads, self.heads.dim);
        let rows = MatrixRows { values: values(qkv), width: heads.qkv_width() };
        let gather = |count: usize, first_column: usize, rotated: bool| {
            let mut buffer = vec![0.0; self.tokens() * count * dim];
            let units: Vec<_> = self.units(count).zip(self.cut(&mut buffer, count, dim)).collect();
            units.into_par_iter().for_each(|((segment, head), unit)| {
                let first = first_column + head * dim;
                for (position, target) in unit.chunks_exact_mut(dim).enumerate() {
                    let source = rows.part(segment.start + position, first, dim);
                    if rotated {
                        let (cos, sin) = self.rotary.row(position);
                        rotate(self.isa, source, cos, sin, target);
                    } else {
                        target.copy_from_slice(source);
                    }
                }
            });
            buffer
        };
        let (query_width, key_value_width) = (heads.query_width(), heads.key_value_width());
        Inputs {
            q: gather(heads.query, 0, true),
            k: gather(heads.key_value, query_width, true),
            v: gather(heads.key_value, query_width + key_value_width, false),
            log_sum: Vec::new(),
        }
    }

    /// The inverse of [`Layout::split`] for gradients.
    fn merge(&self, inputs: &Inputs) -> Vec<f32> {
        let (heads, dim) = (self.heads, self.heads.dim);
        let width = heads.qkv_width();
        let mut rows = vec![0.0; self.tokens() * width];
        let mut rest = rows.as_mut_slice();
        let by_segment: Vec<_> = self
            .segments
            .iter()
            .map(|s| (s, rest.split_off_mut(..s.len() * width).expect("a segment")))
            .collect();
        by_segment.into_par_iter().for_each(|(segment, rows)| {
            rows.par_chunks_exact_mut(width).enumerate().for_each(|(position, row)| {
                let (cos, sin) = self.rotary.row(position);
                let (q_row, rest) = row.split_at_mut(heads.query_width());
                let (k_row, v_row) = rest.split_at_mut(heads.key_value_width());
                let part = |count: usize, head: usize| {
                    let start = self.unit(segment, head, count, dim).start + position * dim;
                    start..start + dim
                };
                for (head, target) in q_row.chunks_exact_mut(dim).enumerate() {
                    let source = &inputs.q[part(heads.query, head)];
                    rotate_back(self.isa, source, cos, sin, target);
                }
                for (head, target) in k_row.chunks_exact_mut(dim).enumerate() {
                    let source = &inputs.k[part(heads.key_value, head)];
                    rotate_back(self.isa, source, cos, sin, target);
                }
                for (head, target) in v_row.chunks_exact_mut(dim).enumerate() {
                    let source = &inputs.v[part(heads.key_value, head)];
                    target.copy_from_slice(source);
                }
            });
        });
        rows
    }

    /// o, as rows `[tokens, H·D]`; fills `log_sum`.
    fn forward(&self, inputs: &mut Inputs) -> Vec<f32> {
        let (heads, dim) = (self.heads, self.heads.dim);
        let mut log_sum = vec![0.0; self.tokens() * heads.query];
        let mut by_unit = vec![0.0; self.tokens() * heads.query_width()];
        let units: Vec<_> = self
            .units(heads.query)
            .zip(self.cut(&mut by_unit, heads.query, dim))
            .zip(self.cut(&mut log_sum, heads.query, 1))
            .collect();
        units.into_par_iter().for_each_init(Vec::new, |scores, (((segment, head), o), log_sum)| {
            let (q, k, v) = self.unit_inputs(inputs, segment, head);
            scores.resize(QUERY_BLOCK.min(segment.len()) * segment.len(), 0.0);
            let blocks = o.chunks_mut(QUERY_BLOCK * dim).zip(log_sum.chunks_mut(QUERY_BLOCK));
            for (block, (o, log_sum)) in blocks.enumerate() {
                let first = block * QUERY_BLOCK;
                let (queries, keys) = (log_sum.len(), first + log_sum.len());
                let scores = &mut scores[..queries * keys];
                let target = MatMut::new(scores, queries, keys);
                gemm(target, 1.0, q.rows(first..keys), k.rows(0..keys).t(), Threads::One);
                let block = Block { keys, first_query: first, scale: self.scale() };
                causal_softmax(self.isa, block, scores, log_sum);
                let p = MatRef::new(scores, queries, keys);
                gemm(MatMut::new(o, queries, dim), 1.0, p, v.rows(0..keys), Threads::One);
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
            for position in 0..segment.len() {
                for head in 0..count {
                    let start = self.unit(segment, head, count, dim).start + position * dim;
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
        segment: &Range<usize>,
        head: usize,
    ) -> (MatRef<'a>, MatRef<'a>, MatRef<'a>) {
        let heads = self.heads;
        let shared = self.unit(segment, head / heads.group(), heads.key_value, heads.dim);
        let own = self.unit(segment, head, heads.query, heads.dim);
        let view = |buffer: &'a [f32], unit: Range<usize>| {
            MatRef::new(&buffer[unit], segment.len(), heads.dim)
        };
        (view(&inputs.q, own), view(&inputs.k, shared.clone()), view(&inputs.v, shared))
    }

    /// The gradients of q̂, k̂ and v, from o and do as rows.
    fn backward(&self, inputs: &Inputs, output: &[f32], d_output: &[f32]) -> Inputs {
        let (heads, dim) = (self.heads, self.heads.dim);
        let mut dq = vec![0.0; inputs.q.len()];
        let units: Vec<_> =
            self.units(heads.query).zip(self.cut(&mut dq, heads.query, dim)).collect();
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
            .cut(&mut dk, heads.key_value, dim)
            .into_iter()
            .zip(self.cut(&mut dv, heads.key_value, dim))
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
    segment: &'a Range<usize>,
    head: usize,
}

impl UnitBackward<'_> {
    /// Writes dq̂; returns this head's shares of dk̂ and dv.
    fn run(&self, scratch: &mut Scratch, dq: &mut [f32]) -> (Vec<f32>, Vec<f32>) {
        let Layout { isa, heads, .. } = *self.layout;
        let (dim, length, scale) = (heads.dim, self.segment.len(), self.layout.scale());
        let (q, k, v) = self.layout.unit_inputs(self.inputs, self.segment, self.head);
        let log_sum =
            &self.inputs.log_sum[self.layout.unit(self.segment, self.head, heads.query, 1)];
        let columns = self.head * dim..(self.head + 1) * dim;
        let d_output = MatRef::new(self.d_output, self.layout.tokens(), heads.query_width())
            .rows(self.segment.clone())
            .columns(columns.clone());

        let width = heads.query_width();
        let (o_rows, do_rows) = (
            MatrixRows { values: self.output, width },
            MatrixRows { values: self.d_output, width },
        );
        scratch.inner.clear();
        scratch.inner.extend(self.segment.clone().map(|token| {
            inner_product(
                isa,
                do_rows.part(token, columns.start, dim),
                o_rows.part(token, columns.start, dim),
            )
        }));
        let block_size = QUERY_BLOCK.min(length) * length;
        scratch.scores.resize(block_size, 0.0);
        scratch.d_scores.resize(block_size, 0.0);

        let (mut dk, mut dv) = (vec![0.0; length * dim], vec![0.0; length * dim]);
        for (block, dq) in dq.chunks_mut(QUERY_BLOCK * dim).enumerate() {
            let first = block * QUERY_BLOCK;
            let queries = dq.len() / dim;
            let keys = first + queries;
            let scores = &mut scratch.scores[..queries * keys];
            let d_scores = &mut scratch.d_scores[..queries * keys];
            let (q, d_output) = (q.rows(first..keys), d_output.rows(first..keys));
            let (k, v) = (k.rows(0..keys), v.rows(0..keys));
            gemm(MatMut::new(scores, queries, keys), 1.0, q, k.t(), Threads::One);
            gemm(MatMut::new(d_scores, queries, keys), 1.0, d_output, v.t(), Threads::One);
            let (log_sum, inner) = (&log_sum[first..keys], &scratch.inner[first..keys]);
            let block = Block { keys, first_query: first, scale };
            causal_softmax_backward(isa, block, scores, d_scores, log_sum, inner);
            let p = MatRef::new(scores, queries, keys);
            let ds = MatRef::new(d_scores, queries, keys);
            gemm(MatMut::new(dq, queries, dim), 1.0, ds, k, Threads::One);
            let dk = MatMut::new(&mut dk[..keys * dim], keys, dim);
            gemm_add(dk, 1.0, ds.t(), q, Threads::One);
            let dv = MatMut::new(&mut dv[..keys * dim], keys, dim);
            gemm_add(dv, 1.0, p.t(), d_output, Threads::One);
        }
        (dk, dv)
    }
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
