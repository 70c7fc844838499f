//! CPU form of [`crate::ops::rms_norm`].

use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use half::bf16;
use rayon::prelude::*;
use std::sync::Arc;

use super::again::Again;
use super::bf16::{in_f32, round};
use super::isa::{Isa, simd_kernels};
use super::math::dot;
use super::step::{contiguous, dims, filled, from_bf16, from_values, node, tensor, values};
use crate::ops::linear::Input;
use crate::ops::rms_norm::Norm;

/// Rows that one task handles; fixed, as dw is summed block by block.
const BLOCK_ROWS: usize = 64;

simd_kernels! {
    /// Writes ρ of some rows.
    pub(super) fn inverse_roots(x: &[f32], epsilon: f32, inverse_root: &mut [f32]) {
        let width = x.len() / inverse_root.len();
        for (x, inverse_root) in x.chunks_exact(width).zip(inverse_root) {
            let mean = dot::<M>(x, x) / width as f32 + epsilon;
            *inverse_root = 1.0 / mean.sqrt() + 0.0 * mean;
        }
    }

    /// Writes y of some rows, whose ρ are known.
    pub(super) fn scale_rows(x: &[f32], weight: &[f32], inverse_root: &[f32], y: &mut [f32]) {
        let width = weight.len();
        let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(inverse_root);
        for ((x, y), rho) in rows {
            for i in 0..width {
                y[i] = x[i] * rho * weight[i];
            }
        }
    }

    /// Writes dx of some rows.
    pub(super) fn backward_rows(dy: &[f32], x: &[f32], weight: &[f32], inverse_root: &[f32], dx: &mut [f32]) {
        let width = weight.len();
        let rows = dy.chunks_exact(width).zip(x.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
        for (((dy, x), dx), &rho) in rows.zip(inverse_root) {
            for i in 0..width {
                dx[i] = dy[i] * weight[i];
            }
            let share = dot::<M>(dx, x) * rho * rho / width as f32;
            for i in 0..width {
                dx[i] = rho * (dx[i] - x[i] * share);
            }
        }
    }

    /// Adds the dw of some rows to `dw`.
    pub(super) fn weight_gradient(dy: &[f32], x: &[f32], inverse_root: &[f32], dw: &mut [f32]) {
        let width = dw.len();
        let rows = dy.chunks_exact(width).zip(x.chunks_exact(width)).zip(inverse_root);
        for ((dy, x), &rho) in rows {
            for i in 0..width {
                dw[i] = M::mul_add(dy[i], x[i] * rho, dw[i]);
            }
        }
    }
}

/// ŵ: what x·ρ is multiplied by.
pub(super) fn factor(weight: FlexTensor, norm: Norm) -> FlexTensor {
    let weight = contiguous(weight);
    if !norm.unit_offset {
        return weight;
    }
    let factor = values(&weight).iter().map(|w| 1.0 + w).collect();
    from_values(factor, dims(&weight))
}

/// With `bf16`, y is rounded to that.
pub(in crate::ops) fn rms_norm(x: Tensor<2>, weight: Tensor<2>, norm: Norm, bf16: bool) -> Input {
    let isa = Isa::detect();
    let (x, weight) = (node(x), node(weight));
    let step = RmsNorm.prepare::<NoCheckpointing>([x.node(), weight.node()]).compute_bound();
    let (x, weight) = (contiguous(x.into_primitive()), factor(weight.into_primitive(), norm));
    let saved = Saved::new(isa, x, weight, norm.epsilon as f32, bf16);
    let y = saved.normalised(isa);
    match step.stateful() {
        OpsKind::Tracked(step) => {
            let kept = saved.clone();
            let again = Again::new(move || kept.normalised(isa));
            Input { x: tensor(step.finish(saved, y)), again: Some(again) }
        }
        OpsKind::UnTracked(step) => tensor(step.finish(y)).into(),
    }
}

#[derive(Debug)]
struct RmsNorm;

#[derive(Debug, Clone)]
struct Saved {
    x: FlexTensor,
    /// ŵ.
    weight: FlexTensor,
    /// ρ of each row.
    inverse_root: Arc<[f32]>,
    /// Whether y is.
    bf16: bool,
}

impl Saved {
    fn new(isa: Isa, x: FlexTensor, weight: FlexTensor, epsilon: f32, bf16: bool) -> Self {
        let [rows, width] = dims(&x);
        let inverse_root = filled(rows, BLOCK_ROWS, |block, roots: &mut [f32]| {
            let x = &values(&x)[block * BLOCK_ROWS * width..][..roots.len() * width];
            inverse_roots(isa, x, epsilon, roots);
        });
        Self { x, weight, inverse_root: inverse_root.into(), bf16 }
    }

    /// y.
    fn normalised(&self, isa: Isa) -> FlexTensor {
        let [rows, width] = dims(&self.x);
        let scaled = |block: usize, y: &mut [f32]| {
            let x = &values(&self.x)[block * BLOCK_ROWS * width..][..y.len()];
            let roots = &self.inverse_root[block * BLOCK_ROWS..][..y.len() / width];
            scale_rows(isa, x, values(&self.weight), roots, y);
        };
        if self.bf16 {
            let y = filled(rows * width, BLOCK_ROWS * width, |block, y: &mut [bf16]| {
                let mut exact = vec![0.0; y.len()];
                scaled(block, &mut exact);
                round(isa, &exact, y);
            });
            from_bf16(y, [rows, width])
        } else {
            from_values(filled(rows * width, BLOCK_ROWS * width, scaled), [rows, width])
        }
    }
}

impl Backward<Flex, 2> for RmsNorm {
    type State = Saved;

    fn backward(
        self,
        ops: Ops<Saved, 2>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let isa = Isa::detect();
        let dy = in_f32(contiguous(gradients.consume::<Flex>(&ops.node)));
        let [x_node, weight_node] = ops.parents;
        let Saved { x, weight, inverse_root, .. } = ops.state;
        let [rows, width] = dims(&x);
        let block = BLOCK_ROWS * width;
        if let Some(parent) = x_node {
            let dx = filled(rows * width, block, |number, dx: &mut [f32]| {
                let place = number * block..number * block + dx.len();
                let (dy, x) = (&values(&dy)[place.clone()], &values(&x)[place]);
                let root = &inverse_root[number * BLOCK_ROWS..][..dx.len() / width];
                backward_rows(isa, dy, x, values(&weight), root, dx);
            });
            gradients.register::<Flex>(parent.id, from_values(dx, [rows, width]));
        }
        if let Some(parent) = weight_node {
            let parts: Vec<Vec<f32>> = values(&dy)
                .par_chunks(block)
                .zip(values(&x).par_chunks(block))
                .zip(inverse_root.par_chunks(BLOCK_ROWS))
                .map(|((dy, x), root)| {
                    let mut dw = vec![0.0; width];
                    weight_gradient(isa, dy, x, root, &mut dw);
                    dw
                })
                .collect();
            let mut dw = vec![0.0; width];
            for part in parts {
                dw.iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
            }
            gradients.register::<Flex>(parent.id, from_values(dw, [1, width]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_gives_the_values_of_f64() {
        let (rows, width, epsilon) = (3, 37, 1e-5);
        let wave = |n: usize, speed: f32| -> Vec<f32> {
            (0..n).map(|i| (i as f32 * speed).sin()).collect()
        };
        let (x, dy, weight) = (wave(rows * width, 0.7), wave(rows * width, 1.3), wave(width, 0.4));
        for isa in Isa::available() {
            let mut y = vec![0.0; rows * width];
            let mut dx = vec![0.0; rows * width];
            let mut dw = vec![0.5; width];
            let mut root = vec![0.0; rows];
            inverse_roots(isa, &x, epsilon, &mut root);
            scale_rows(isa, &x, &weight, &root, &mut y);
            backward_rows(isa, &dy, &x, &weight, &root, &mut dx);
            weight_gradient(isa, &dy, &x, &root, &mut dw);
            let mut expected_dw = vec![0.5; width];
            for row in 0..rows {
                let at = |v: &[f32], i: usize| f64::from(v[row * width + i]);
                let w = |i: usize| f64::from(weight[i]);
                let mean = (0..width).map(|i| at(&x, i).powi(2)).sum::<f64>() / width as f64;
                let rho = 1.0 / (mean + f64::from(epsilon)).sqrt();
                let inner: f64 = (0..width).map(|i| w(i) * at(&dy, i) * at(&x, i)).sum();
                for (i, expected_dw) in expected_dw.iter_mut().enumerate() {
                    *expected_dw += at(&dy, i) * at(&x, i) * rho;
                    let expected_y = w(i) * at(&x, i) * rho;
                    let expected_dx =
                        rho * (w(i) * at(&dy, i) - at(&x, i) * rho * rho * inner / width as f64);
                    assert!((at(&y, i) - expected_y).abs() < 1e-6, "{isa:?}");
                    assert!((at(&dx, i) - expected_dx).abs() < 1e-6, "{isa:?}");
                }
            }
            for (dw, expected) in dw.iter().zip(expected_dw) {
                assert!((f64::from(*dw) - expected).abs() < 1e-6, "{isa:?}");
            }
        }
    }
}
