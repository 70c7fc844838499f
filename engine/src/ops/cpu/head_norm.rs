//! CPU form of [`crate::ops::head_norm`].

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

use super::bf16::in_f32;
use super::isa::Isa;
use super::rms_norm::{backward_rows, factor, inverse_roots, scale_rows, weight_gradient};
use super::step::{contiguous, dims, from_values, node, tensor, values};
use crate::ops::attention::Heads;
use crate::ops::rms_norm::Norm;

/// Tokens that one task handles; fixed, as the weights' gradients are summed block by block.
const BLOCK_TOKENS: usize = 64;

pub(in crate::ops) fn head_norm(
    qkv: Tensor<2>,
    query_weight: Tensor<2>,
    key_weight: Tensor<2>,
    heads: Heads,
    norm: Norm,
) -> Tensor<2> {
    let isa = Isa::detect();
    let (qkv, query_weight, key_weight) = (node(qkv), node(query_weight), node(key_weight));
    let step = HeadNorm
        .prepare::<NoCheckpointing>([qkv.node(), query_weight.node(), key_weight.node()])
        .compute_bound();
    let qkv = contiguous(qkv.into_primitive());
    let weights = [query_weight, key_weight].map(|weight| factor(weight.into_primitive(), norm));
    let (parts, roots) = (Parts::new(heads), heads.query + heads.key_value);
    let [tokens, width] = dims(&qkv);
    let mut y = values(&qkv).to_vec();
    let mut inverse_root = vec![0.0; tokens * roots];
    y.par_chunks_mut(BLOCK_TOKENS * width)
        .zip(values(&qkv).par_chunks(BLOCK_TOKENS * width))
        .zip(inverse_root.par_chunks_mut(BLOCK_TOKENS * roots))
        .for_each(|((y, x), root)| {
            let tokens = y.chunks_exact_mut(width).zip(x.chunks_exact(width));
            for ((y, x), root) in tokens.zip(root.chunks_exact_mut(roots)) {
                for (part, weight) in parts.0.iter().zip(&weights) {
                    let (x, y) = (&x[part.columns.clone()], &mut y[part.columns.clone()]);
                    let root = &mut root[part.roots.clone()];
                    inverse_roots(isa, x, norm.epsilon as f32, root);
                    scale_rows(isa, x, values(weight), root, y);
                }
            }
        });
    let y = from_values(y, [tokens, width]);
    tensor(match step.stateful() {
        OpsKind::Tracked(step) => {
            step.finish(Saved { qkv, weights, inverse_root: inverse_root.into(), heads }, y)
        }
        OpsKind::UnTracked(step) => step.finish(y),
    })
}

/// Queries and keys in the row of a token.
struct Parts([Part; 2]);

struct Part {
    /// Where its heads lie.
    columns: Range<usize>,
    /// Where the ρ of its heads lie.
    roots: Range<usize>,
}

impl Parts {
    fn new(heads: Heads) -> Self {
        let part = |first: usize, count: usize| Part {
            columns: first * heads.dim..(first + count) * heads.dim,
            roots: first..first + count,
        };
        Self([part(0, heads.query), part(heads.query, heads.key_value)])
    }
}

#[derive(Debug)]
struct HeadNorm;

#[derive(Debug, Clone)]
struct Saved {
    qkv: FlexTensor,
    /// ŵ of queries and of keys.
    weights: [FlexTensor; 2],
    /// ρ of each head of each token.
    inverse_root: Arc<[f32]>,
    heads: Heads,
}

impl Backward<Flex, 3> for HeadNorm {
    type State = Saved;

    fn backward(
        self,
        ops: Ops<Saved, 3>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let isa = Isa::detect();
        let dy = in_f32(contiguous(gradients.consume::<Flex>(&ops.node)));
        let [qkv_node, query_node, key_node] = ops.parents;
        let Saved { qkv, weights, inverse_root, heads } = ops.state;
        let (parts, roots) = (Parts::new(heads), heads.query + heads.key_value);
        let [tokens, width] = dims(&qkv);
        let block = BLOCK_TOKENS * width;
        if let Some(parent) = qkv_node {
            let mut dx = values(&dy).to_vec();
            dx.par_chunks_mut(block)
                .zip(values(&dy).par_chunks(block))
                .zip(values(&qkv).par_chunks(block))
                .zip(inverse_root.par_chunks(BLOCK_TOKENS * roots))
                .for_each(|(((dx, dy), x), root)| {
                    let tokens = dx.chunks_exact_mut(width).zip(dy.chunks_exact(width));
                    let inputs = x.chunks_exact(width).zip(root.chunks_exact(roots));
                    for ((dx, dy), (x, root)) in tokens.zip(inputs) {
                        for (part, weight) in parts.0.iter().zip(&weights) {
                            let columns = || part.columns.clone();
                            let root = &root[part.roots.clone()];
                            let (dy, x, dx) = (&dy[columns()], &x[columns()], &mut dx[columns()]);
                            backward_rows(isa, dy, x, values(weight), root, dx);
                        }
                    }
                });
            gradients.register::<Flex>(parent.id, from_values(dx, [tokens, width]));
        }
        for (parent, part) in [query_node, key_node].into_iter().zip(&parts.0) {
            let Some(parent) = parent else { continue };
            let shares: Vec<Vec<f32>> = values(&dy)
                .par_chunks(block)
                .zip(values(&qkv).par_chunks(block))
                .zip(inverse_root.par_chunks(BLOCK_TOKENS * roots))
                .map(|((dy, x), root)| {
                    let mut dw = vec![0.0; heads.dim];
                    let tokens = dy.chunks_exact(width).zip(x.chunks_exact(width));
                    for ((dy, x), root) in tokens.zip(root.chunks_exact(roots)) {
                        let (dy, x) = (&dy[part.columns.clone()], &x[part.columns.clone()]);
                        weight_gradient(isa, dy, x, &root[part.roots.clone()], &mut dw);
                    }
                    dw
                })
                .collect();
            let mut dw = vec![0.0; heads.dim];
            for share in shares {
                dw.iter_mut().zip(share).for_each(|(sum, value)| *sum += value);
            }
            gradients.register::<Flex>(parent.id, from_values(dw, [1, heads.dim]));
        }
    }
}
