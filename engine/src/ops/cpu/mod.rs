//! The operations on the CPU: kernels over slices, each a custom step of `Autodiff<Flex>`.
//!
//! Every product of matrices goes through [`gemm`], every other inner loop is a SIMD kernel of
//! [`isa`]. Threads share rows, heads or blocks of a fixed size, and what several of them sum is
//! added in the order of these, so that results are equal from run to run.

mod dora;
pub(super) mod gemm;
mod isa;
mod math;
mod step;
mod weight;

pub(super) mod adafactor;
pub(super) mod adamw;
pub(super) mod again;
pub(super) mod attention;
pub(super) mod bf16;
pub(super) mod bias;
pub(super) mod embedding;
pub(super) mod exponentials;
pub(super) mod gated_activation;
pub(super) mod head;
pub(super) mod head_norm;
pub(super) mod linear;
pub(super) mod rms_norm;
pub(super) mod row_linear;
pub(super) mod squares;
pub(super) mod token_nll;

/// Whether this CPU has an instruction that multiplies bf16.
pub(super) fn multiplies_bf16() -> bool {
    isa::Isa::detect().multiplies_bf16()
}
