//! One Muon update of one tensor (Jordan 2024), in the form of `torch.optim.Muon`.
//!
//! With g the gradient times the clipping factor and μ = 0.95, for each matrix of R rows and C
//! columns that the tensor holds:
//!
//! ```text
//! m ← μ·m + (1 − μ)·g
//! u = μ·m + (1 − μ)·g                     (Nesterov)
//! o = NewtonSchulz(u)
//! w ← w·(1 − lr·λ) − lr·k·o               k = √max(1, R/C), or 0.2·√max(R, C)
//! ```
//!
//! NewtonSchulz brings all singular values of a matrix near 1: it divides by the Frobenius norm
//! and then takes five times `X ← a·X + (b·A + c·A²)·X` with `A = X·Xᵀ`, on the transposed matrix
//! where there are more rows than columns. PyTorch does this in bf16; here it is f32. The work is
//! in the products of matrices, which are the backend's, so this one form serves every device.

use std::ops::Range;

use burn::tensor::Tensor;
use tunesmith_core::hyperparameters::MuonLearningRate;

use super::product::product;

/// μ.
const MOMENTUM: f64 = 0.95;
/// a, b and c: Jordan's, chosen for steepness at 0 and not for convergence to exactly 1.
const COEFFICIENTS: [f64; 3] = [3.4445, -4.7750, 2.0315];
const ITERATIONS: usize = 5;
/// A norm below this counts as this.
const EPSILON: f64 = 1e-7;

/// The scalars of one update.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    pub(crate) gradient_scale: f64,
    /// lr: the schedule's factor included, the shape's not.
    pub(crate) learning_rate: f64,
    /// λ.
    pub(crate) weight_decay: f64,
    /// What k is.
    pub(crate) adjust: MuonLearningRate,
}

/// The new value; the momentum is replaced. `matrices` are the rows of each matrix, together all.
pub(crate) fn muon(
    value: Tensor<2>,
    gradient: Tensor<2>,
    momentum: &mut Tensor<2>,
    matrices: &[Range<usize>],
    step: &Step,
) -> Tensor<2> {
    let gradient = gradient.mul_scalar(step.gradient_scale * (1.0 - MOMENTUM));
    *momentum = momentum.clone().mul_scalar(MOMENTUM) + gradient.clone();
    let update = momentum.clone().mul_scalar(MOMENTUM) + gradient;
    let columns = value.dims()[1];
    let updates = matrices
        .iter()
        .map(|rows| {
            let update = update.clone().slice([rows.clone(), 0..columns]);
            let rate = step.learning_rate * shape_factor(step.adjust, rows.len(), columns);
            orthogonal(update).mul_scalar(rate)
        })
        .collect();
    value.mul_scalar(1.0 - step.learning_rate * step.weight_decay) - Tensor::cat(updates, 0)
}

/// k.
fn shape_factor(adjust: MuonLearningRate, rows: usize, columns: usize) -> f64 {
    match adjust {
        MuonLearningRate::Original => (rows as f64 / columns as f64).max(1.0).sqrt(),
        MuonLearningRate::MatchRmsAdamw => 0.2 * (rows.max(columns) as f64).sqrt(),
    }
}

/// NewtonSchulz.
fn orthogonal(matrix: Tensor<2>) -> Tensor<2> {
    let [rows, columns] = matrix.dims();
    let is_tall = rows > columns;
    let x = if is_tall { matrix.transpose() } else { matrix };
    // Twice the norm's own division: the sum of squares of tiny gradients would be 0 in f32.
    let greatest = x.clone().abs().max().clamp_min(f32::MIN_POSITIVE).reshape([1, 1]);
    let scaled = x / greatest.clone();
    let norm = scaled.clone().square().sum().sqrt().reshape([1, 1]);
    let floor = greatest.recip().mul_scalar(EPSILON);
    let mut x = scaled / norm.max_pair(floor);
    let [a, b, c] = COEFFICIENTS;
    for _ in 0..ITERATIONS {
        let gram = product(x.clone(), x.clone().transpose());
        let polynomial = gram.clone().mul_scalar(b) + product(gram.clone(), gram).mul_scalar(c);
        x = x.clone().mul_scalar(a) + product(polynomial, x);
    }
    if is_tall { x.transpose() } else { x }
}
