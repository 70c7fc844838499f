//! GPU form of [`crate::ops::attention`].
//!
//! The rotated queries and keys, and the values, are kept for the backward pass, which computes each
//! block's weights again: a block of queries times all their keys is the largest matrix there is.

use std::ops::Range;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::{DType, Int, Tensor, TensorData};
use burn_cubecl::Cube;
use burn_cubecl::tensor::CubeTensor;

use super::{
    block_a_row, cast, contiguous, element, joined, kernels, like_of, node, plain, primitive,
    product, tensor, thread_an_element, zeros,
};
use crate::batch::Segment;
use crate::models::rope::RotaryTable;
use crate::ops::attention::{Heads, Scores};

/// Queries of a block.
const BLOCK: usize = 1024;

pub(in crate::ops) fn attention(
    qkv: Tensor<2>,
    heads: Heads,
    scores: Scores,
    segments: &[Segment],
    rotary: &RotaryTable,
) -> Tensor<2> {
    let qkv = node(qkv);
    let step = Attention.prepare::<NoCheckpointing>([qkv.node()]).compute_bound();
    let qkv: Tensor<2> = plain(qkv.into_primitive());
    let rotation = Rotation::new(rotary, segments, &qkv);
    let dtype = if scores.bf16 { DType::BF16 } else { DType::F32 };
    let [q, k, v] = rotation.split(qkv, heads, dtype);
    let saved = Saved { q, k, v, rotation, heads, scores, segments: segments.to_vec() };
    let y = saved.forward();
    tensor(match step.stateful() {
        OpsKind::Tracked(step) => step.finish(saved, y),
        OpsKind::UnTracked(step) => step.finish(y),
    })
}

/// Each token's rotation.
#[derive(Debug, Clone)]
struct Rotation {
    cosines: CubeTensor,
    sines: CubeTensor,
    /// Of each token.
    positions: CubeTensor,
    pairs: usize,
}

impl Rotation {
    fn new(rotary: &RotaryTable, segments: &[Segment], like: &Tensor<2>) -> Self {
        let device = like.device();
        let positions: Vec<i32> = segments
            .iter()
            .flat_map(|Segment { tokens, prefix }| {
                (0..tokens.len()).map(|offset| (prefix.len() + offset) as i32)
            })
            .collect();
        let count = positions.len();
        let positions: Tensor<1, Int> =
            Tensor::from_data(TensorData::new(positions, [count]), (&device, DType::I32));
        let (cosines, sines) = rotary.values();
        let table = |values: &[f32]| {
            let data = TensorData::new(values.to_vec(), [values.len()]);
            contiguous(Tensor::<1>::from_data(data, &device))
        };
        Self {
            cosines: table(cosines),
            sines: table(sines),
            positions: positions.try_into_primitive::<Cube>().expect("a tensor on a GPU"),
            pairs: rotary.pairs(),
        }
    }

    /// q̂, k̂ and v, each `[heads, tokens, dim]`.
    fn split(&self, qkv: Tensor<2>, heads: Heads, dtype: DType) -> [Tensor<3>; 3] {
        let tokens = qkv.dims()[0];
        let qkv = contiguous(qkv);
        parts(heads).map(|part| {
            let y = like_of(&qkv, &[part.count, tokens, heads.dim], dtype);
            self.turn(&qkv, &y, heads, &part, false);
            plain(y)
        })
    }

    /// The gradient of rows from those of q̂, k̂ and v.
    fn join(&self, gradients: [Tensor<3>; 3], heads: Heads) -> CubeTensor {
        let gradients = gradients.map(contiguous);
        let tokens = gradients[0].meta.shape()[1];
        let y = like_of(&gradients[0], &[tokens, heads.qkv_width()], DType::F32);
        for (x, part) in gradients.iter().zip(parts(heads)) {
            self.turn(x, &y, heads, &part, true);
        }
        y
    }

    /// Takes a part of rows `x` to its heads `y`, or with `joins` heads `x` to their part of rows `y`.
    fn turn(&self, x: &CubeTensor, y: &CubeTensor, heads: Heads, part: &Part, joins: bool) {
        let rows = if joins { y } else { x };
        let tokens = rows.meta.shape()[0];
        let (blocks, threads) = thread_an_element(part.count * tokens * heads.dim);
        kernels::turn_heads::launch(
            &y.client,
            blocks,
            threads,
            x.clone().into_buffer_arg(),
            self.cosines.clone().into_buffer_arg(),
            self.sines.clone().into_buffer_arg(),
            self.positions.clone().into_buffer_arg(),
            y.clone().into_buffer_arg(),
            tokens as u32,
            heads.qkv_width() as u32,
            part.first_column as u32,
            heads.dim as u32,
            if part.turns { self.pairs as u32 } else { 0 },
            joins,
            [element(x), element(y)],
        );
    }
}

/// The queries, the keys or the values of rows.
struct Part {
    first_column: usize,
    /// Heads.
    count: usize,
    turns: bool,
}

fn parts(heads: Heads) -> [Part; 3] {
    let (queries, keys) = (heads.query_width(), heads.key_value_width());
    [
        Part { first_column: 0, count: heads.query, turns: true },
        Part { first_column: queries, count: heads.key_value, turns: true },
        Part { first_column: queries + keys, count: heads.key_value, turns: false },
    ]
}

#[derive(Debug)]
struct Attention;

#[derive(Debug, Clone)]
struct Saved {
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    rotation: Rotation,
    heads: Heads,
    scores: Scores,
    segments: Vec<Segment>,
}

/// Some queries of a segment, and the keys of its context that any of them sees.
struct Block {
    /// In the batch.
    queries: Range<usize>,
    /// In the context: the prefix, and then the segment.
    keys: Range<usize>,
    /// How many of the keys lie before the first query.
    earlier: usize,
}

impl Saved {
    /// The blocks of a segment.
    fn blocks(&self, Segment { tokens, prefix }: &Segment) -> impl Iterator<Item = Block> {
        let (tokens, before, scores) = (tokens.clone(), prefix.len(), self.scores);
        (0..tokens.len()).step_by(BLOCK).map(move |start| {
            let end = tokens.len().min(start + BLOCK);
            let first_key = scores.first_key(before + start);
            Block {
                queries: tokens.start + start..tokens.start + end,
                keys: first_key..before + end,
                earlier: before + start - first_key,
            }
        })
    }

    /// Some of the rows of heads.
    fn rows(x: &Tensor<3>, tokens: Range<usize>) -> Tensor<3> {
        if tokens == (0..x.dims()[1]) { x.clone() } else { x.clone().slice_dim(1, tokens) }
    }

    /// The rows of a segment's context.
    fn context(x: &Tensor<3>, Segment { tokens, prefix }: &Segment) -> Tensor<3> {
        let own = Self::rows(x, tokens.clone());
        if prefix.is_empty() {
            return own;
        }
        Tensor::cat(vec![Self::rows(x, prefix.clone()), own], 1)
    }

    /// Rows of query heads as rows of the key heads that they read, `[K, group · n, D]`.
    fn grouped(&self, x: Tensor<3>) -> Tensor<3> {
        let [_, tokens, dim] = x.dims();
        x.reshape([self.heads.key_value, self.heads.group() * tokens, dim])
    }

    /// The inverse of [`Saved::grouped`].
    fn ungrouped(&self, x: Tensor<3>) -> Tensor<3> {
        let [_, rows, dim] = x.dims();
        x.reshape([self.heads.query, rows / self.heads.group(), dim])
    }

    /// The output's rows.
    fn forward(&self) -> CubeTensor {
        let dtype = self.q.dtype();
        let mut outputs = Vec::new();
        for segment in &self.segments {
            let (k, v) = (Self::context(&self.k, segment), Self::context(&self.v, segment));
            for block in self.blocks(segment) {
                let q = self.grouped(Self::rows(&self.q, block.queries.clone()));
                let (k, v) =
                    (Self::rows(&k, block.keys.clone()), Self::rows(&v, block.keys.clone()));
                let products = contiguous(product(q, k.transpose(), DType::F32));
                let weights = like_of(&products, products.meta.shape(), dtype);
                let (count, threads) = block_a_row(self.heads.query * block.queries.len());
                kernels::causal_softmax::launch(
                    &products.client,
                    count,
                    threads,
                    products.clone().into_buffer_arg(),
                    weights.clone().into_buffer_arg(),
                    block.queries.len() as u32,
                    block.keys.len() as u32,
                    block.earlier as u32,
                    self.scores.window.unwrap_or(0) as u32,
                    self.scores.scale,
                    self.scores.softcap.unwrap_or(0.0),
                    [element(&products), element(&weights)],
                );
                let y = product(plain(weights), v, dtype);
                outputs.push(self.ungrouped(y));
            }
        }
        let y = joined(outputs, 1);
        let tokens = y.dims()[1];
        primitive(y.swap_dims(0, 1).reshape([tokens, self.heads.query_width()]))
    }

    /// The gradients of q̂, k̂ and v.
    fn backward(&self, dy: Tensor<2>) -> [Tensor<3>; 3] {
        let tokens = dy.dims()[0];
        let dy = cast(dy, self.q.dtype());
        let dy = dy.reshape([tokens, self.heads.query, self.heads.dim]).swap_dims(0, 1);
        let dy: Tensor<3> = plain(contiguous(dy));
        let mut dq = Vec::new();
        let none = |x: &Tensor<3>| zeros(x.dims(), DType::F32, &x.device());
        let [mut dk, mut dv] = [&self.k, &self.v].map(none);
        for segment in &self.segments {
            let (k, v) = (Self::context(&self.k, segment), Self::context(&self.v, segment));
            let [mut of_keys, mut of_values] = [&k, &v].map(none);
            for block in self.blocks(segment) {
                let [q, dy] =
                    [&self.q, &dy].map(|x| self.grouped(Self::rows(x, block.queries.clone())));
                let [k, v] = [&k, &v].map(|x| Self::rows(x, block.keys.clone()));
                let products = contiguous(product(q.clone(), k.clone().transpose(), DType::F32));
                let dweights = contiguous(product(dy.clone(), v.transpose(), DType::F32));
                let [weights, dproducts] =
                    [(); 2].map(|()| like_of(&products, products.meta.shape(), q.dtype()));
                let (count, threads) = block_a_row(self.heads.query * block.queries.len());
                kernels::causal_softmax_backward::launch(
                    &products.client,
                    count,
                    threads,
                    products.clone().into_buffer_arg(),
                    dweights.into_buffer_arg(),
                    weights.clone().into_buffer_arg(),
                    dproducts.clone().into_buffer_arg(),
                    block.queries.len() as u32,
                    block.keys.len() as u32,
                    block.earlier as u32,
                    self.scores.window.unwrap_or(0) as u32,
                    self.scores.scale,
                    self.scores.softcap.unwrap_or(0.0),
                    [element(&products), element(&weights)],
                );
                let [weights, dproducts]: [Tensor<3>; 2] = [weights, dproducts].map(plain);
                let into = |sum: Tensor<3>, part: Tensor<3>| add(sum, block.keys.clone(), part);
                of_values = into(of_values, product(weights.transpose(), dy, DType::F32));
                let turned = dproducts.clone().transpose();
                of_keys = into(of_keys, product(turned, q, DType::F32));
                dq.push(self.ungrouped(product(dproducts, k, DType::F32)));
            }
            let before = segment.prefix.len();
            let all = before + segment.tokens.len();
            for (sum, part) in [(&mut dk, of_keys), (&mut dv, of_values)] {
                let mut total = sum.clone();
                if before > 0 {
                    total = add(total, segment.prefix.clone(), Self::rows(&part, 0..before));
                }
                *sum = add(total, segment.tokens.clone(), Self::rows(&part, before..all));
            }
        }
        [joined(dq, 1), dk, dv]
    }
}

/// `sum`, with `part` added to some of its rows.
fn add(sum: Tensor<3>, rows: Range<usize>, part: Tensor<3>) -> Tensor<3> {
    let [heads, all, dim] = sum.dims();
    if rows == (0..all) {
        return sum + part;
    }
    let place = [0..heads, rows, 0..dim];
    let part = sum.clone().slice(place.clone()) + part;
    sum.slice_assign(place, part)
}

impl Backward<Cube, 1> for Attention {
    type State = Saved;

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = plain(gradients.consume::<Cube>(&ops.node));
        let [parent] = ops.parents;
        let Some(parent) = parent else { return };
        let saved = ops.state;
        let qkv = saved.rotation.join(saved.backward(dy), saved.heads);
        gradients.register::<Cube>(parent.id, qkv);
    }
}
