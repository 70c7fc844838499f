//! PiSSA: an adapter that starts as the principal part of its weight (Meng et al. 2024).
//!
//! With W ≈ U·S·Vᵀ by its r leading singular triplets and s the adapter's scale,
//!
//! ```text
//! A₀ = √(S/s)·Vᵀ,  B₀ = U·√(S/s),  W ← W − s·B₀·A₀
//! ```
//!
//! so the model starts as the base model, and the directions that matter most train. After training
//! the change of the weight is s·(B·A − B₀·A₀): a LoRA of twice the rank on the original W. A
//! checkpoint is that LoRA, so a run that goes on finds A₀ and B₀ in it and decomposes nothing.
//!
//! The triplets come from subspace iteration (Halko, Martinsson and Tropp 2011): a random start of
//! k > r columns is multiplied by W and Wᵀ in turn, orthonormal in between, and the small matrix
//! that is left is decomposed. Where k reaches W's smaller side this is exact.

use burn::tensor::{Device, Tensor, TensorData};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::error::EngineError;
use crate::ops::product::product;
use crate::parameter::{NamedTensor, read};

/// Columns beyond r, at least; r more where that is greater.
const OVERSAMPLING: usize = 32;
/// Times that W·Wᵀ is applied.
const ITERATIONS: usize = 6;
/// Sweeps of Jacobi rotations; they converge quadratically, mostly in 6 to 10.
const MAX_SWEEPS: usize = 40;

/// Where the adapter of one module starts.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Start {
    /// A₀ `[r, in]`.
    pub(crate) a: Vec<f32>,
    /// B₀ `[out, r]`.
    pub(crate) b: Vec<f32>,
}

/// The principal part of `weight`, a matrix `[outputs, inputs]`, by `rank`. The same `seed` and
/// `stream` give the same numbers.
///
/// # Errors
/// [`EngineError::Device`] when the device fails.
pub(crate) fn principal(
    weight: &[f32],
    [outputs, inputs]: [usize; 2],
    rank: usize,
    scale: f32,
    (seed, stream): (u64, u64),
    device: &Device,
) -> Result<Start, EngineError> {
    let matrix = |values, shape| matrix(values, shape, device);
    let width = (rank + rank.max(OVERSAMPLING)).min(outputs).min(inputs);
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    generator.set_stream(stream);
    let start: Vec<f32> = (0..inputs * width).map(|_| generator.random_range(-1.0..1.0)).collect();

    let w = matrix(weight.to_vec(), [outputs, inputs]);
    let orthonormal = |tensor: Tensor<2>| -> Result<Tensor<2>, EngineError> {
        let rows = tensor.dims()[0];
        Ok(matrix(orthonormal(&read(tensor)?, rows, width), [rows, width]))
    };
    let mut q = orthonormal(product(w.clone(), matrix(start, [inputs, width])))?;
    for _ in 0..ITERATIONS {
        let z = orthonormal(product(w.clone().transpose(), q))?;
        q = orthonormal(product(w.clone(), z))?;
    }

    // W ≈ Q·C; C·Cᵀ = E·Λ·Eᵀ gives S = √Λ, U = Q·E and Vᵀ = S⁻¹·Eᵀ·C.
    let c = product(q.clone().transpose(), w.clone());
    let (values, vectors) = symmetric_eigen(gram(&read(c.clone())?, width, inputs), width);
    let mut order: Vec<usize> = (0..width).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    order.truncate(rank);
    let smallest = f64::EPSILON * order.first().map_or(0.0, |&first| values[first]);
    // A rank beyond the weight's own has columns of zeros.
    let column = |power: f64| -> Vec<f32> {
        let mut columns = vec![0f32; width * rank];
        for (position, &eigen) in order.iter().enumerate().filter(|(_, e)| values[**e] > smallest) {
            let factor = values[eigen].sqrt().powf(power) / f64::from(scale).sqrt();
            for row in 0..width {
                columns[row * rank + position] = (factor * vectors[row * width + eigen]) as f32;
            }
        }
        columns
    };
    let b = product(q, matrix(column(0.5), [width, rank]));
    let a = product(matrix(column(-0.5), [width, rank]).transpose(), c);
    Ok(Start { a: read(a)?, b: read(b)? })
}

/// W − s·B₀·A₀, of `weight` `[outputs, inputs]`: what stays frozen.
///
/// # Errors
/// [`EngineError::Device`] when the device fails.
pub(crate) fn residual(
    weight: Vec<f32>,
    [outputs, inputs]: [usize; 2],
    start: &Start,
    scale: f32,
    device: &Device,
) -> Result<Vec<f32>, EngineError> {
    let rank = start.a.len() / inputs.max(1);
    let a = matrix(start.a.clone(), [rank, inputs], device);
    let b = matrix(start.b.clone(), [outputs, rank], device);
    read(matrix(weight, [outputs, inputs], device) - product(b, a).mul_scalar(scale))
}

fn matrix(values: Vec<f32>, shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// Columns of the same span as those of `values` `[rows, width]`, each of length 1 and at right
/// angles to the others: modified Gram-Schmidt in f64. A column without a part of its own is 0.
fn orthonormal(values: &[f32], rows: usize, width: usize) -> Vec<f32> {
    let mut columns: Vec<Vec<f64>> = (0..width)
        .map(|column| (0..rows).map(|row| f64::from(values[row * width + column])).collect())
        .collect();
    let lengths: Vec<f64> = columns.iter().map(|column| dot(column, column).sqrt()).collect();
    for done in 0..width {
        let Some((column, rest)) = columns[done..].split_first_mut() else { break };
        let length = dot(column, column).sqrt();
        // What rounding left of a column that depends on the others says nothing.
        let factor = if length > 1e-10 * lengths[done] { 1.0 / length } else { 0.0 };
        column.iter_mut().for_each(|value| *value *= factor);
        rest.par_iter_mut().for_each(|other| project_out(column, other));
    }
    let mut result = vec![0f32; rows * width];
    for (column, values) in columns.iter().enumerate() {
        for (row, &value) in values.iter().enumerate() {
            result[row * width + column] = value as f32;
        }
    }
    result
}

/// Takes from `column` its part along `unit`.
fn project_out(unit: &[f64], column: &mut [f64]) {
    let along = dot(unit, column);
    for (value, unit) in column.iter_mut().zip(unit) {
        *value -= along * unit;
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// C·Cᵀ of `values` `[rows, columns]`, in f64.
fn gram(values: &[f32], rows: usize, columns: usize) -> Vec<f64> {
    let row = |row: usize| &values[row * columns..(row + 1) * columns];
    (0..rows * rows)
        .into_par_iter()
        .map(|n| {
            row(n / rows)
                .iter()
                .zip(row(n % rows))
                .map(|(&a, &b)| f64::from(a) * f64::from(b))
                .sum()
        })
        .collect()
}

/// Eigenvalues, and eigenvectors as columns, of a symmetric matrix, by cyclic Jacobi rotations
/// (Golub and Van Loan, Matrix Computations, 8.5).
fn symmetric_eigen(mut matrix: Vec<f64>, size: usize) -> (Vec<f64>, Vec<f64>) {
    let mut vectors = vec![0.0; size * size];
    for i in 0..size {
        vectors[i * size + i] = 1.0;
    }
    let norm = matrix.iter().map(|x| x * x).sum::<f64>().sqrt();
    for _ in 0..MAX_SWEEPS {
        let mut is_diagonal = true;
        for p in 0..size {
            for q in p + 1..size {
                let (app, aqq) = (matrix[p * size + p], matrix[q * size + q]);
                let apq = matrix[p * size + q];
                // What rounding leaves beside these two says nothing.
                let least = (app * aqq).abs().sqrt().max(f64::EPSILON * norm);
                if apq.abs() <= f64::EPSILON * least {
                    continue;
                }
                is_diagonal = false;
                let tau = (aqq - app) / (2.0 * apq);
                let t = tau.signum() / (tau.abs() + (1.0 + tau * tau).sqrt());
                let cos = 1.0 / (1.0 + t * t).sqrt();
                let sin = t * cos;
                for k in 0..size {
                    rotate(&mut matrix, k * size + p, k * size + q, cos, sin);
                }
                for k in 0..size {
                    rotate(&mut matrix, p * size + k, q * size + k, cos, sin);
                }
                for k in 0..size {
                    rotate(&mut vectors, k * size + p, k * size + q, cos, sin);
                }
            }
        }
        if is_diagonal {
            break;
        }
    }
    ((0..size).map(|i| matrix[i * size + i]).collect(), vectors)
}

fn rotate(values: &mut [f64], p: usize, q: usize, cos: f64, sin: f64) {
    let (x, y) = (values[p], values[q]);
    values[p] = cos * x - sin * y;
    values[q] = sin * x + cos * y;
}

/// A and B `tensors` of a PiSSA adapter as a plain LoRA of twice the rank on the original weights:
/// A over A₀, and B beside −B₀, where `initial` has A₀ and B₀ in the same order.
pub(crate) fn with_initial(tensors: Vec<NamedTensor>, initial: &[NamedTensor]) -> Vec<NamedTensor> {
    let join = |(mut tensor, initial): (NamedTensor, &NamedTensor)| {
        if is_b(&tensor) {
            let rank = tensor.shape[1];
            let rows = tensor.data.chunks(rank).zip(initial.data.chunks(rank));
            tensor.data = rows
                .flat_map(|(row, initial)| row.iter().copied().chain(initial.iter().map(|x| -x)))
                .collect();
            tensor.shape[1] = 2 * rank;
        } else {
            tensor.data.extend(&initial.data);
            tensor.shape[0] *= 2;
        }
        tensor
    };
    tensors.into_iter().zip(initial).map(join).collect()
}

/// The inverse: A and B, and the A₀ and B₀ behind them.
pub(crate) fn without_initial(
    tensors: Vec<NamedTensor>,
) -> Result<(Vec<NamedTensor>, Vec<NamedTensor>), EngineError> {
    let split = |mut tensor: NamedTensor| {
        let rank_axis = usize::from(is_b(&tensor));
        if tensor.shape.len() != 2 || !tensor.shape[rank_axis].is_multiple_of(2) {
            return Err(EngineError::Checkpoint(format!(
                "tensor {} has shape {:?}, which is no PiSSA adapter's of twice the rank",
                tensor.name, tensor.shape
            )));
        }
        let mut initial = tensor.clone();
        tensor.shape[rank_axis] /= 2;
        initial.shape[rank_axis] /= 2;
        if rank_axis == 1 {
            let rank = tensor.shape[1];
            let rows = || initial.data.chunks(2 * rank);
            tensor.data = rows().flat_map(|row| &row[..rank]).copied().collect();
            initial.data = rows().flat_map(|row| &row[rank..]).map(|x| -x).collect();
        } else {
            initial.data = tensor.data.split_off(tensor.data.len() / 2);
        }
        Ok((tensor, initial))
    };
    tensors.into_iter().map(split).collect()
}

fn is_b(tensor: &NamedTensor) -> bool {
    tensor.name.ends_with("lora_B.weight")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(length: usize, seed: u64) -> Vec<f32> {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        (0..length).map(|_| generator.random_range(-1.0..1.0)).collect()
    }

    /// Σₖ a[i, k]·b[k, j].
    fn product(a: &[f32], b: &[f32], [rows, inner, columns]: [usize; 3]) -> Vec<f64> {
        (0..rows * columns)
            .map(|n| {
                let (i, j) = (n / columns, n % columns);
                (0..inner)
                    .map(|k| f64::from(a[i * inner + k]) * f64::from(b[k * columns + j]))
                    .sum()
            })
            .collect()
    }

    fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
        (0..columns).flat_map(|j| values[j..].iter().step_by(columns)).copied().collect()
    }

    /// A₀ and B₀ of a weight, and what is left of it.
    fn split(weight: &[f32], shape: [usize; 2], rank: usize, scale: f32) -> (Start, Vec<f32>) {
        let device = Device::flex();
        let start = principal(weight, shape, rank, scale, (3, 1), &device).unwrap();
        let rest = residual(weight.to_vec(), shape, &start, scale, &device).unwrap();
        (start, rest)
    }

    #[test]
    fn principal_part_and_rest_are_the_weight_and_at_right_angles() {
        for shape in [[30, 20], [20, 30], [200, 150]] {
            let [outputs, inputs] = shape;
            let weight = random(outputs * inputs, 1);
            let (Start { a, b }, rest) = split(&weight, shape, 4, 0.5);
            let part = product(&b, &a, [outputs, 4, inputs]);
            for ((part, rest), weight) in part.iter().zip(&rest).zip(&weight) {
                assert!((0.5 * part + f64::from(*rest) - f64::from(*weight)).abs() < 1e-5);
            }
            // Nothing of the rest lies along a column of B, nor, where the subspace is the whole
            // space, along a row of A.
            let across = product(&transposed(&b, 4), &rest, [4, outputs, inputs]);
            assert!(across.iter().all(|x| x.abs() < 1e-4));
            let along = product(&a, &transposed(&rest, inputs), [4, inputs, outputs]);
            assert!(outputs.min(inputs) > 100 || along.iter().all(|x| x.abs() < 1e-4));
            // The rows of A and the columns of B have the same lengths, √(S/s), in falling order.
            let lengths: Vec<f64> = a
                .chunks(inputs)
                .map(|row| row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt())
                .collect();
            assert!(lengths.windows(2).all(|pair| pair[0] >= pair[1]), "{lengths:?}");
            for (column, length) in lengths.iter().enumerate() {
                let squares: f64 = b.chunks(4).map(|row| f64::from(row[column]).powi(2)).sum();
                assert!((squares.sqrt() / length - 1.0).abs() < 1e-4, "{squares} {length}");
            }
        }
    }

    #[test]
    fn weight_of_low_rank_is_its_own_principal_part() {
        let (b, a) = (random(300 * 3, 1), random(3 * 250, 2));
        let weight: Vec<f32> =
            product(&b, &a, [300, 3, 250]).into_iter().map(|x| x as f32).collect();
        // Rank 5 is more than there is: the last two rows are what rounding left.
        let (Start { a, .. }, rest) = split(&weight, [300, 250], 5, 2.0);
        assert!(rest.iter().all(|x| x.abs() < 1e-5));
        assert!(a.iter().all(|x| x.is_finite()));
    }

    #[test]
    fn same_seed_gives_the_same_bits() {
        let weight = random(90 * 70, 4);
        assert_eq!(split(&weight, [90, 70], 3, 1.0), split(&weight, [90, 70], 3, 1.0));
    }

    #[test]
    fn doubled_rank_gives_back_both_halves() {
        let tensor = |name: &str, shape: [usize; 2], seed| NamedTensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
            data: random(shape[0] * shape[1], seed),
        };
        let pair = |seed| {
            vec![
                tensor("x.lora_A.weight", [2, 5], seed),
                tensor("x.lora_B.weight", [3, 2], seed + 1),
            ]
        };
        let (trained, initial) = (pair(1), pair(3));
        let doubled = with_initial(trained.clone(), &initial);
        assert_eq!((&doubled[0].shape, &doubled[1].shape), (&vec![4, 5], &vec![3, 4]));
        let change = product(&doubled[1].data, &doubled[0].data, [3, 4, 5]);
        let [after, before] =
            [&trained, &initial].map(|pair| product(&pair[1].data, &pair[0].data, [3, 2, 5]));
        for ((change, after), before) in change.iter().zip(after).zip(before) {
            assert!((change - (after - before)).abs() < 1e-12);
        }
        assert_eq!(without_initial(doubled).unwrap(), (trained, initial));
    }
}
