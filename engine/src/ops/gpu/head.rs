//! GPU form of [`crate::ops::head`]: a chunk of targets at a time, so that no more logits than
//! theirs are in memory, and their gradient is taken while they are.

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

pub(in crate::ops) fn head_with_loss(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    softcap: Option<f32>,
    targets: &[Target],
) -> Result<HeadLoss, EngineError> {
    let [tokens, width] = hidden.dims();
    let vocabulary = weight.dims()[0];
    let tracked = [hidden.is_tracked(), weight.is_tracked()];
    let (hidden, weight) = (node(hidden), node(weight));
    let step = Head.prepare::<NoCheckpointing>([hidden.node(), weight.node()]).compute_bound();
    let hidden: Tensor<2> = plain(hidden.into_primitive());
    let weight: Tensor<2> = plain(weight.into_primitive());
    let device = hidden.device();
    let dtype = weight.dtype();

    let mut sums: Vec<Tensor<1>> = Vec::new();
    let mut of_rows: Vec<Tensor<2>> = Vec::new();
    let mut of_weight: Option<Tensor<2>> = None;
    for targets in targets.chunks(CHUNK) {
        let count = targets.len();
        let integers = |values: Vec<i32>| -> Tensor<1, Int> {
            Tensor::from_data(TensorData::new(values, [count]), (&device, DType::I32))
        };
        let ids = integers(targets.iter().map(|target| target.id as i32).collect());
        let weights: Vec<f32> = targets.iter().map(|target| target.weight).collect();
        let weights: Tensor<1> = Tensor::from_data(TensorData::new(weights, [count]), &device);
        let rows = integers(targets.iter().map(|target| target.position as i32).collect());
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
            contiguous(weights).into_buffer_arg(),
            nll.clone().into_buffer_arg(),
            margins.clone().into_buffer_arg(),
            dz.clone().into_buffer_arg(),
            vocabulary as u32,
            softcap.unwrap_or(0.0),
            element(&dz),
        );
        drop(logits);
        sums.extend([nll, margins].map(plain));
        let dz: Tensor<2> = plain(dz);
        if tracked[0] {
            of_rows.push(product(dz.clone(), weight.clone(), DType::F32));
        }
        if tracked[1] {
            let part = product(dz.transpose(), rows, DType::F32);
            of_weight = Some(match of_weight {
                Some(sum) => sum + part,
                None => part,
            });
        }
    }

    // One wait for the device, not one a chunk.
    let values = match sums.is_empty() {
        true => Vec::new(),
        false => read(Tensor::cat(sums, 0))?,
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
    let [weighted_nll, weighted_correct] = weighted_sums(targets, &nll, &correct);
    let loss = TensorData::new(vec![weighted_nll as f32], [1]);
    let loss = primitive(Tensor::<1>::from_data(loss, &device));
    let loss = tensor(match step.stateful() {
        OpsKind::Tracked(step) => {
            let of_hidden = tracked[0].then(|| {
                let none = zeros([tokens, width], DType::F32, &device);
                if targets.is_empty() {
                    return none;
                }
                let positions: Vec<i32> =
                    targets.iter().map(|target| target.position as i32).collect();
                let positions = TensorData::new(positions, [targets.len()]);
                let positions = Tensor::from_data(positions, (&device, DType::I32));
                let rows = joined(of_rows, 0);
                none.select_assign(0, positions, rows, IndexingUpdateOp::Add)
            });
            let of_weight = tracked[1].then(|| {
                of_weight.unwrap_or_else(|| zeros([vocabulary, width], DType::F32, &device))
            });
            step.finish([of_hidden, of_weight], loss)
        }
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
