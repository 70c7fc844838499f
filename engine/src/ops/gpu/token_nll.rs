//! GPU form of [`crate::ops::token_nll`]: the head's chunks, whose logits the backward pass computes
//! again, as only then each target's weight is known.

use std::ops::Range;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::{DType, Tensor, TensorData};
use burn_cubecl::Cube;

use super::head::Operands;
use super::{node, plain, primitive, tensor, zeros};
use crate::batch::Target;
use crate::error::EngineError;
use crate::ops::token_nll::TokenNll;

pub(in crate::ops) fn token_nll(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    softcap: Option<f32>,
    targets: &[Target],
) -> Result<TokenNll, EngineError> {
    let (hidden, weight) = (node(hidden), node(weight));
    let step = Nll.prepare::<NoCheckpointing>([hidden.node(), weight.node()]).compute_bound();
    let [hidden, weight]: [Tensor<2>; 2] =
        [hidden, weight].map(|operand| plain(operand.into_primitive()));
    let device = hidden.device();
    let operands = Operands { hidden, weight, softcap };
    let unweighted = |chunk: Range<usize>| zeros([chunk.len()], DType::F32, &device);
    let found = operands.each_chunk(targets, unweighted, [false; 2]);
    let (values, correct) = found.losses(targets)?;
    let nll: Vec<f32> = values.iter().map(|&nll| nll as f32).collect();
    let nll = Tensor::<1>::from_data(TensorData::new(nll, [targets.len()]), &device);
    let nll = primitive(nll);
    let nll = tensor(match step.stateful() {
        OpsKind::Tracked(step) => step.finish(Saved { operands, targets: targets.to_vec() }, nll),
        OpsKind::UnTracked(step) => step.finish(nll),
    });
    Ok(TokenNll { nll, values, correct })
}

#[derive(Debug)]
struct Nll;

#[derive(Debug, Clone)]
struct Saved {
    operands: Operands,
    targets: Vec<Target>,
}

impl Backward<Cube, 2> for Nll {
    type State = Saved;

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let upstream: Tensor<1> = plain(gradients.consume::<Cube>(&ops.node));
        let Saved { operands, targets } = ops.state;
        let tracked = ops.parents.each_ref().map(Option::is_some);
        let weights = |chunk: Range<usize>| upstream.clone().slice([chunk]);
        let found = operands.each_chunk(&targets, weights, tracked);
        let found = operands.gradients(found, &targets, tracked);
        for (parent, gradient) in ops.parents.into_iter().zip(found) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                gradients.register::<Cube>(parent.id, primitive(gradient));
            }
        }
    }
}
