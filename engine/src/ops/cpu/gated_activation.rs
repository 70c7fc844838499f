//! CPU form of [`crate::ops::gated_activation`].

use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::{DType, Tensor};
use burn_flex::FlexTensor;
use half::bf16;

use super::again::Again;
use super::bf16::{in_f32, round, widen};
use super::isa::{Isa, simd_kernels};
use super::math::{exp, tanh};
use super::step::{
    both_filled, contiguous, dims, filled, from_bf16, from_values, node, tensor, values,
};
use crate::models::config::Activation;
use crate::ops::gated_activation::{GELU_CUBIC, GELU_SCALE};
use crate::ops::linear::Input;

/// Rows that one task handles.
const BLOCK_ROWS: usize = 16;

simd_kernels! {
    /// y of one row of silu.
    fn silu_row(gate: &[f32], up: &[f32], y: &mut [f32]) {
        let n = y.len();
        let (gate, up) = (&gate[..n], &up[..n]);
        for i in 0..n {
            y[i] = gate[i] / (1.0 + exp::<M>(-gate[i])) * up[i];
        }
    }

    /// dg and du of one row of silu.
    fn silu_backward_row(dy: &[f32], gate: &[f32], up: &[f32], dg: &mut [f32], du: &mut [f32]) {
        let n = dy.len();
        let (gate, up, dg, du) = (&gate[..n], &up[..n], &mut dg[..n], &mut du[..n]);
        for i in 0..n {
            let sigma = 1.0 / (1.0 + exp::<M>(-gate[i]));
            let silu = gate[i] * sigma;
            du[i] = dy[i] * silu;
            dg[i] = dy[i] * up[i] * M::mul_add(silu, 1.0 - sigma, sigma);
        }
    }

    /// y of one row of gelu_pytorch_tanh.
    fn gelu_row(gate: &[f32], up: &[f32], y: &mut [f32]) {
        let n = y.len();
        let (gate, up) = (&gate[..n], &up[..n]);
        for i in 0..n {
            let x = gate[i];
            let t = tanh::<M>(GELU_SCALE * x * M::mul_add(x * x, GELU_CUBIC, 1.0));
            y[i] = 0.5 * x * (1.0 + t) * up[i];
        }
    }

    /// dg and du of one row of gelu_pytorch_tanh.
    fn gelu_backward_row(dy: &[f32], gate: &[f32], up: &[f32], dg: &mut [f32], du: &mut [f32]) {
        let n = dy.len();
        let (gate, up, dg, du) = (&gate[..n], &up[..n], &mut dg[..n], &mut du[..n]);
        for i in 0..n {
            let x = gate[i];
            let t = tanh::<M>(GELU_SCALE * x * M::mul_add(x * x, GELU_CUBIC, 1.0));
            let half = 0.5 * (1.0 + t);
            let inner_slope = GELU_SCALE * M::mul_add(x * x, 3.0 * GELU_CUBIC, 1.0);
            du[i] = dy[i] * x * half;
            dg[i] = dy[i] * up[i] * M::mul_add(0.5 * x * (1.0 - t * t), inner_slope, half);
        }
    }
}

/// y of one row.
fn forward_row(isa: Isa, activation: Activation, gate: &[f32], up: &[f32], y: &mut [f32]) {
    match activation {
        Activation::Silu => silu_row(isa, gate, up, y),
        Activation::GeluTanh => gelu_row(isa, gate, up, y),
    }
}

pub(in crate::ops) fn gated_activation(
    gate_up: Tensor<2>,
    activation: Activation,
    bf16: bool,
) -> Input {
    let isa = Isa::detect();
    let gate_up = node(gate_up);
    let step = GatedActivation.prepare::<NoCheckpointing>([gate_up.node()]).compute_bound();
    let gate_up = contiguous(gate_up.into_primitive());
    if bf16 {
        let (y, kept) = activated_bf16(isa, &gate_up, activation);
        return match step.stateful() {
            OpsKind::Tracked(step) => tensor(step.finish((kept, activation), y)).into(),
            OpsKind::UnTracked(step) => tensor(step.finish(y)).into(),
        };
    }
    let y = activated(isa, &gate_up, activation);
    match step.stateful() {
        OpsKind::Tracked(step) => {
            let kept = gate_up.clone();
            let again = Again::new(move || activated(isa, &kept, activation));
            Input { x: tensor(step.finish((gate_up, activation), y)), again: Some(again) }
        }
        OpsKind::UnTracked(step) => tensor(step.finish(y)).into(),
    }
}

/// y.
fn activated(isa: Isa, gate_up: &FlexTensor, activation: Activation) -> FlexTensor {
    let [rows, doubled] = dims(gate_up);
    let width = doubled / 2;
    let y = filled(rows * width, BLOCK_ROWS * width, |block, y: &mut [f32]| {
        let gate_up = &values(gate_up)[block * BLOCK_ROWS * doubled..][..2 * y.len()];
        for (y, gate_up) in y.chunks_exact_mut(width).zip(gate_up.chunks_exact(doubled)) {
            let (gate, up) = gate_up.split_at(width);
            forward_row(isa, activation, gate, up, y);
        }
    });
    from_values(y, [rows, width])
}

/// y, and gate and up, rounded to bf16.
fn activated_bf16(
    isa: Isa,
    gate_up: &FlexTensor,
    activation: Activation,
) -> (FlexTensor, FlexTensor) {
    let [rows, doubled] = dims(gate_up);
    let width = doubled / 2;
    let [y, kept] = both_filled(
        [rows * width, rows * doubled],
        [BLOCK_ROWS * width, BLOCK_ROWS * doubled],
        |block, y: &mut [bf16], kept: &mut [bf16]| {
            let gate_up = &values(gate_up)[block * BLOCK_ROWS * doubled..][..kept.len()];
            let mut exact = vec![0.0; width];
            for ((y, kept), gate_up) in y
                .chunks_exact_mut(width)
                .zip(kept.chunks_exact_mut(doubled))
                .zip(gate_up.chunks_exact(doubled))
            {
                let (gate, up) = gate_up.split_at(width);
                forward_row(isa, activation, gate, up, &mut exact);
                round(isa, &exact, y);
                round(isa, gate_up, kept);
            }
        },
    );
    (from_bf16(y, [rows, width]), from_bf16(kept, [rows, doubled]))
}

#[derive(Debug)]
struct GatedActivation;

impl Backward<Flex, 1> for GatedActivation {
    /// The gate and up values, in f32 or bf16.
    type State = (FlexTensor, Activation);

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let isa = Isa::detect();
        let dy = in_f32(contiguous(gradients.consume::<Flex>(&ops.node)));
        let [Some(parent)] = ops.parents else { return };
        let (gate_up, activation) = ops.state;
        let backward_row = match activation {
            Activation::Silu => silu_backward_row,
            Activation::GeluTanh => gelu_backward_row,
        };
        let [rows, doubled] = dims(&gate_up);
        let width = doubled / 2;
        let row_gradient = |row: usize, gate_up: &[f32], d_gate_up: &mut [f32]| {
            let (gate, up) = gate_up.split_at(width);
            let (dg, du) = d_gate_up.split_at_mut(width);
            backward_row(isa, &values(&dy)[row * width..][..width], gate, up, dg, du);
        };
        let (length, block) = (rows * doubled, BLOCK_ROWS * doubled);
        // What is kept in bf16 has a gradient in bf16, as the product before it multiplies it.
        let d_gate_up = if gate_up.dtype() == DType::BF16 {
            let gate_up = gate_up.as_slice::<bf16>().expect("a contiguous bf16 tensor");
            let gradient = filled(length, block, |number, d_gate_up: &mut [bf16]| {
                let (mut wide, mut exact) = (vec![0.0; doubled], vec![0.0; doubled]);
                for (i, d_gate_up) in d_gate_up.chunks_exact_mut(doubled).enumerate() {
                    let row = number * BLOCK_ROWS + i;
                    widen(isa, &gate_up[row * doubled..][..doubled], &mut wide);
                    row_gradient(row, &wide, &mut exact);
                    round(isa, &exact, d_gate_up);
                }
            });
            from_bf16(gradient, [rows, doubled])
        } else {
            let gradient = filled(length, block, |number, d_gate_up: &mut [f32]| {
                for (i, d_gate_up) in d_gate_up.chunks_exact_mut(doubled).enumerate() {
                    let row = number * BLOCK_ROWS + i;
                    row_gradient(row, &values(&gate_up)[row * doubled..][..doubled], d_gate_up);
                }
            });
            from_values(gradient, [rows, doubled])
        };
        gradients.register::<Flex>(parent.id, d_gate_up);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An activation and its slope in f64.
    fn exact(activation: Activation, x: f64) -> (f64, f64) {
        match activation {
            Activation::Silu => {
                let sigma = 1.0 / (1.0 + (-x).exp());
                (x * sigma, sigma * (1.0 + x * (1.0 - sigma)))
            }
            Activation::GeluTanh => {
                let scale = (2.0 / std::f64::consts::PI).sqrt();
                let t = (scale * (x + 0.044715 * x.powi(3))).tanh();
                let inner_slope = scale * (1.0 + 3.0 * 0.044715 * x * x);
                (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner_slope)
            }
        }
    }

    #[test]
    fn every_path_gives_the_values_of_f64_even_for_large_gates() {
        let gate: Vec<f32> = (-350..351).map(|i| i as f32 * 0.34).collect();
        let up: Vec<f32> = gate.iter().map(|g| (g * 0.9).cos() + 0.5).collect();
        let dy: Vec<f32> = gate.iter().map(|g| (g * 0.3).sin()).collect();
        let n = gate.len();
        for isa in Isa::available() {
            for activation in [Activation::Silu, Activation::GeluTanh] {
                let (mut y, mut dg, mut du) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
                forward_row(isa, activation, &gate, &up, &mut y);
                match activation {
                    Activation::Silu => silu_backward_row(isa, &dy, &gate, &up, &mut dg, &mut du),
                    Activation::GeluTanh => {
                        gelu_backward_row(isa, &dy, &gate, &up, &mut dg, &mut du);
                    }
                }
                for i in 0..n {
                    let (g, u, d) = (f64::from(gate[i]), f64::from(up[i]), f64::from(dy[i]));
                    let (value, slope) = exact(activation, g);
                    let close = |value: f32, exact: f64| {
                        (f64::from(value) - exact).abs() <= 1e-6 * exact.abs() + 1e-6
                    };
                    assert!(close(y[i], value * u), "{isa:?} {activation:?} y at gate {g}");
                    assert!(close(du[i], d * value), "{isa:?} {activation:?} du at gate {g}");
                    let dg = dg[i];
                    assert!(
                        close(dg, d * u * slope),
                        "{isa:?} {activation:?} dg at gate {g}: {dg}"
                    );
                }
            }
        }
    }
}
