//! CPU form of [`crate::ops::bf16`].

use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::{DType, Tensor};
use burn_flex::FlexTensor;
use half::bf16;
use std::ops::Range;

use super::gemm::round_to_bf16;
use super::isa::{Isa, simd_kernels};
use super::step::{contiguous, dims, filled, from_bf16, from_values, node, tensor, values};

/// Elements that one task converts.
const BLOCK: usize = 1 << 14;

simd_kernels! {
    /// Rounds to the nearest bf16, ties to even; NaN stays NaN.
    pub(super) fn round(x: &[f32], y: &mut [bf16]) {
        let y = &mut y[..x.len()];
        for i in 0..x.len() {
            y[i] = bf16::from_bits((round_to_bf16(x[i].to_bits()) >> 16) as u16);
        }
    }

    /// The same numbers in f32.
    pub(super) fn widen(x: &[bf16], y: &mut [f32]) {
        let y = &mut y[..x.len()];
        for i in 0..x.len() {
            y[i] = f32::from_bits(u32::from(x[i].to_bits()) << 16);
        }
    }
}

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
    from_bf16(y, dims(x))
}

/// Values in bf16.
pub(super) fn rounded_values(x: &[f32]) -> Vec<bf16> {
    let isa = Isa::detect();
    filled(x.len(), BLOCK, |block, y| round(isa, &x[block * BLOCK..][..y.len()], y))
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
            gradients.register::<Flex>(parent.id, in_f32(contiguous(dy)));
        }
    }
}

/// A contiguous matrix of f32 or bf16 in f32.
pub(super) fn in_f32(x: FlexTensor) -> FlexTensor {
    if x.dtype() == DType::BF16 { from_values(widened_values(&x), dims(&x)) } else { x }
}

/// A contiguous matrix of f32 or bf16 in bf16.
pub(super) fn in_bf16(x: &FlexTensor) -> FlexTensor {
    if x.dtype() == DType::BF16 { x.clone() } else { rounded(x) }
}

/// The values of a contiguous matrix of f32 or bf16, in f32.
pub(super) fn widened_values(x: &FlexTensor) -> Vec<f32> {
    if x.dtype() != DType::BF16 {
        return values(x).to_vec();
    }
    let isa = Isa::detect();
    let x = x.as_slice::<bf16>().expect("a contiguous bf16 tensor");
    filled(x.len(), BLOCK, |block, y| widen(isa, &x[block * BLOCK..][..y.len()], y))
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
    widen(Isa::detect(), part, scratch);
    scratch
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_rounds_and_widens_as_the_library_does() {
        let x: Vec<f32> = (0..=u16::MAX)
            .flat_map(|high| {
                [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff]
                    .map(|low| f32::from_bits(u32::from(high) << 16 | low))
            })
            .collect();
        let expected: Vec<u16> = x.iter().map(|&x| bf16::from_f32(x).to_bits()).collect();
        for isa in Isa::available() {
            let mut y = vec![bf16::ZERO; x.len()];
            round(isa, &x, &mut y);
            let bits: Vec<u16> = y.iter().map(|y| y.to_bits()).collect();
            assert!(bits == expected, "{isa:?}");
            let mut wide = vec![0.0; x.len()];
            widen(isa, &y, &mut wide);
            let same = |(wide, y): (&f32, &bf16)| wide.to_bits() == u32::from(y.to_bits()) << 16;
            assert!(wide.iter().zip(&y).all(same), "{isa:?}");
        }
    }
}
