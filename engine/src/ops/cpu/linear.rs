//! CPU form of [`crate::ops::linear`].

use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

use super::again::Again;
use super::bf16::{in_bf16, in_f32, widened_values};
use super::dora::{self, Inputs};
use super::gemm::{MatMut, MatRef, Threads, gemm, gemm_add, product, product_of_two, product_plus};
use super::step::{absent, contiguous, dims, from_values, matrix, node, tensor, values};
use super::weight::Stored;
use crate::ops::bf16::is_bf16;
use crate::ops::dropout::Dropout;
use crate::ops::linear::{Input, LowRank, LowRankPart, Weight};

/// Columns of all z up to which each output is multiplied by all of them, and not by its part's
/// alone: a few zeros cost less than another pass over the outputs.
const MAX_SPREAD: usize = 128;

pub(in crate::ops) fn linear(
    input: Input,
    weight: Weight,
    residual: Option<Tensor<2>>,
    low_rank: Option<LowRank>,
) -> Tensor<2> {
    let Input { x, again } = input;
    let x = node(x);
    let rounds = match &weight {
        Weight::Dense(weight) => is_bf16(weight),
        Weight::Quantized { bf16, .. } => *bf16,
    };
    let (weight, weight_node) = Stored::of(weight);
    let trains = weight_node.is_tracked();
    let residual = residual.map(node);
    let (a, b, branch) = match low_rank {
        Some(LowRank { a, b, scale, magnitude: Some(magnitude), parts }) => {
            let [a, b, magnitude] = [a, b, magnitude].map(node);
            let inputs = Inputs { x, rounds, weight, weight_node, residual, a, b, magnitude };
            return dora::linear(inputs, scale, parts);
        }
        Some(LowRank { a, b, scale, magnitude: None, parts }) => {
            (node(a), node(b), Some((scale, parts)))
        }
        None => (absent(), absent(), None),
    };
    let residual_or_absent = residual.clone().unwrap_or_else(absent);
    let step = Linear
        .prepare::<NoCheckpointing>([
            x.node(),
            weight_node.node(),
            residual_or_absent.node(),
            a.node(),
            b.node(),
        ])
        .compute_bound();

    let x = contiguous(x.into_primitive());
    // Beside a weight in bf16, the input is rounded once, for the backward pass too.
    let x = if rounds { in_bf16(&x) } else { x };
    let residual = residual.map(|residual| contiguous(residual.into_primitive()));
    let ([tokens, _], [outputs, _]) = (dims(&x), weight.dims());
    let residual = residual.as_ref();
    let (y, branch) = match branch {
        Some((scale, parts)) => {
            let (a, b) = (contiguous(a.into_primitive()), contiguous(b.into_primitive()));
            let mut branch = Branch::new(a, b, scale, parts);
            let y = branch.forward(&x, &weight, residual);
            (y, Some(branch))
        }
        None => (base_product(&x, &weight, residual), None),
    };
    let y = from_values(y, [tokens, outputs]);
    tensor(match step.stateful() {
        OpsKind::Tracked(step) => {
            let shape = dims(&x);
            let x = match again {
                _ if branch.is_none() && !trains => Operand::NotNeeded,
                Some(again) => Operand::Again(again),
                None => Operand::Kept(x),
            };
            step.finish(Saved { x, shape, rounds, weight, branch }, y)
        }
        OpsKind::UnTracked(step) => step.finish(y),
    })
}

/// x·Wᵀ, added to the residual where there is one.
pub(super) fn base_product(
    x: &FlexTensor,
    weight: &Stored,
    residual: Option<&FlexTensor>,
) -> Vec<f32> {
    let (x, weight) = (matrix(x), weight.view().t());
    match residual {
        Some(residual) => product_plus(values(residual), 1.0, x, weight, Threads::Shared),
        None => product(1.0, x, weight, Threads::Shared),
    }
}

#[derive(Debug)]
struct Linear;

#[derive(Debug, Clone)]
struct Saved {
    x: Operand,
    /// That of x.
    shape: [usize; 2],
    /// Whether operands are rounded to bf16.
    rounds: bool,
    weight: Stored,
    branch: Option<Branch>,
}

/// x in the backward pass.
#[derive(Debug, Clone)]
enum Operand {
    Kept(FlexTensor),
    Again(Again),
    /// Nothing that trains is multiplied by it.
    NotNeeded,
}

impl Operand {
    fn values(self, rounds: bool) -> Option<FlexTensor> {
        match self {
            Self::Kept(x) => Some(x),
            Self::Again(again) if rounds => Some(in_bf16(&again.compute())),
            Self::Again(again) => Some(again.compute()),
            Self::NotNeeded => None,
        }
    }
}

/// The low-rank branch, and what its forward pass leaves for the backward pass.
#[derive(Debug, Clone)]
pub(super) struct Branch {
    pub(super) a: FlexTensor,
    pub(super) b: FlexTensor,
    pub(super) scale: f32,
    parts: Arc<[LowRankPart]>,
    /// The s·zᵢ side by side, `[tokens, parts · r]`.
    z: Arc<[f32]>,
}

impl Backward<Flex, 5> for Linear {
    type State = Saved;

    fn backward(
        self,
        ops: Ops<Saved, 5>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = contiguous(gradients.consume::<Flex>(&ops.node));
        let [x_node, weight_node, residual_node, a_node, b_node] = ops.parents;
        let Saved { x, shape, rounds, weight, branch } = ops.state;
        // Beside a weight in bf16, the gradient is rounded once, for all products.
        let rounded_dy = rounds.then(|| in_bf16(&dy));
        let dy_view = matrix(rounded_dy.as_ref().unwrap_or(&dy));
        let needed = a_node.is_some() || weight_node.is_some();
        let x = needed.then(|| x.values(rounds)).flatten();

        if let (Some(branch), Some(parent)) = (&branch, b_node) {
            let db = branch.b_gradient(dy_view);
            gradients.register::<Flex>(parent.id, from_values(db, dims(&branch.b)));
        }
        let dz = branch
            .as_ref()
            .filter(|_| a_node.is_some() || x_node.is_some())
            .map(|branch| (branch, branch.z_gradient(dy_view)));
        if let (Some((branch, dz)), Some(parent), Some(x)) = (&dz, a_node, &x) {
            let da = branch.a_gradient(dz, x);
            gradients.register::<Flex>(parent.id, from_values(da, dims(&branch.a)));
        }
        if let (Some(parent), Some(x)) = (weight_node, &x) {
            let dw = product(1.0, dy_view.t(), matrix(x), Threads::Shared);
            gradients.register::<Flex>(parent.id, from_values(dw, weight.dims()));
        }
        drop(x);
        if let Some(parent) = x_node {
            let dx = match &dz {
                Some((branch, dz)) => branch.x_gradient(dz, dy_view, &weight, shape),
                None => product(1.0, dy_view, weight.view(), Threads::Shared),
            };
            gradients.register::<Flex>(parent.id, from_values(dx, shape));
        }
        if let Some(parent) = residual_node {
            gradients.register::<Flex>(parent.id, in_f32(dy));
        }
    }
}

impl Branch {
    pub(super) fn new(a: FlexTensor, b: FlexTensor, scale: f32, parts: Arc<[LowRankPart]>) -> Self {
        Self { a, b, scale, parts, z: Arc::default() }
    }

    fn rank(&self) -> usize {
        dims(&self.b)[1]
    }

    /// Each part with its rows of A, which are its columns of z, and its rows of B.
    pub(super) fn parts(&self) -> impl Iterator<Item = (&LowRankPart, Range<usize>, Range<usize>)> {
        let rank = self.rank();
        self.parts
            .iter()
            .zip(LowRank::b_rows(&self.parts))
            .enumerate()
            .map(move |(i, (part, b_rows))| (part, i * rank..(i + 1) * rank, b_rows))
    }

    pub(super) fn has_dropout(&self) -> bool {
        self.parts.iter().any(|part| part.dropout.is_some())
    }

    /// residual + x·Wᵀ, and s·zᵢ·Bᵢᵀ at the outputs of each part; keeps s·z.
    fn forward(
        &mut self,
        x: &FlexTensor,
        weight: &Stored,
        residual: Option<&FlexTensor>,
    ) -> Vec<f32> {
        let ([tokens, _], [outputs, _], [z_width, _]) = (dims(x), weight.dims(), dims(&self.a));
        if self.parts.len() > 1 && z_width > MAX_SPREAD {
            let mut y = base_product(x, weight, residual);
            self.add_to(x, &mut y, outputs);
            return y;
        }
        self.z = self.inner(x).into();
        let spread = self.spread_b(outputs);
        let z = MatRef::new(&self.z, tokens, z_width);
        let b = spread
            .as_deref()
            .map_or_else(|| matrix(&self.b), |spread| MatRef::new(spread, outputs, z_width));
        let base = residual.map(values);
        product_of_two(base, [matrix(x), weight.view().t()], [z, b.t()], Threads::Shared)
    }

    /// Keeps s·z, and adds s·zᵢ·Bᵢᵀ to the outputs of each part.
    pub(super) fn add_to(&mut self, x: &FlexTensor, y: &mut [f32], outputs: usize) {
        let [tokens, _] = dims(x);
        self.z = self.inner(x).into();
        let z = MatRef::new(&self.z, tokens, dims(&self.a)[0]);
        for (part, z_columns, b_rows) in self.parts() {
            let target = MatMut::new(y, tokens, outputs).columns(part.outputs.clone());
            let b = matrix(&self.b).rows(b_rows);
            gemm_add(target, 1.0, z.columns(z_columns), b.t(), Threads::Shared);
        }
    }

    /// The s·zᵢ side by side.
    fn inner(&self, x: &FlexTensor) -> Vec<f32> {
        let [tokens, _] = dims(x);
        let z_width = dims(&self.a)[0];
        if !self.has_dropout() {
            return product(self.scale, matrix(x), matrix(&self.a).t(), Threads::Shared);
        }
        let mut z = vec![0.0; tokens * z_width];
        for (part, z_columns, _) in self.parts() {
            let dropped = dropped(x, part.dropout);
            let a = matrix(&self.a).rows(z_columns.clone());
            let target = MatMut::new(&mut z, tokens, z_width).columns(z_columns);
            gemm(target, self.scale, like(&dropped, x), a.t(), Threads::Shared);
        }
        z
    }

    /// B as it is multiplied by all of z, `[out, parts · r]`: each Bᵢ at its own rows and columns,
    /// and 0 elsewhere. None where that is B itself.
    fn spread_b(&self, outputs: usize) -> Option<Vec<f32>> {
        let [b_rows, rank] = dims(&self.b);
        let z_width = dims(&self.a)[0];
        if z_width == rank && b_rows == outputs {
            return None;
        }
        let b = values(&self.b);
        let mut spread = vec![0.0; outputs * z_width];
        for (part, z_columns, b_rows) in self.parts() {
            for (output, b_row) in part.outputs.clone().zip(b_rows) {
                spread[output * z_width..][z_columns.clone()]
                    .copy_from_slice(&b[b_row * rank..][..rank]);
            }
        }
        Some(spread)
    }

    /// dB, part below part.
    pub(super) fn b_gradient(&self, dy: MatRef<'_>) -> Vec<f32> {
        let z_width = dims(&self.a)[0];
        let z = MatRef::new(&self.z, self.z.len() / z_width, z_width);
        let mut db = Vec::with_capacity(self.rank() * dims(&self.b)[0]);
        for (part, z_columns, _) in self.parts() {
            let dy = dy.columns(part.outputs.clone());
            db.extend(product(1.0, dy.t(), z.columns(z_columns), Threads::Shared));
        }
        db
    }

    /// dz, part beside part.
    pub(super) fn z_gradient(&self, dy: MatRef<'_>) -> Vec<f32> {
        let z_width = dims(&self.a)[0];
        let tokens = self.z.len() / z_width;
        let mut dz = vec![0.0; tokens * z_width];
        for (part, z_columns, b_rows) in self.parts() {
            let target = MatMut::new(&mut dz, tokens, z_width).columns(z_columns);
            let dy = dy.columns(part.outputs.clone());
            gemm(target, self.scale, dy, matrix(&self.b).rows(b_rows), Threads::Shared);
        }
        dz
    }

    /// dA, part below part.
    pub(super) fn a_gradient(&self, dz: &[f32], x: &FlexTensor) -> Vec<f32> {
        let [z_width, input] = dims(&self.a);
        let dz = MatRef::new(dz, dims(x)[0], z_width);
        if !self.has_dropout() {
            return product(1.0, dz.t(), matrix(x), Threads::Shared);
        }
        let mut da = Vec::with_capacity(z_width * input);
        for (part, z_columns, _) in self.parts() {
            let dropped = dropped(x, part.dropout);
            let dz = dz.columns(z_columns);
            da.extend(product(1.0, dz.t(), like(&dropped, x), Threads::Shared));
        }
        da
    }

    /// dx.
    fn x_gradient(
        &self,
        dz: &[f32],
        dy: MatRef<'_>,
        weight: &Stored,
        shape: [usize; 2],
    ) -> Vec<f32> {
        if self.has_dropout() {
            let mut dx = product(1.0, dy, weight.view(), Threads::Shared);
            self.add_x_gradient(dz, &mut dx, shape);
            return dx;
        }
        let dz = MatRef::new(dz, shape[0], dims(&self.a)[0]);
        product_of_two(None, [dy, weight.view()], [dz, matrix(&self.a)], Threads::Shared)
    }

    /// Adds Σᵢ dropᵢ∘(dzᵢ·Aᵢ) to dx.
    pub(super) fn add_x_gradient(&self, dz: &[f32], dx: &mut [f32], [tokens, input]: [usize; 2]) {
        let dz = MatRef::new(dz, tokens, dims(&self.a)[0]);
        if !self.has_dropout() {
            let target = MatMut::new(dx, tokens, input);
            gemm_add(target, 1.0, dz, matrix(&self.a), Threads::Shared);
            return;
        }
        for (part, z_columns, _) in self.parts() {
            let a = matrix(&self.a).rows(z_columns.clone());
            let mut update = product(1.0, dz.columns(z_columns), a, Threads::Shared);
            if let Some(dropout) = part.dropout {
                drop_elements(&mut update, dropout, input);
            }
            dx.par_iter_mut().zip(update).for_each(|(sum, value)| *sum += value);
        }
    }
}

/// `values` as a view of the shape of `tensor`.
pub(super) fn like<'a>(values: &'a [f32], tensor: &FlexTensor) -> MatRef<'a> {
    let [rows, columns] = dims(tensor);
    MatRef::new(values, rows, columns)
}

/// drop∘x.
pub(super) fn dropped(x: &FlexTensor, dropout: Option<Dropout>) -> Vec<f32> {
    let mut dropped = widened_values(x);
    if let Some(dropout) = dropout {
        drop_elements(&mut dropped, dropout, dims(x)[1]);
    }
    dropped
}

/// Multiplies every element by its dropout factor.
pub(super) fn drop_elements(values: &mut [f32], dropout: Dropout, width: usize) {
    values.par_chunks_mut(width).enumerate().for_each(|(row, values)| {
        for (column, value) in values.iter_mut().enumerate() {
            *value *= dropout.factor(row * width + column);
        }
    });
}
