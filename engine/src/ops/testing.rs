//! What the tests of the operations share: inputs, and the comparison with the portable form.

use burn::tensor::{Device, Tensor, TensorData};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::parameter::read;

/// A matrix of values in −1..1 on the CPU.
pub(super) fn random(shape: [usize; 2], seed: u64) -> Tensor<2> {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> =
        (0..shape[0] * shape[1]).map(|_| generator.random_range(-1.0..1.0)).collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

/// Where the inputs of a form go: [`on_flex`] or [`on_test_device`].
pub(super) type Place = fn(Tensor<2>) -> Tensor<2>;

/// The tensor as it is: where CPU forms run.
pub(super) fn on_flex(tensor: Tensor<2>) -> Tensor<2> {
    tensor
}

/// The tensor moved to the device that tests compute on, where portable forms run.
pub(super) fn on_test_device(tensor: Tensor<2>) -> Tensor<2> {
    tensor.to_device(super::test_device::test_device().burn())
}

/// Compares a CPU form of an operation with its portable form, which runs on the device that tests
/// compute on: their outputs, and the gradient of every input of Σ c∘output for a c that is far
/// from 1 everywhere.
pub(super) fn assert_gradients_equal(
    inputs: &[Tensor<2>],
    form: impl Fn(&[Tensor<2>]) -> Tensor<2>,
    oracle: impl Fn(&[Tensor<2>]) -> Tensor<2>,
) {
    let all: Vec<bool> = vec![true; inputs.len()];
    let (output, gradients) = run(inputs, &all, &form);
    let moved: Vec<Tensor<2>> = inputs.iter().cloned().map(on_test_device).collect();
    let (expected_output, expected_gradients) = run(&moved, &all, &oracle);
    assert_close("output", &output, &expected_output);
    for (i, expected) in expected_gradients.iter().enumerate() {
        let name = format!("gradient of input {i}");
        let expected = expected.as_ref().unwrap();
        assert_close(&name, gradients[i].as_ref().unwrap(), expected);
        // An input that alone requires its gradient gets the same one.
        let mut alone = vec![false; inputs.len()];
        alone[i] = true;
        let (_, gradients) = run(inputs, &alone, &form);
        assert_close(&format!("{name} alone"), gradients[i].as_ref().unwrap(), expected);
    }
}

type Values = Vec<f32>;

fn run(
    inputs: &[Tensor<2>],
    tracked: &[bool],
    form: impl Fn(&[Tensor<2>]) -> Tensor<2>,
) -> (Values, Vec<Option<Values>>) {
    let inputs: Vec<Tensor<2>> = inputs
        .iter()
        .zip(tracked)
        .map(|(input, &tracked)| input.clone().autodiff().set_require_grad(tracked))
        .collect();
    let output = form(&inputs);
    let upstream = random(output.dims(), 99).to_device(&output.device().inner()).mul_scalar(3.0);
    let gradients = (output.clone() * upstream.autodiff()).sum().backward();
    let gradients = inputs
        .iter()
        .map(|input| input.grad(&gradients).map(|gradient| read(gradient).unwrap()))
        .collect();
    (read(output).unwrap(), gradients)
}

/// Compares values of one size with an error in proportion to the greatest of them.
pub(super) fn assert_close(name: &str, values: &[f32], expected: &[f32]) {
    assert_eq!(values.len(), expected.len(), "{name}");
    let greatest = expected.iter().fold(0f32, |a, b| a.max(b.abs()));
    for (i, (value, expected)) in values.iter().zip(expected).enumerate() {
        let error = (value - expected).abs();
        assert!(
            error <= 2e-5 * greatest.max(1e-3),
            "{name}[{i}] is {value}, expected {expected} (greatest {greatest})"
        );
    }
}
