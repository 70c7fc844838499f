//! DoRA on the CPU: the form of [`crate::ops::linear`] whose low-rank branch has magnitudes.

use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;
use std::sync::Arc;

use super::bf16::{in_bf16, in_f32};
use super::gemm::{MatMut, MatRef, Threads, gemm, gemm_add, product, product_plus};
use super::linear::{Branch, base_product, drop_elements, dropped, like};
use super::step::{Node, absent, contiguous, dims, from_values, matrix, tensor, values};
use super::weight::Stored;
use crate::ops::linear::LowRankPart;

/// Columns that one thread sums over all rows: the order of a sum depends on nothing else.
const COLUMNS_PER_TASK: usize = 128;
/// Rows of W + s·B·A that one thread holds at a time.
const ROWS_PER_TASK: usize = 32;

/// What the operation depends on.
pub(super) struct Inputs {
    pub(super) x: Node,
    /// Whether x is rounded to bf16.
    pub(super) rounds: bool,
    pub(super) weight: Stored,
    pub(super) weight_node: Node,
    pub(super) residual: Option<Node>,
    pub(super) a: Node,
    pub(super) b: Node,
    pub(super) magnitude: Node,
}

pub(super) fn linear(inputs: Inputs, scale: f32, parts: Arc<[LowRankPart]>) -> Tensor<2> {
    let Inputs { x, rounds, weight, weight_node, residual, a, b, magnitude } = inputs;
    let residual_or_absent = residual.clone().unwrap_or_else(absent);
    let step = WeightDecomposed
        .prepare::<NoCheckpointing>([
            x.node(),
            weight_node.node(),
            residual_or_absent.node(),
            a.node(),
            b.node(),
            magnitude.node(),
        ])
        .compute_bound();

    let [x, a, b, magnitude] = [x, a, b, magnitude].map(|input| contiguous(input.into_primitive()));
    // As in plain LoRA: beside a weight in bf16, the input is rounded once.
    let x = if rounds { in_bf16(&x) } else { x };
    let residual = residual.map(|residual| contiguous(residual.into_primitive()));
    let ([tokens, _], [outputs, _]) = (dims(&x), weight.dims());
    let mut branch = Branch::new(a, b, scale, parts);
    let lengths = lengths(&branch, &weight);
    let gains = gains(&branch, values(&magnitude), &lengths, outputs);

    let (mut y, mut u) = if branch.has_dropout() {
        let mut y = base_product(&x, &weight, residual.as_ref());
        // Stays 0 where no part is, so that nothing is added to y there.
        let mut u = vec![0.0; tokens * outputs];
        for (part, _, _) in branch.parts() {
            let dropped = dropped(&x, part.dropout);
            let target = MatMut::new(&mut u, tokens, outputs).columns(part.outputs.clone());
            let weight = weight.view().rows(part.outputs.clone());
            gemm(target, 1.0, like(&dropped, &x), weight.t(), Threads::Shared);
        }
        y.par_iter_mut().zip(&u).for_each(|(y, u)| *y -= u);
        (y, u)
    } else {
        let y = residual
            .map_or_else(|| vec![0.0; tokens * outputs], |residual| values(&residual).to_vec());
        (y, base_product(&x, &weight, None))
    };
    branch.add_to(&x, &mut u, outputs);
    y.par_chunks_mut(outputs).zip(u.par_chunks(outputs)).for_each(|(y, u)| {
        for ((y, u), gain) in y.iter_mut().zip(u).zip(&gains) {
            *y += gain * u;
        }
    });
    let y = from_values(y, [tokens, outputs]);
    let saved = Saved {
        x,
        weight,
        branch,
        magnitude,
        lengths: lengths.into(),
        gains: gains.into(),
        u: u.into(),
    };
    tensor(match step.stateful() {
        OpsKind::Tracked(step) => step.finish(saved, y),
        OpsKind::UnTracked(step) => step.finish(y),
    })
}

#[derive(Debug)]
struct WeightDecomposed;

#[derive(Debug, Clone)]
struct Saved {
    x: FlexTensor,
    weight: Stored,
    branch: Branch,
    /// m, row below row as in B.
    magnitude: FlexTensor,
    /// n, row below row as in B.
    lengths: Arc<[f32]>,
    /// g for each output; 1 for one that is not adapted.
    gains: Arc<[f32]>,
    /// The uᵢ at their columns, `[tokens, out]`; without dropout x·Wᵀ elsewhere.
    u: Arc<[f32]>,
}

impl Backward<Flex, 6> for WeightDecomposed {
    type State = Saved;

    fn backward(
        self,
        ops: Ops<Saved, 6>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = in_f32(contiguous(gradients.consume::<Flex>(&ops.node)));
        let [x_node, weight_node, residual_node, a_node, b_node, magnitude_node] = ops.parents;
        let saved = ops.state;
        let Saved { x, weight, branch, magnitude, .. } = &saved;
        let [tokens, outputs] = dims(&dy);

        if let Some(parent) = magnitude_node {
            let dm = saved.magnitude_gradient(values(&dy), outputs);
            gradients.register::<Flex>(parent.id, from_values(dm, dims(magnitude)));
        }
        let du = scaled_columns(values(&dy), &saved.gains);
        let du_view = MatRef::new(&du, tokens, outputs);
        if let Some(parent) = b_node {
            let db = branch.b_gradient(du_view);
            gradients.register::<Flex>(parent.id, from_values(db, dims(&branch.b)));
        }
        let dz = (a_node.is_some() || x_node.is_some()).then(|| branch.z_gradient(du_view));
        if let (Some(dz), Some(parent)) = (&dz, a_node) {
            let da = branch.a_gradient(dz, x);
            gradients.register::<Flex>(parent.id, from_values(da, dims(&branch.a)));
        }
        if let Some(parent) = weight_node {
            let dw = saved.weight_gradient(&dy, du_view);
            gradients.register::<Flex>(parent.id, from_values(dw, weight.dims()));
        }
        if let (Some(dz), Some(parent)) = (&dz, x_node) {
            let mut dx = saved.base_x_gradient(&dy, du_view);
            branch.add_x_gradient(dz, &mut dx, dims(x));
            gradients.register::<Flex>(parent.id, from_values(dx, dims(x)));
        }
        if let Some(parent) = residual_node {
            gradients.register::<Flex>(parent.id, dy);
        }
    }
}

/// n: the lengths of the rows of Wᵢ + s·Bᵢ·Aᵢ, row below row as in B. The rows are made a few at a
/// time, in f32; their squares are summed in f64.
fn lengths(branch: &Branch, weight: &Stored) -> Vec<f32> {
    let [_, input] = weight.dims();
    let scale = branch.scale;
    let mut lengths = vec![0.0; dims(&branch.b)[0]];
    for (part, a_rows, b_rows) in branch.parts() {
        let (a, b) = (matrix(&branch.a).rows(a_rows), matrix(&branch.b).rows(b_rows.clone()));
        let first_output = part.outputs.start;
        let tasks = lengths[b_rows].par_chunks_mut(ROWS_PER_TASK).enumerate();
        tasks.for_each(|(task, lengths)| {
            let rows = task * ROWS_PER_TASK..task * ROWS_PER_TASK + lengths.len();
            let start = (first_output + rows.start) * input;
            let mut scratch = Vec::new();
            let base = weight.part(start..start + lengths.len() * input, &mut scratch);
            let sum = product_plus(base, scale, b.rows(rows), a, Threads::One);
            for (length, row) in lengths.iter_mut().zip(sum.chunks_exact(input)) {
                *length = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt() as f32;
            }
        });
    }
    lengths
}

/// g = m / n for each output, 1 for one that is not adapted.
fn gains(branch: &Branch, magnitudes: &[f32], lengths: &[f32], outputs: usize) -> Vec<f32> {
    let mut gains = vec![1.0; outputs];
    for (part, _, b_rows) in branch.parts() {
        let quotients = magnitudes[b_rows.clone()].iter().zip(&lengths[b_rows]).map(|(m, n)| m / n);
        for (gain, quotient) in gains[part.outputs.clone()].iter_mut().zip(quotients) {
            *gain = quotient;
        }
    }
    gains
}

impl Saved {
    /// dm, row below row as in B.
    fn magnitude_gradient(&self, dy: &[f32], outputs: usize) -> Vec<f32> {
        let u = &self.u[..];
        let mut sums = vec![0f64; outputs];
        sums.par_chunks_mut(COLUMNS_PER_TASK).enumerate().for_each(|(task, sums)| {
            let start = task * COLUMNS_PER_TASK;
            for (dy, u) in dy.chunks_exact(outputs).zip(u.chunks_exact(outputs)) {
                for (sum, (&dy, &u)) in sums.iter_mut().zip(dy[start..].iter().zip(&u[start..])) {
                    *sum += f64::from(dy * u);
                }
            }
        });
        self.branch
            .parts()
            .flat_map(|(part, _, b_rows)| {
                sums[part.outputs.clone()].iter().zip(&self.lengths[b_rows])
            })
            .map(|(&sum, &length)| (sum / f64::from(length)) as f32)
            .collect()
    }

    /// (g − 1)∘dy.
    fn rest(&self, dy: &FlexTensor) -> Vec<f32> {
        let factors: Vec<f32> = self.gains.iter().map(|gain| gain - 1.0).collect();
        scaled_columns(values(dy), &factors)
    }

    /// dW; without dropout it is duᵀ·x.
    fn weight_gradient(&self, dy: &FlexTensor, du: MatRef<'_>) -> Vec<f32> {
        let Self { x, weight, branch, .. } = self;
        if !branch.has_dropout() {
            return product(1.0, du.t(), matrix(x), Threads::Shared);
        }
        let [outputs, input] = weight.dims();
        let mut dw = product(1.0, matrix(dy).t(), matrix(x), Threads::Shared);
        let rest = self.rest(dy);
        let rest = MatRef::new(&rest, dims(dy)[0], outputs);
        for (part, _, _) in branch.parts() {
            let dropped = dropped(x, part.dropout);
            let rows = part.outputs.start * input..part.outputs.end * input;
            let target = MatMut::new(&mut dw[rows], part.outputs.len(), input);
            let rest = rest.columns(part.outputs.clone()).t();
            gemm_add(target, 1.0, rest, like(&dropped, x), Threads::Shared);
        }
        dw
    }

    /// What the products with W give to dx; without dropout it is du·W.
    fn base_x_gradient(&self, dy: &FlexTensor, du: MatRef<'_>) -> Vec<f32> {
        let Self { x, weight, branch, .. } = self;
        if !branch.has_dropout() {
            return product(1.0, du, weight.view(), Threads::Shared);
        }
        let [tokens, input] = dims(x);
        let mut dx = product(1.0, matrix(dy), weight.view(), Threads::Shared);
        let rest = self.rest(dy);
        let rest = MatRef::new(&rest, tokens, weight.dims()[0]);
        for (part, _, _) in branch.parts() {
            let rest = rest.columns(part.outputs.clone());
            let rows = weight.view().rows(part.outputs.clone());
            let mut update = product(1.0, rest, rows, Threads::Shared);
            if let Some(dropout) = part.dropout {
                drop_elements(&mut update, dropout, input);
            }
            dx.par_iter_mut().zip(update).for_each(|(sum, value)| *sum += value);
        }
        dx
    }
}

/// Multiplies each column by its factor.
fn scaled_columns(values: &[f32], factors: &[f32]) -> Vec<f32> {
    let mut scaled = values.to_vec();
    scaled.par_chunks_mut(factors.len()).for_each(|row| {
        for (value, factor) in row.iter_mut().zip(factors) {
            *value *= factor;
        }
    });
    scaled
}
