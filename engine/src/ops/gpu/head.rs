//! GPU form of [`crate::ops::head`]: a chunk of targets at a time, so that no more logits than
//! theirs are in memory, and their gradient is taken while they are.

use std::ops::Range;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor, TensorData};
use burn_cubecl::Cube;

use super::{
    block_a_row, cast, contiguous, element, joined, kernels, like_of, node, plain, primitive,
    product, tensor, zeros,
};
use crate::batch::Target;
use crate::error::EngineError;
use crate::ops::head::{HeadLoss, weighted_sums};
use crate::parameter::read;

/// Targets of a chunk.
const CHUNK: usize = 512;

/// The hidden states and the head of a loss.
#[derive(Debug, Clone)]
pub(super) struct Operands {
    pub(super) hidden: Tensor<2>,
    pub(super) weight: Tensor<2>,
    pub(super) softcap: Option<f32>,
}

/// What is asked for of the targets.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Of each chunk, every nll and then how far each target's logit is below the greatest.
    sums: Vec<Tensor<1>>,
    /// The gradients of the targets' hidden states, chunk by chunk.
    of_rows: Vec<Tensor<2>>,
    of_weight: Option<Tensor<2>>,
}

impl Operands {
    /// Goes through the targets; `weights` gives those of a chunk, and `tracked` says which of the
    /// operands' gradients of Σ w·nll are wanted.
    pub(super) fn each_chunk(
        &self,
        targets: &[Target],
        weights: impl Fn(Range<usize>) -> Tensor<1>,
        tracked: [bool; 2],
    ) -> Found {
        let Self { hidden, weight, softcap } = self;
        let (device, dtype, vocabulary) = (hidden.device(), weight.dtype(), weight.dims()[0]);
        let mut found = Found::default();
        for start in (0..targets.len()).step_by(CHUNK) {
            let chunk = start..targets.len().min(start + CHUNK);
            let count = chunk.len();
            let integers = |of: fn(&Target) -> i32| -> Tensor<1, Int> {
                let values: Vec<i32> = targets[chunk.clone()].iter().map(of).collect();
                Tensor::from_data(TensorData::new(values, [count]), (&device, DType::I32))
            };
            let ids = integers(|target| target.id as i32);
            let rows = integers(|target| target.position as i32);
            let rows = cast(hidden.clone().select(0, rows), dtype);
            let logits = contiguous(product(rows.clone(), weight.clone().transpose(), DType::F32));
            let dz = like_of(&logits, &[count, vocabulary], dtype);
            let [nll, margins] = [(); 2].map(|()| like_of(&logits, &[count], DType::F32));
            let (blocks, threads) = block_a_row(count);
            kernels::cross_entropy::launch(
                &logits.client,
                blocks,
                threads,
                logits.clone().into_buffer_arg(),
                ids.try_into_primitive::<Cube>().expect("a tensor on a GPU").into_buffer_arg(),
                contiguous(weights(chunk)).into_buffer_arg(),
                nll.clone().into_buffer_arg(),
                margins.clone().into_buffer_arg(),
                dz.clone().into_buffer_arg(),
                vocabulary as u32,
                softcap.unwrap_or(0.0),
                element(&dz),
            );
            drop(logits);
            found.sums.extend([nll, margins].map(plain));
            let dz: Tensor<2> = plain(dz);
            if tracked[0] {
                found.of_rows.push(product(dz.clone(), weight.clone(), DType::F32));
            }
            if tracked[1] {
                let part = product(dz.transpose(), rows, DType::F32);
                found.of_weight = Some(match found.of_weight {
                    Some(sum) => sum + part,
                    None => part,
                });
            }
        }
        found
    }

    /// The gradients of the hidden states and of the weight, of those that `tracked` says.
    pub(super) fn gradients(
        &self,
        found: Found,
        targets: &[Target],
        tracked: [bool; 2],
    ) -> [Option<Tensor<2>>; 2] {
        let device = self.hidden.device();
        let of_hidden = tracked[0].then(|| {
            let none = zeros(self.hidden.dims(), DType::F32, &device);
            if targets.is_empty() {
                return none;
            }
            let positions: Vec<i32> = targets.iter().map(|target| target.position as i32).collect();
            let positions = TensorData::new(positions, [targets.len()]);
            let positions = Tensor::from_data(positions, (&device, DType::I32));
            let rows = joined(found.of_rows, 0);
            none.select_assign(0, positions, rows, IndexingUpdateOp::Add)
        });
        let of_weight = tracked[1].then(|| {
            found.of_weight.unwrap_or_else(|| zeros(self.weight.dims(), DType::F32, &device))
        });
        [of_hidden, of_weight]
    }
}

impl Found {
    /// nll of each of `targets`, and whether no token was more likely: with one wait for the
    /// device, not one a chunk.
    pub(super) fn losses(&self, targets: &[Target]) -> Result<(Vec<f64>, Vec<bool>), EngineError> {
        let values = match self.sums.is_empty() {
            true => Vec::new(),
            false => read(Tensor::cat(self.sums.clone(), 0))?,
        };
        let (mut nll, mut correct) = (Vec::new(), Vec::new());
        let mut rest = values.as_slice();
        for targets in targets.chunks(CHUNK) {
            let (losses, others) = rest.split_at(targets.len());
            let (margins, others) = others.split_at(targets.len());
            rest = others;
            nll.extend(losses.iter().map(|&nll| f64::from(nll)));
            correct.extend(margins.iter().map(|&margin| margin >= 0.0));
        }
        Ok((nll, correct))
    }
}

pub(in crate::ops) fn head_with_loss(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    softcap: Option<f32>,
    targets: &[Target],
) -> Result<HeadLoss, EngineError> {
    let tracked = [hidden.is_tracked(), weight.is_tracked()];
    let (hidden, weight) = (node(hidden), node(weight));
    let step = Head.prepare::<NoCheckpointing>([hidden.node(), weight.node()]).compute_bound();
    let [hidden, weight]: [Tensor<2>; 2] =
        [hidden, weight].map(|operand| plain(operand.into_primitive()));
    let device = hidden.device();
    let operands = Operands { hidden, weight, softcap };
    let weights = |chunk: Range<usize>| {
        let weights: Vec<f32> = targets[chunk].iter().map(|target| target.weight).collect();
        let count = weights.len();
        Tensor::from_data(TensorData::new(weights, [count]), &device)
    };
    let found = operands.each_chunk(targets, weights, tracked);
    let (nll, correct) = found.losses(targets)?;
    let [weighted_nll, weighted_correct] = weighted_sums(targets, &nll, &correct);
    let loss = TensorData::new(vec![weighted_nll as f32], [1]);
    let loss = primitive(Tensor::<1>::from_data(loss, &device));
    let loss = tensor(match step.stateful() {
        OpsKind::Tracked(step) => step.finish(operands.gradients(found, targets, tracked), loss),
        OpsKind::UnTracked(step) => step.finish(loss),
    });
    Ok(HeadLoss { loss, weighted_nll, nll, weighted_correct })
}

#[derive(Debug)]
struct Head;

impl Backward<Cube, 2> for Head {
    /// The gradients of the hidden state and of the weight, for an upstream gradient of 1, of those
    /// that take one.
    type State = [Option<Tensor<2>>; 2];

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let upstream: Tensor<1> = plain(gradients.consume::<Cube>(&ops.node));
        let upstream: Tensor<2> = upstream.reshape([1, 1]);
        for (parent, gradient) in ops.parents.into_iter().zip(ops.state) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                gradients.register::<Cube>(parent.id, primitive(gradient * upstream.clone()));
            }
        }
    }
}
