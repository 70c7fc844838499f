//! CPU form of [`crate::ops::embedding`].

use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::Tensor;
use std::sync::Arc;

use super::gemm::Elements;
use super::step::{contiguous, dims, elements, from_values, node, tensor, values};

pub(in crate::ops) fn embedding(
    weight: Tensor<2>,
    ids: &[u32],
    padding: Option<u32>,
    scale: f32,
) -> Tensor<2> {
    let weight = node(weight);
    let step = Embedding.prepare::<NoCheckpointing>([weight.node()]).compute_bound();
    let weight = contiguous(weight.into_primitive());
    let [vocabulary, width] = dims(&weight);
    let mut y = Vec::with_capacity(ids.len() * width);
    let row = |id: u32| id as usize * width..(id as usize + 1) * width;
    match elements(&weight) {
        Elements::Bf16(table) => ids.iter().for_each(|&id| {
            y.extend(table[row(id)].iter().map(|value| scale * value.to_f32()));
        }),
        _ => ids.iter().for_each(|&id| {
            y.extend(values(&weight)[row(id)].iter().map(|value| scale * value));
        }),
    }
    let y = from_values(y, [ids.len(), width]);
    tensor(match step.stateful() {
        OpsKind::Tracked(step) => {
            step.finish(Saved { ids: ids.into(), padding, scale, vocabulary }, y)
        }
        OpsKind::UnTracked(step) => step.finish(y),
    })
}

#[derive(Debug)]
struct Embedding;

#[derive(Debug, Clone)]
struct Saved {
    ids: Arc<[u32]>,
    padding: Option<u32>,
    scale: f32,
    vocabulary: usize,
}

impl Backward<Flex, 1> for Embedding {
    type State = Saved;

    fn backward(
        self,
        ops: Ops<Saved, 1>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = contiguous(gradients.consume::<Flex>(&ops.node));
        let [Some(parent)] = ops.parents else { return };
        let Saved { ids, padding, scale, vocabulary } = ops.state;
        let [_, width] = dims(&dy);
        let mut dw = vec![0.0; vocabulary * width];
        // In the order of the tokens, on one thread: ids repeat, and the sums must not vary.
        let lookups = ids.iter().zip(values(&dy).chunks_exact(width));
        for (&id, dy) in lookups.filter(|&(&id, _)| Some(id) != padding) {
            let row = &mut dw[id as usize * width..][..width];
            row.iter_mut().zip(dy).for_each(|(sum, value)| *sum += scale * value);
        }
        gradients.register::<Flex>(parent.id, from_values(dw, [vocabulary, width]));
    }
}
