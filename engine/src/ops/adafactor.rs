//! One Adafactor update of one tensor (Shazeer and Stern 2018), in transformers' form and order.
//!
//! For update number t, with g the gradient times the clipping factor and β = 1 − t^−0.8, for each
//! public tensor that the stored one holds:
//!
//! ```text
//! r ← β·r + (1 − β)·mean over columns of (g² + ε)        of a matrix: a number a row …
//! c ← β·c + (1 − β)·mean over rows of (g² + ε)           … and a number a column
//! u = g / √(r·c / mean(r))
//! v ← β·v + (1 − β)·(g² + ε),  u = g / √v                of a vector
//! u ← u / max(1, RMS(u))
//! w ← w·(1 − lr·λ) − lr·u
//! ```

use std::ops::Range;

use burn::tensor::Tensor;

use super::{cpu, on_cpu};

/// Exponent of β's approach to 1.
const DECAY_RATE: f64 = -0.8;
/// ε: keeps the root of a zero gradient's square from being 0.
pub(super) const EPSILON: f32 = 1e-30;

/// The scalars of one update.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    pub(super) gradient_scale: f32,
    pub(super) beta: f32,
    /// 1 − β, which is t^−0.8 and not 1 less the rounded β.
    pub(super) one_minus_beta: f32,
    pub(super) learning_rate: f32,
    /// 1 − lr·λ.
    pub(super) decay: f32,
}

impl Step {
    /// Update number `t`, from 1, of gradients times `gradient_scale`.
    pub(crate) fn new(learning_rate: f64, weight_decay: f64, t: u64, gradient_scale: f64) -> Self {
        let one_minus_beta = (t as f64).powf(DECAY_RATE);
        Self {
            gradient_scale: gradient_scale as f32,
            beta: (1.0 - one_minus_beta) as f32,
            one_minus_beta: one_minus_beta as f32,
            learning_rate: learning_rate as f32,
            decay: (1.0 - learning_rate * weight_decay) as f32,
        }
    }
}

/// The second moments of one public tensor, without autodiff.
#[expect(
    clippy::large_enum_variant,
    reason = "there is one for each tensor, whose values lie elsewhere and are far more"
)]
#[derive(Debug, Clone)]
pub(crate) enum SecondMoment {
    /// Of a matrix.
    Factored {
        /// r, `[rows, 1]`.
        rows: Tensor<2>,
        /// c, `[1, columns]`.
        columns: Tensor<2>,
    },
    /// Of a vector: v, of its stored shape.
    Whole(Tensor<2>),
}

/// One public tensor inside a stored one.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    /// Its rows. The parts follow one another and cover the stored tensor.
    pub(crate) rows: Range<usize>,
    pub(crate) second: SecondMoment,
}

/// The new value; the moments are replaced. No tensor carries autodiff. On the CPU this works in
/// place where nothing else holds the tensors.
pub(crate) fn adafactor(
    value: Tensor<2>,
    gradient: Tensor<2>,
    parts: &mut [Part],
    step: &Step,
) -> Tensor<2> {
    if on_cpu(&value) {
        cpu::adafactor::adafactor(value, gradient, parts, step)
    } else {
        portable(value, gradient, parts, step)
    }
}

pub(super) fn portable(
    value: Tensor<2>,
    gradient: Tensor<2>,
    parts: &mut [Part],
    step: &Step,
) -> Tensor<2> {
    let columns = value.dims()[1];
    let gradient = gradient.mul_scalar(step.gradient_scale);
    let updates = parts
        .iter_mut()
        .map(|part| {
            let gradient = gradient.clone().slice([part.rows.clone(), 0..columns]);
            let squares = gradient.clone().square().add_scalar(EPSILON);
            let mean = |old: &Tensor<2>, new: Tensor<2>| {
                old.clone().mul_scalar(step.beta) + new.mul_scalar(step.one_minus_beta)
            };
            let update = match &mut part.second {
                SecondMoment::Factored { rows, columns } => {
                    *rows = mean(rows, squares.clone().mean_dim(1));
                    *columns = mean(columns, squares.mean_dim(0));
                    let shares = rows.clone() / rows.clone().mean_dim(0);
                    gradient / shares.sqrt() / columns.clone().sqrt()
                }
                SecondMoment::Whole(second) => {
                    *second = mean(second, squares);
                    gradient / second.clone().sqrt()
                }
            };
            let rms = update.clone().square().mean().sqrt().reshape([1, 1]);
            update / rms.clamp_min(1.0)
        })
        .collect();
    value.mul_scalar(step.decay) - Tensor::cat(updates, 0).mul_scalar(step.learning_rate)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, random};
    use crate::parameter::read;

    type Form = fn(Tensor<2>, Tensor<2>, &mut [Part], &Step) -> Tensor<2>;

    /// A matrix that is cut into several blocks of work, and two vectors below it.
    const SHAPE: [usize; 2] = [203, 37];

    fn parts() -> Vec<Part> {
        let device = random(SHAPE, 1).device();
        let zeros = |shape: [usize; 2]| Tensor::zeros(shape, &device);
        let whole = |row: usize| Part {
            rows: row..row + 1,
            second: SecondMoment::Whole(zeros([1, SHAPE[1]])),
        };
        let second =
            SecondMoment::Factored { rows: zeros([201, 1]), columns: zeros([1, SHAPE[1]]) };
        vec![Part { rows: 0..201, second }, whole(201), whole(202)]
    }

    /// Value and second moments after three updates.
    fn three_updates(form: Form) -> Vec<(String, Vec<f32>)> {
        let mut value = random(SHAPE, 1);
        let mut parts = parts();
        for t in 1..=3 {
            let step = Step::new(0.01, 0.1, t, 0.5);
            value = form(value, random(SHAPE, 10 + t), &mut parts, &step);
        }
        let mut tensors = vec![("value".to_owned(), value)];
        for (index, part) in parts.into_iter().enumerate() {
            match part.second {
                SecondMoment::Factored { rows, columns } => {
                    tensors.push((format!("rows of part {index}"), rows));
                    tensors.push((format!("columns of part {index}"), columns));
                }
                SecondMoment::Whole(second) => tensors.push((format!("part {index}"), second)),
            }
        }
        tensors.into_iter().map(|(name, tensor)| (name, read(tensor).unwrap())).collect()
    }

    #[test]
    fn cpu_form_equals_the_portable_form_on_matrices_and_vectors_stored_together() {
        let expected = three_updates(portable);
        for ((name, values), (_, expected)) in
            three_updates(cpu::adafactor::adafactor).iter().zip(&expected)
        {
            assert_close(name, values, expected);
        }
    }

    #[test]
    fn a_gradient_of_zeros_moves_nothing_but_by_weight_decay() {
        let zeros = random(SHAPE, 1).zeros_like();
        for form in [cpu::adafactor::adafactor as Form, portable as Form] {
            let step = Step::new(0.1, 0.5, 1, 1.0);
            let value = form(random(SHAPE, 1), zeros.clone(), &mut parts(), &step);
            let expected = random(SHAPE, 1).mul_scalar(0.95);
            assert_close("value", &read(value).unwrap(), &read(expected).unwrap());
        }
    }
}
