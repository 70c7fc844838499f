//! The operations a decoder is made of.
//!
//! One file an operation, with its mathematics. Each has a portable form of burn's tensor
//! operations, for any device and as the oracle of the tests, and under `cpu` a hand-written form
//! with its own backward pass, which the CPU takes. Activations are matrices `[tokens, width]`.

mod cpu;

pub(crate) mod adamw;
pub(crate) mod attention;
pub(crate) mod bias;
pub(crate) mod dropout;
pub(crate) mod embedding;
pub(crate) mod gated_activation;
pub(crate) mod head;
pub(crate) mod head_norm;
pub(crate) mod linear;
pub(crate) mod rms_norm;
pub(crate) mod squares;

#[cfg(test)]
mod testing;

use burn::tensor::{Device, Tensor};

/// Whether the hand-written CPU forms apply to `tensor`.
fn on_cpu<const D: usize>(tensor: &Tensor<D>) -> bool {
    // The comparison looks at the backend and the index, not at autodiff.
    tensor.device() == Device::flex()
}
