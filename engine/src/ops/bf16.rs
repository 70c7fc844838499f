//! Rounding to bf16, for products that multiply bf16.
//!
//! ```text
//! y = x rounded to the nearest bf16, ties to even;  dx = dy
//! ```
//!
//! The gradient passes as it is, in f32: a weight that trains stays f32, and its rounded copy only
//! takes part in products.

use burn::tensor::{DType, FloatDType, Tensor};

use super::product::product;
use super::{cpu, on_cpu};

/// `x` in bf16; x itself when it is that already.
pub(crate) fn to_bf16(x: Tensor<2>) -> Tensor<2> {
    if is_bf16(&x) {
        x
    } else if on_cpu(&x) {
        cpu::bf16::to_bf16(x)
    } else {
        x.cast(FloatDType::BF16)
    }
}

/// Whether a tensor holds bf16.
pub(crate) fn is_bf16<const D: usize>(x: &Tensor<D>) -> bool {
    x.dtype() == DType::BF16
}

/// a·b in f32, over bf16 where `b` is that.
pub(super) fn matmul(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    if is_bf16(&b) {
        product(a.cast(FloatDType::BF16), b).cast(FloatDType::F32)
    } else {
        product(a, b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::linear::{LowRank, LowRankPart};
    use crate::ops::testing::{on_test_device, random};
    use crate::ops::{embedding, linear};
    use crate::parameter::read;

    /// What bf16 holds, in f32.
    fn representable(shape: [usize; 2], seed: u64) -> Tensor<2> {
        random(shape, seed).cast(FloatDType::BF16).cast(FloatDType::F32)
    }

    /// Gradients of Σ c∘y for the inputs of `form` that are f32, and y.
    fn run(inputs: &[Tensor<2>], form: impl Fn(&[Tensor<2>]) -> Tensor<2>) -> Vec<Vec<f32>> {
        let inputs: Vec<Tensor<2>> = inputs
            .iter()
            .map(|input| input.clone().autodiff().set_require_grad(!is_bf16(input)))
            .collect();
        let y = form(&inputs);
        let upstream = representable(y.dims(), 99).to_device(&y.device().inner());
        let gradients = (y.clone() * upstream.autodiff()).sum().backward();
        let mut values: Vec<Vec<f32>> = inputs
            .iter()
            .filter(|input| !is_bf16(input))
            .map(|input| read(input.grad(&gradients).unwrap()).unwrap())
            .collect();
        values.push(read(y).unwrap());
        values
    }

    /// Compares within what rounding sums and gradients to bf16 on their way may cost.
    fn assert_near(values: &[Vec<f32>], expected: &[Vec<f32>]) {
        assert_eq!(values.len(), expected.len());
        for (values, expected) in values.iter().zip(expected) {
            let greatest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
            for (value, expected) in values.iter().zip(expected) {
                assert!((value - expected).abs() <= 1e-2 * greatest, "{value} {expected}");
            }
        }
    }

    #[test]
    fn projection_with_a_weight_in_bf16_is_that_of_its_values_in_both_forms() {
        let (x, weight) = (representable([9, 12], 1), representable([10, 12], 2));
        let (a, b) = (representable([4, 12], 3), representable([10, 4], 4));
        let magnitude = random([10, 1], 5).add_scalar(2.0);
        let form = |form: fn(_, _, _, _) -> Tensor<2>, inputs: &[Tensor<2>]| {
            let (a, b, magnitude) = (inputs[2].clone(), inputs[3].clone(), inputs.get(4).cloned());
            let parts = vec![LowRankPart { outputs: 0..10, dropout: None }].into();
            let low_rank = LowRank { a, b, scale: 0.5, magnitude, parts };
            form(inputs[0].clone(), inputs[1].clone().into(), None, Some(low_rank))
        };
        let in_bf16 = weight.clone().cast(FloatDType::BF16);
        // Plain LoRA, and DoRA.
        for count in [4, 5] {
            let inputs = [x.clone(), weight.clone(), a.clone(), b.clone(), magnitude.clone()];
            let mut halved = inputs.clone();
            halved[1] = in_bf16.clone();
            let mut expected = run(&inputs[..count], |inputs| form(linear::portable, inputs));
            // The gradient of the weight: in bf16, it is frozen.
            expected.remove(1);
            let halved = &halved[..count];
            assert_near(
                &run(halved, |inputs| {
                    form(|x, w, r, l| cpu::linear::linear(x.into(), w, r, l), inputs)
                }),
                &expected,
            );
            let moved: Vec<Tensor<2>> = halved.iter().cloned().map(on_test_device).collect();
            assert_near(&run(&moved, |inputs| form(linear::elsewhere, inputs)), &expected);
        }
    }

    #[test]
    fn embedding_of_a_table_in_bf16_is_f32() {
        let table = representable([7, 5], 1);
        let ids = [3, 0, 3, 6];
        let expected = read(embedding::portable(table.clone(), &ids, None, 1.5)).unwrap();
        let table = table.cast(FloatDType::BF16);
        let y = cpu::embedding::embedding(table.clone(), &ids, None, 1.5);
        assert!(!is_bf16(&y));
        assert_eq!(read(y).unwrap(), expected);
        assert_eq!(read(embedding::portable(table, &ids, None, 1.5)).unwrap(), expected);
    }

    #[test]
    fn values_are_rounded_and_the_gradient_passes_in_f32() {
        let x = random([5, 7], 1);
        let upstream = random([5, 7], 2);
        let tracked = x.clone().autodiff().require_grad();
        let rounded = to_bf16(tracked.clone());
        assert!(is_bf16(&rounded));
        let expected: Vec<f32> =
            read(x).unwrap().iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
        let y = rounded.cast(FloatDType::F32);
        assert_eq!(read(y.clone()).unwrap(), expected);
        let gradients = (y * upstream.clone().autodiff()).sum().backward();
        // On its way back, the other cast rounds the gradient.
        let expected: Vec<f32> =
            read(upstream).unwrap().iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
        assert_eq!(read(tracked.grad(&gradients).unwrap()).unwrap(), expected);
    }
}
