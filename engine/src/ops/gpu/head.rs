//! GPU form of [`crate::ops::head`]: a chunk of targets at a time, so that no more logits than
//! theirs are in memory, and their gradient is taken while they are.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor, TensorData};
use burn_cubecl::Cube;

use super::{
    block_a_row, cast, contiguous, element, kernels, like_of, node, plain, primitive, product,
    tensor,
};
use crate::batch::Target;
use crate::error::EngineError;
use crate::ops::head::HeadLoss;
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
    let mut loss = HeadSums::default();
    let mut rest = values.as_slice();
    for targets in targets.chunks(CHUNK) {
        let (nll, others) = rest.split_at(targets.len());
        let (margins, others) = others.split_at(targets.len());
        rest = others;
        for ((target, &nll), &margin) in targets.iter().zip(nll).zip(margins) {
            let weight = f64::from(target.weight);
            loss.nll.push(f64::from(nll));
            loss.weighted_nll += weight * f64::from(nll);
            loss.weighted_correct += if margin >= 0.0 { weight } else { 0.0 };
        }
    }
    let sum = TensorData::new(vec![loss.weighted_nll as f32], [1]);
    let sum = primitive(Tensor::<1>::from_data(sum, &device));
    let sum = tensor(match step.stateful() {
        OpsKind::Tracked(step) => {
            let positions: Vec<i32> = targets.iter().map(|target| target.position as i32).collect();
            let of_hidden = (tracked[0] && !targets.is_empty()).then(|| {
                let rows = Tensor::cat(of_rows, 0);
                let positions = TensorData::new(positions, [targets.len()]);
                let positions = Tensor::from_data(positions, (&device, DType::I32));
                let none = cast(Tensor::zeros([tokens, width], &device), DType::F32);
                none.select_assign(0, positions, rows, IndexingUpdateOp::Add)
            });
            let absent = |dims: [usize; 2]| cast(Tensor::zeros(dims, &device), DType::F32);
            let state = [
                of_hidden.unwrap_or_else(|| absent([tokens, width])),
                of_weight.unwrap_or_else(|| {
                    absent(if tracked[1] { [vocabulary, width] } else { [1, 1] })
                }),
            ];
            step.finish(state, sum)
        }
        OpsKind::UnTracked(step) => step.finish(sum),
    });
    let HeadSums { weighted_nll, nll, weighted_correct } = loss;
    Ok(HeadLoss { loss: sum, weighted_nll, nll, weighted_correct })
}

#[derive(Default)]
struct HeadSums {
    weighted_nll: f64,
    nll: Vec<f64>,
    weighted_correct: f64,
}

#[derive(Debug)]
struct Head;

impl Backward<Cube, 2> for Head {
    /// The gradients of the hidden state and of the weight, for an upstream gradient of 1.
    type State = [Tensor<2>; 2];

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let upstream: Tensor<1> = plain(gradients.consume::<Cube>(&ops.node));
        let upstream: Tensor<2> = upstream.reshape([1, 1]);
        for (parent, gradient) in ops.parents.into_iter().zip(ops.state) {
            if let Some(parent) = parent {
                gradients.register::<Cube>(parent.id, primitive(gradient * upstream.clone()));
            }
        }
    }
}
