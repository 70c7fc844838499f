//! GPU form of [`crate::ops::gated_activation`].

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::{DType, Tensor};
use burn_cubecl::Cube;
use burn_cubecl::tensor::CubeTensor;

use super::{contiguous, element, kernels, like_of, node, plain, tensor, thread_an_element};
use crate::models::config::Activation;

/// With `bf16`, y and what the backward pass reads of the gate and up are rounded to that.
pub(in crate::ops) fn gated_activation(
    gate_up: Tensor<2>,
    activation: Activation,
    bf16: bool,
) -> Tensor<2> {
    let [rows, doubled] = gate_up.dims();
    let width = doubled / 2;
    let dtype = if bf16 { DType::BF16 } else { DType::F32 };
    let gate_up = node(gate_up);
    let step = GatedActivation.prepare::<NoCheckpointing>([gate_up.node()]).compute_bound();
    let gate_up = contiguous::<2>(plain(gate_up.into_primitive()));
    let y = like_of(&gate_up, &[rows, width], dtype);
    let kept = like_of(&gate_up, &[rows, doubled], dtype);
    let (count, threads) = thread_an_element(rows * width);
    kernels::gated_activation::launch(
        &gate_up.client,
        count,
        threads,
        gate_up.clone().into_buffer_arg(),
        y.clone().into_buffer_arg(),
        kept.clone().into_buffer_arg(),
        width as u32,
        is_gelu(activation),
        [element(&gate_up), element(&y)],
    );
    tensor(match step.stateful() {
        OpsKind::Tracked(step) => step.finish((kept, activation), y),
        OpsKind::UnTracked(step) => step.finish(y),
    })
}

fn is_gelu(activation: Activation) -> bool {
    match activation {
        Activation::Silu => false,
        Activation::GeluTanh => true,
    }
}

#[derive(Debug)]
struct GatedActivation;

impl Backward<Cube, 1> for GatedActivation {
    type State = (CubeTensor, Activation);

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = contiguous::<2>(plain(gradients.consume::<Cube>(&ops.node)));
        let (kept, activation) = ops.state;
        let [parent] = ops.parents;
        let Some(parent) = parent else { return };
        let [rows, width] = plain::<2>(dy.clone()).dims();
        let gradient = like_of(&kept, &[rows, 2 * width], DType::F32);
        let (count, threads) = thread_an_element(rows * width);
        kernels::gated_activation_backward::launch(
            &kept.client,
            count,
            threads,
            kept.clone().into_buffer_arg(),
            dy.clone().into_buffer_arg(),
            gradient.clone().into_buffer_arg(),
            width as u32,
            is_gelu(activation),
            [element(&dy), element(&kept)],
        );
        gradients.register::<Cube>(parent.id, gradient);
    }
}
