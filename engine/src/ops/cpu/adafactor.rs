//! CPU form of [`crate::ops::adafactor`]: three passes over the gradient, in place.

use burn::backend::Flex;
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::isa::{Isa, simd_kernels};
use super::math;
use super::step::{contiguous, values};
use crate::ops::adafactor::{EPSILON, Part, SecondMoment, Step};

/// Elements that one task works on, about: it takes whole rows. What the tasks sum is added in
/// their order.
const BLOCK: usize = 1 << 15;

simd_kernels! {
    /// Σ over columns of (g·scale)² + ε for each row, and Σ over rows for each column.
    fn sums(gradient: &[f32], scale: f32, row_sums: &mut [f32], column_sums: &mut [f32]) {
        let n = column_sums.len();
        for (row, sum) in gradient.chunks_exact(n).zip(row_sums) {
            for (column, g) in column_sums.iter_mut().zip(row) {
                let g = *g * scale;
                *column = M::mul_add(g, g, *column) + EPSILON;
            }
            *sum = (math::sum_of_squares(row) * f64::from(scale) * f64::from(scale)) as f32
                + EPSILON * n as f32;
        }
    }

    /// Σ (g·row·column)².
    fn update_squares(gradient: &[f32], row_factors: &[f32], column_factors: &[f32]) -> f64 {
        let n = column_factors.len();
        let mut total = 0.0;
        for (row, &factor) in gradient.chunks_exact(n).zip(row_factors) {
            let factor = f64::from(factor);
            total += math::sum_of_squared_products(row, column_factors) * factor * factor;
        }
        total
    }

    /// w ← w·decay − g·row·column.
    fn apply(
        value: &mut [f32],
        gradient: &[f32],
        row_factors: &[f32],
        column_factors: &[f32],
        decay: f32,
    ) {
        let n = column_factors.len();
        let rows = value.chunks_exact_mut(n).zip(gradient.chunks_exact(n)).zip(row_factors);
        for ((value, gradient), &factor) in rows {
            for i in 0..n {
                let update = gradient[i] * factor * column_factors[i];
                value[i] = M::mul_add(value[i], decay, -update);
            }
        }
    }
}

pub(in crate::ops) fn adafactor(
    value: Tensor<2>,
    gradient: Tensor<2>,
    parts: &mut [Part],
    step: &Step,
) -> Tensor<2> {
    let columns = value.dims()[1];
    let gradient = primitive(gradient);
    let mut value = primitive(value);
    let (gradient, target) = (values(&gradient), value.storage_mut::<f32>());
    for part in parts {
        let range = part.rows.start * columns..part.rows.end * columns;
        let (gradient, target) = (&gradient[range.clone()], &mut target[range]);
        match &mut part.second {
            SecondMoment::Factored { rows, columns } => {
                let (mut row_moments, mut column_moments) = (take(rows), take(columns));
                let moments = (row_moments.storage_mut(), column_moments.storage_mut());
                matrix(target, gradient, moments.0, moments.1, step);
                *rows = Tensor::from_primitive::<Flex>(row_moments);
                *columns = Tensor::from_primitive::<Flex>(column_moments);
            }
            SecondMoment::Whole(second) => {
                let mut moments = take(second);
                vector(target, gradient, moments.storage_mut(), step);
                *second = Tensor::from_primitive::<Flex>(moments);
            }
        }
    }
    Tensor::from_primitive::<Flex>(value)
}

fn matrix(value: &mut [f32], gradient: &[f32], rows: &mut [f32], columns: &mut [f32], s: &Step) {
    let isa = Isa::detect();
    let n = columns.len();
    let block_rows = (BLOCK / n).max(1);
    let block = block_rows * n;

    let mut row_sums = vec![0.0; rows.len()];
    let partial: Vec<Vec<f32>> = gradient
        .par_chunks(block)
        .zip(row_sums.par_chunks_mut(block_rows))
        .map(|(gradient, row_sums)| {
            let mut column_sums = vec![0.0; n];
            sums(isa, gradient, s.gradient_scale, row_sums, &mut column_sums);
            column_sums
        })
        .collect();
    for (moment, sum) in rows.iter_mut().zip(&row_sums) {
        *moment = *moment * s.beta + sum / n as f32 * s.one_minus_beta;
    }
    for (j, moment) in columns.iter_mut().enumerate() {
        let sum: f64 = partial.iter().map(|sums| f64::from(sums[j])).sum();
        *moment = *moment * s.beta + (sum / rows.len() as f64) as f32 * s.one_minus_beta;
    }

    let row_mean = rows.iter().map(|&moment| f64::from(moment)).sum::<f64>() / rows.len() as f64;
    let mut row_factors: Vec<f32> =
        rows.iter().map(|&moment| (row_mean / f64::from(moment)).sqrt() as f32).collect();
    row_factors.iter_mut().for_each(|factor| *factor *= s.gradient_scale);
    let column_factors: Vec<f32> = columns.iter().map(|moment| 1.0 / moment.sqrt()).collect();

    let squares: Vec<f64> = gradient
        .par_chunks(block)
        .zip(row_factors.par_chunks(block_rows))
        .map(|(gradient, rows)| update_squares(isa, gradient, rows, &column_factors))
        .collect();
    let size = learning_rate_over_rms(squares.into_iter().sum(), gradient.len(), s);
    row_factors.iter_mut().for_each(|factor| *factor *= size);
    value
        .par_chunks_mut(block)
        .zip(gradient.par_chunks(block))
        .zip(row_factors.par_chunks(block_rows))
        .for_each(|((value, gradient), rows)| {
            apply(isa, value, gradient, rows, &column_factors, s.decay);
        });
}

/// A vector is small: plain loops on one thread.
fn vector(value: &mut [f32], gradient: &[f32], second: &mut [f32], s: &Step) {
    let mut update = Vec::with_capacity(gradient.len());
    for (moment, g) in second.iter_mut().zip(gradient) {
        let g = g * s.gradient_scale;
        *moment = *moment * s.beta + (g * g + EPSILON) * s.one_minus_beta;
        update.push(g / moment.sqrt());
    }
    let squares = update.iter().map(|&u| f64::from(u) * f64::from(u)).sum();
    let size = learning_rate_over_rms(squares, gradient.len(), s);
    for (value, update) in value.iter_mut().zip(update) {
        *value = *value * s.decay - size * update;
    }
}

/// lr / max(1, RMS(u)).
fn learning_rate_over_rms(squares: f64, elements: usize, s: &Step) -> f32 {
    let rms = (squares / elements as f64).sqrt();
    (f64::from(s.learning_rate) / rms.max(1.0)) as f32
}

fn primitive(tensor: Tensor<2>) -> FlexTensor {
    contiguous(tensor.try_into_primitive::<Flex>().expect("a tensor on the CPU without autodiff"))
}

/// Takes the tensor out, so that it is held once and can be changed in place.
fn take(tensor: &mut Tensor<2>) -> FlexTensor {
    let placeholder = Tensor::zeros([1, 1], &tensor.device());
    primitive(std::mem::replace(tensor, placeholder))
}
