//! GPU form of [`crate::ops::rms_norm`].

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::{DType, Tensor};
use burn_cubecl::Cube;
use burn_cubecl::tensor::CubeTensor;

use super::{
    block_a_row, cast, contiguous, element, kernels, like_of, node, plain, primitive, tensor,
};
use crate::ops::rms_norm::Norm;

/// With `bf16`, y is rounded to that.
pub(in crate::ops) fn rms_norm(
    x: Tensor<2>,
    weight: Tensor<2>,
    norm: Norm,
    bf16: bool,
) -> Tensor<2> {
    let [rows, width] = x.dims();
    let (x, weight) = (node(x), node(weight));
    let step = RmsNorm.prepare::<NoCheckpointing>([x.node(), weight.node()]).compute_bound();
    let x = contiguous::<2>(plain(x.into_primitive()));
    let weight = contiguous(cast::<2>(plain(weight.into_primitive()), DType::F32));
    let y = like_of(&x, &[rows, width], if bf16 { DType::BF16 } else { DType::F32 });
    let (count, threads) = block_a_row(rows);
    kernels::rms_norm::launch(
        &x.client,
        count,
        threads,
        x.clone().into_buffer_arg(),
        weight.clone().into_buffer_arg(),
        y.clone().into_buffer_arg(),
        width as u32,
        norm.epsilon as f32,
        offset(norm),
        [element(&x), element(&y)],
    );
    tensor(match step.stateful() {
        OpsKind::Tracked(step) => step.finish((x, weight, norm), y),
        OpsKind::UnTracked(step) => step.finish(y),
    })
}

/// What is added to w.
fn offset(norm: Norm) -> f32 {
    f32::from(u8::from(norm.unit_offset))
}

#[derive(Debug)]
struct RmsNorm;

impl Backward<Cube, 2> for RmsNorm {
    type State = (CubeTensor, CubeTensor, Norm);

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = contiguous::<2>(plain(gradients.consume::<Cube>(&ops.node)));
        let (x, weight, norm) = ops.state;
        let [rows, width] = plain::<2>(x.clone()).dims();
        let dx = like_of(&x, &[rows, width], x.dtype);
        let roots = like_of(&x, &[rows, 1], DType::F32);
        let (count, threads) = block_a_row(rows);
        kernels::rms_norm_backward::launch(
            &x.client,
            count,
            threads,
            x.clone().into_buffer_arg(),
            weight.into_buffer_arg(),
            dy.clone().into_buffer_arg(),
            dx.clone().into_buffer_arg(),
            roots.clone().into_buffer_arg(),
            width as u32,
            norm.epsilon as f32,
            offset(norm),
            [element(&x), element(&dy)],
        );
        let [of_x, of_weight] = ops.parents;
        if let Some(parent) = of_x {
            gradients.register::<Cube>(parent.id, dx);
        }
        if let Some(parent) = of_weight {
            let [dy, x] = [dy, x].map(|values| cast::<2>(plain(values), DType::F32));
            let dw = (dy * x * plain(roots)).sum_dim(0);
            gradients.register::<Cube>(parent.id, primitive(dw));
        }
    }
}
