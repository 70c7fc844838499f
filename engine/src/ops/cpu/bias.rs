//! CPU form of [`crate::ops::bias`].

use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::Tensor;
use rayon::prelude::*;

use super::bf16::in_f32;
use super::isa::{Isa, simd_kernels};
use super::step::{contiguous, dims, from_values, node, tensor, values};

/// Rows that one task handles; fixed, as db is summed block by block.
const BLOCK_ROWS: usize = 64;

simd_kernels! {
    /// Adds `bias` to some rows.
    fn add_to_rows(bias: &[f32], rows: &mut [f32]) {
        for row in rows.chunks_exact_mut(bias.len()) {
            for i in 0..bias.len() {
                row[i] += bias[i];
            }
        }
    }

    /// Adds some rows to `sum`.
    fn add_rows(rows: &[f32], sum: &mut [f32]) {
        let width = sum.len();
        for row in rows.chunks_exact(width) {
            for i in 0..width {
                sum[i] += row[i];
            }
        }
    }
}

pub(in crate::ops) fn add_bias(x: Tensor<2>, bias: Tensor<2>) -> Tensor<2> {
    let isa = Isa::detect();
    let (x, bias) = (node(x), node(bias));
    let step = AddBias.prepare::<NoCheckpointing>([x.node(), bias.node()]).compute_bound();
    let mut y = contiguous(x.into_primitive());
    let bias = contiguous(bias.into_primitive());
    let [_, width] = dims(&y);
    // In place where nothing else holds x.
    y.storage_mut::<f32>()
        .par_chunks_mut(BLOCK_ROWS * width)
        .for_each(|rows| add_to_rows(isa, values(&bias), rows));
    tensor(match step.stateful() {
        OpsKind::Tracked(step) => step.finish((), y),
        OpsKind::UnTracked(step) => step.finish(y),
    })
}

#[derive(Debug)]
struct AddBias;

impl Backward<Flex, 2> for AddBias {
    type State = ();

    fn backward(
        self,
        ops: Ops<(), 2>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let isa = Isa::detect();
        let dy = in_f32(contiguous(gradients.consume::<Flex>(&ops.node)));
        let [x_node, bias_node] = ops.parents;
        let [_, width] = dims(&dy);
        if let Some(parent) = bias_node {
            let partial: Vec<Vec<f32>> = values(&dy)
                .par_chunks(BLOCK_ROWS * width)
                .map(|rows| {
                    let mut sum = vec![0.0; width];
                    add_rows(isa, rows, &mut sum);
                    sum
                })
                .collect();
            let mut db = vec![0.0; width];
            for sum in partial {
                add_rows(isa, &sum, &mut db);
            }
            gradients.register::<Flex>(parent.id, from_values(db, [width, 1]));
        }
        if let Some(parent) = x_node {
            gradients.register::<Flex>(parent.id, dy);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_gives_the_same_sums() {
        let rows: Vec<f32> = (0..3 * 21).map(|i| i as f32).collect();
        for isa in Isa::available() {
            let mut sum = vec![0.5; 21];
            add_rows(isa, &rows, &mut sum);
            assert!(
                sum.iter().enumerate().all(|(i, &s)| s == (3 * i + 63) as f32 + 0.5),
                "{isa:?}"
            );
            let mut shifted = rows.clone();
            add_to_rows(isa, &[1.0; 21], &mut shifted);
            assert!(shifted.iter().zip(&rows).all(|(y, x)| *y == x + 1.0), "{isa:?}");
        }
    }
}
