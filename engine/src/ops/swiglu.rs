//! The gated activation of the feed-forward block (SwiGLU, Shazeer 2020).
//!
//! With σ the logistic function, for a gate g and an up-projection u:
//!
//! ```text
//! y  = g·σ(g)·u
//! du = dy·g·σ(g)
//! dg = dy·u·σ(g)·(1 + g·(1 − σ(g)))
//! ```

use burn::tensor::{Tensor, activation};

use super::{cpu, on_cpu};

/// `gate_up` `[tokens, 2·width]`, gate before up, to `[tokens, width]`.
pub(crate) fn swiglu(gate_up: Tensor<2>) -> Tensor<2> {
    if on_cpu(&gate_up) { cpu::swiglu::swiglu(gate_up) } else { portable(gate_up) }
}

pub(super) fn portable(gate_up: Tensor<2>) -> Tensor<2> {
    let [tokens, doubled] = gate_up.dims();
    let gate = gate_up.clone().slice([0..tokens, 0..doubled / 2]);
    let up = gate_up.slice([0..tokens, doubled / 2..doubled]);
    activation::silu(gate) * up
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_gradients_equal, random};

    #[test]
    fn cpu_form_equals_the_portable_form() {
        for (tokens, width) in [(1, 1), (3, 17), (40, 32)] {
            assert_gradients_equal(
                &[random([tokens, 2 * width], 3).mul_scalar(4.0)],
                |inputs| cpu::swiglu::swiglu(inputs[0].clone()),
                |inputs| portable(inputs[0].clone()),
            );
        }
    }
}
