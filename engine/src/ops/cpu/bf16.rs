//! CPU form of [`crate::ops::bf16`].

use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::{Bytes, DType, Shape, Tensor};
use burn_flex::{FlexTensor, Layout};
use half::bf16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use std::ops::Range;

use super::step::{contiguous, dims, node, tensor, values};

/// Elements that one task converts.
const BLOCK: usize = 1 << 14;

pub(in crate::ops) fn to_bf16(x: Tensor<2>) -> Tensor<2> {
    let x = node(x);
    let step = Round.prepare::<NoCheckpointing>([x.node()]).compute_bound();
    let y = rounded(&contiguous(x.into_primitive()));
    tensor(match step.stateful() {
        OpsKind::Tracked(step) => step.finish((), y),
        OpsKind::UnTracked(step) => step.finish(y),
    })
}

/// A contiguous f32 matrix in bf16.
pub(super) fn rounded(x: &FlexTensor) -> FlexTensor {
    let y = rounded_values(values(x));
    FlexTensor::new(Bytes::from_elems(y), Layout::contiguous(Shape::from(dims(x))), DType::BF16)
}

/// Values in bf16.
pub(super) fn rounded_values(x: &[f32]) -> Vec<bf16> {
    let mut y = vec![bf16::ZERO; x.len()];
    y.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)).for_each(|(y, x)| y.convert_from_f32_slice(x));
    y
}

#[derive(Debug)]
struct Round;

impl Backward<Flex, 1> for Round {
    type State = ();

    fn backward(
        self,
        ops: Ops<(), 1>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = gradients.consume::<Flex>(&ops.node);
        if let [Some(parent)] = ops.parents {
            // What follows in the graph may be an operation of burn's own, which gives a gradient
            // of its output's type.
            let dx = if dy.dtype() == DType::BF16 { widened(&contiguous(dy)) } else { dy };
            gradients.register::<Flex>(parent.id, dx);
        }
    }
}

/// A contiguous bf16 matrix in f32.
pub(super) fn widened(x: &FlexTensor) -> FlexTensor {
    super::step::from_values(widened_values(x), dims(x))
}

/// The values of a contiguous matrix of f32 or bf16, in f32.
pub(super) fn widened_values(x: &FlexTensor) -> Vec<f32> {
    if x.dtype() != DType::BF16 {
        return values(x).to_vec();
    }
    x.as_slice::<bf16>().expect("a contiguous bf16 tensor").to_f32_vec()
}

/// Some values of a contiguous tensor of f32 or bf16, in f32; `scratch` holds them where they are
/// not there as they are.
pub(super) fn widened_part<'a>(
    x: &'a FlexTensor,
    range: Range<usize>,
    scratch: &'a mut Vec<f32>,
) -> &'a [f32] {
    if x.dtype() != DType::BF16 {
        return &values(x)[range];
    }
    let part = &x.as_slice::<bf16>().expect("a contiguous bf16 tensor")[range];
    scratch.resize(part.len(), 0.0);
    part.convert_to_f32_slice(scratch);
    scratch
}
