//! CPU form of [`crate::ops::token_nll`].

use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use super::gemm::{MatMut, Threads, gemm_add, product};
use super::head::for_each_chunk;
use super::step::{contiguous, dims, from_values, node, tensor, values};
use crate::batch::Target;
use crate::ops::token_nll::TokenNll;

pub(in crate::ops) fn token_nll(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    softcap: Option<f32>,
    targets: &[Target],
) -> TokenNll {
    let (hidden_tracked, weight_tracked) = (hidden.is_tracked(), weight.is_tracked());
    let (hidden, weight) = (node(hidden), node(weight));
    let step = Head.prepare::<NoCheckpointing>([hidden.node(), weight.node()]).compute_bound();
    let hidden = contiguous(hidden.into_primitive());
    let weight = contiguous(weight.into_primitive());
    let width = dims(&hidden)[1];

    let mut losses = Vec::with_capacity(targets.len());
    // A frozen head's dh is linear in the upstream gradient, row by row, so it can be taken now,
    // while the logits are there. A head that trains needs the logits once more either way.
    let mut d_rows = Vec::new();
    let takes_rows = hidden_tracked && !weight_tracked;
    for_each_chunk(
        &hidden,
        &weight,
        softcap,
        targets,
        |_, _| 1.0,
        |chunk| {
            losses.extend_from_slice(chunk.losses);
            if takes_rows {
                d_rows.extend(product(1.0, chunk.dz, chunk.weight, Threads::Shared));
            }
        },
    );
    let nll = from_values(losses.iter().map(|&(nll, _)| nll as f32).collect(), [targets.len()]);
    let saved = Saved {
        softcap,
        targets: targets.to_vec(),
        tokens: dims(&hidden)[0],
        frozen_head: takes_rows.then(|| from_values(d_rows, [targets.len(), width])),
        operands: weight_tracked.then_some((hidden, weight)),
        hidden_tracked,
    };
    TokenNll {
        nll: tensor(match step.stateful() {
            OpsKind::Tracked(step) => step.finish(saved, nll),
            OpsKind::UnTracked(step) => step.finish(nll),
        }),
        values: losses.iter().map(|&(nll, _)| nll).collect(),
        correct: losses.iter().map(|&(_, correct)| correct).collect(),
    }
}

/// What the backward pass needs.
#[derive(Debug, Clone)]
struct Saved {
    softcap: Option<f32>,
    targets: Vec<Target>,
    tokens: usize,
    /// dh of each target for an upstream gradient of 1, where the head does not train.
    frozen_head: Option<FlexTensor>,
    /// Hidden states and head, where it does.
    operands: Option<(FlexTensor, FlexTensor)>,
    hidden_tracked: bool,
}

#[derive(Debug)]
struct Head;

impl Backward<Flex, 2> for Head {
    type State = Saved;

    fn backward(
        self,
        ops: Ops<Saved, 2>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let upstream = contiguous(gradients.consume::<Flex>(&ops.node));
        let upstream = values(&upstream);
        let [hidden_node, weight_node] = ops.parents;
        let Saved { softcap, targets, tokens, frozen_head, operands, hidden_tracked } = ops.state;
        let mut d_hidden = None;
        let mut d_weight = None;
        if let Some(rows) = &frozen_head {
            let width = dims(rows)[1];
            let mut sum = vec![0.0; tokens * width];
            for ((target, row), &factor) in
                targets.iter().zip(values(rows).chunks_exact(width)).zip(upstream)
            {
                add(&mut sum[target.position * width..][..width], row, factor);
            }
            d_hidden = Some(from_values(sum, [tokens, width]));
        }
        if let Some((hidden, weight)) = &operands {
            let [vocabulary, width] = dims(weight);
            let mut to_hidden = hidden_tracked.then(|| vec![0.0; tokens * width]);
            let mut to_weight = vec![0.0; vocabulary * width];
            for_each_chunk(
                hidden,
                weight,
                softcap,
                &targets,
                |index, _| upstream[index],
                |chunk| {
                    if let Some(sum) = &mut to_hidden {
                        let rows = product(1.0, chunk.dz, chunk.weight, Threads::Shared);
                        for (target, row) in chunk.targets.iter().zip(rows.chunks_exact(width)) {
                            add(&mut sum[target.position * width..][..width], row, 1.0);
                        }
                    }
                    let sum = MatMut::new(&mut to_weight, vocabulary, width);
                    gemm_add(sum, 1.0, chunk.dz.t(), chunk.rows, Threads::Shared);
                },
            );
            d_hidden = to_hidden.map(|values| from_values(values, [tokens, width]));
            d_weight = Some(from_values(to_weight, [vocabulary, width]));
        }
        for (parent, gradient) in [(hidden_node, d_hidden), (weight_node, d_weight)] {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                gradients.register::<Flex>(parent.id, gradient);
            }
        }
    }
}

/// sum ← sum + factor·row.
fn add(sum: &mut [f32], row: &[f32], factor: f32) {
    for (sum, value) in sum.iter_mut().zip(row) {
        *sum += factor * value;
    }
}
