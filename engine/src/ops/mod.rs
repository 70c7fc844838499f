//! The operations a decoder is made of.
//!
//! One file an operation, with its mathematics. Each has a portable form of burn's tensor
//! operations, for any device and as the oracle of the tests, and under `cpu` a hand-written form
//! with its own backward pass, which the CPU takes. Activations are matrices `[tokens, width]`.

mod cpu;
#[cfg(feature = "gpu")]
mod gpu;

pub(crate) mod adafactor;
pub(crate) mod adamw;
pub(crate) mod attention;
pub(crate) mod bf16;
pub(crate) mod bias;
pub(crate) mod cached_attention;
pub(crate) mod dropout;
pub(crate) mod embedding;
pub(crate) mod exponentials;
pub(crate) mod gated_activation;
pub(crate) mod head;
pub(crate) mod head_norm;
pub(crate) mod linear;
pub mod measure;
pub(crate) mod muon;
pub(crate) mod neftune;
pub(crate) mod product;
pub(crate) mod quantized;
pub(crate) mod rms_norm;
pub(crate) mod row_linear;
pub(crate) mod squares;
pub(crate) mod token_nll;

#[cfg(test)]
#[path = "../../tests/support/device.rs"]
mod test_device;
#[cfg(test)]
mod testing;

use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::{Device, Tensor};

/// Set once a model of this process computes with the portable forms on the CPU.
static PORTABLE_ON_CPU: AtomicBool = AtomicBool::new(false);

/// Makes every operation of this process take its portable form, on the CPU too: the way to run
/// what a GPU runs where there is none.
pub(crate) fn take_portable_forms() {
    PORTABLE_ON_CPU.store(true, Ordering::Relaxed);
}

/// Whether the CPU has an instruction that multiplies bf16.
pub(crate) fn cpu_multiplies_bf16() -> bool {
    cpu::multiplies_bf16()
}

/// Whether a GPU's own forms apply to `tensor`.
#[cfg(feature = "gpu")]
fn on_gpu<const D: usize>(tensor: &Tensor<D>) -> bool {
    tensor.device() != Device::flex()
}

/// Whether the hand-written CPU forms apply to `tensor`.
fn on_cpu<const D: usize>(tensor: &Tensor<D>) -> bool {
    // The comparison looks at the backend and the index, not at autodiff.
    tensor.device() == Device::flex() && !PORTABLE_ON_CPU.load(Ordering::Relaxed)
}
