//! Adds a LoRA adapter into the weight that it adapts: W ← W + scale · B·A (Hu et al. 2021), and
//! with DoRA gives each row of that its magnitude for a length (Liu et al. 2024).
//!
//! Works on a few rows of one tensor at a time, so that a model of any size merges as a stream.

/// The matrices of one adapted projection, row by row, and the factor on their product.
#[derive(Debug, Clone, Copy)]
pub struct LoraFactors<'a> {
    /// A, `[rank, inputs]`.
    pub a: &'a [f32],
    /// B, `[outputs, rank]`.
    pub b: &'a [f32],
    /// Rows of A and columns of B.
    pub rank: usize,
    /// alpha / r, or alpha / √r for rsLoRA.
    pub scale: f32,
    /// DoRA's length of each row, `[outputs]`.
    pub magnitude: Option<&'a [f32]>,
}

/// Sizes that do not fit together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the {part} has {found} elements where [{rows}, {columns}] asks for {}: \
     the adapter was made for another model",
    rows * columns
)]
pub struct MergeError {
    /// Which matrix.
    pub part: &'static str,
    /// Elements that it has.
    pub found: usize,
    /// Rows that it should have.
    pub rows: usize,
    /// Columns that it should have.
    pub columns: usize,
}

/// Adds scale · B·A to some rows of a weight, `[rows, inputs]`; `factors` has those rows of B and of
/// the magnitude alone. With magnitudes each row of the sum is then brought to its magnitude.
///
/// Sums run in f32, and lengths of rows in f64.
///
/// # Errors
/// When a size differs from `[rows, inputs]` and the rank; the weight is then untouched.
pub fn merge_lora_rows(
    weight: &mut [f32],
    inputs: usize,
    factors: &LoraFactors<'_>,
) -> Result<(), MergeError> {
    let &LoraFactors { a, b, rank, scale, magnitude } = factors;
    let rows = weight.len() / inputs.max(1);
    check("weight", weight.len(), rows, inputs)?;
    check("adapter's A", a.len(), rank, inputs)?;
    check("adapter's B", b.len(), rows, rank)?;
    if let Some(magnitude) = magnitude {
        check("adapter's magnitude", magnitude.len(), rows, 1)?;
    }
    if inputs == 0 || rank == 0 {
        return Ok(());
    }
    for (row, (values, b_row)) in
        weight.chunks_exact_mut(inputs).zip(b.chunks_exact(rank)).enumerate()
    {
        merge_row(values, a, b_row, scale, magnitude.map(|magnitude| magnitude[row]));
    }
    Ok(())
}

/// Adds scale · b·A to one row, and brings it to its magnitude.
fn merge_row(row: &mut [f32], a: &[f32], b: &[f32], scale: f32, magnitude: Option<f32>) {
    let mut product = vec![0.0f32; row.len()];
    for (&factor, a_row) in b.iter().zip(a.chunks_exact(row.len())) {
        for (sum, &value) in product.iter_mut().zip(a_row) {
            *sum += factor * value;
        }
    }
    for (value, sum) in row.iter_mut().zip(product) {
        *value += scale * sum;
    }
    if let Some(magnitude) = magnitude {
        let squares: f64 = row.iter().map(|&x| f64::from(x).powi(2)).sum();
        let gain = f64::from(magnitude) / squares.sqrt();
        row.iter_mut().for_each(|value| *value = (f64::from(*value) * gain) as f32);
    }
}

fn check(part: &'static str, found: usize, rows: usize, columns: usize) -> Result<(), MergeError> {
    if found == rows * columns {
        return Ok(());
    }
    Err(MergeError { part, found, rows, columns })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::FloatType;
    use half::{bf16, f16};
    use rand::{RngExt as _, SeedableRng as _};
    use rand_chacha::ChaCha8Rng;

    const OUTPUTS: usize = 5;
    const INPUTS: usize = 7;
    const RANK: usize = 3;
    const SCALE: f32 = 1.5;

    fn numbers(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
        (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    /// The product by its definition, in f64.
    fn naive(weight: &[f32], a: &[f32], b: &[f32]) -> Vec<f64> {
        let element = |o: usize, i: usize| {
            let sum: f64 =
                (0..RANK).map(|k| f64::from(b[o * RANK + k]) * f64::from(a[k * INPUTS + i])).sum();
            f64::from(weight[o * INPUTS + i]) + f64::from(SCALE) * sum
        };
        (0..OUTPUTS)
            .flat_map(|o| (0..INPUTS).map(move |i| (o, i)))
            .map(|(o, i)| element(o, i))
            .collect()
    }

    /// Merges into the stored numbers of a `[rows, inputs]` weight.
    fn merge_stored(
        bytes: &[u8],
        float: FloatType,
        inputs: usize,
        factors: &LoraFactors<'_>,
    ) -> Vec<f32> {
        let mut values = float.decode(bytes);
        merge_lora_rows(&mut values, inputs, factors).expect("sizes fit");
        float.decode(&float.encode(&values).expect("small numbers"))
    }

    /// Merges in `float` and returns the merged numbers beside the exact ones.
    fn merged(float: FloatType, encode: impl Fn(f32) -> Vec<u8>) -> (Vec<f32>, Vec<f64>) {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let (a, b) = (numbers(&mut rng, RANK * INPUTS), numbers(&mut rng, OUTPUTS * RANK));
        let bytes: Vec<u8> =
            numbers(&mut rng, OUTPUTS * INPUTS).into_iter().flat_map(encode).collect();
        let exact = naive(&float.decode(&bytes), &a, &b);
        let factors = LoraFactors { a: &a, b: &b, rank: RANK, scale: SCALE, magnitude: None };
        (merge_stored(&bytes, float, INPUTS, &factors), exact)
    }

    #[test]
    fn f32_equals_the_product_by_its_definition() {
        let (merged, exact) = merged(FloatType::F32, |v| v.to_le_bytes().to_vec());
        for (merged, exact) in merged.into_iter().zip(exact) {
            assert!((f64::from(merged) - exact).abs() < 1e-6, "{merged} against {exact}");
        }
    }

    #[test]
    fn bf16_and_f16_are_the_exact_result_rounded_once() {
        let (halves, exact) = merged(FloatType::Bf16, |v| bf16::from_f32(v).to_le_bytes().to_vec());
        for (merged, exact) in halves.into_iter().zip(exact) {
            assert_eq!(merged, bf16::from_f64(exact).to_f32());
        }
        let (halves, exact) = merged(FloatType::F16, |v| f16::from_f32(v).to_le_bytes().to_vec());
        for (merged, exact) in halves.into_iter().zip(exact) {
            assert_eq!(merged, f16::from_f64(exact).to_f32());
        }
    }

    #[test]
    fn a_tie_goes_to_the_even_number() {
        // 1 + 2⁻⁸ lies halfway between the bf16 numbers 1 and 1 + 2⁻⁷; 1 + 3·2⁻⁸ between
        // 1 + 2⁻⁷ and 1 + 2⁻⁶. The even ones are 1 and 1 + 2⁻⁶.
        for (added, expected) in [(1.0 / 256.0, 1.0), (3.0 / 256.0, 1.0 + 1.0 / 64.0)] {
            let bytes = bf16::ONE.to_le_bytes();
            let factors =
                LoraFactors { a: &[added], b: &[1.0], rank: 1, scale: 1.0, magnitude: None };
            assert_eq!(merge_stored(&bytes, FloatType::Bf16, 1, &factors), [expected]);
        }
    }

    #[test]
    fn an_adapter_of_another_shape_is_refused_and_changes_nothing() {
        let mut weight = [0.0f32; 2];
        let factors = LoraFactors { a: &[1.0; 3], b: &[1.0], rank: 1, scale: 1.0, magnitude: None };
        let error = merge_lora_rows(&mut weight, 2, &factors).expect_err("3 is not 2");
        assert_eq!((error.part, error.found, error.columns), ("adapter's A", 3, 2));
        let factors = LoraFactors { a: &[1.0; 2], magnitude: Some(&[1.0; 2]), ..factors };
        let error = merge_lora_rows(&mut weight, 2, &factors).expect_err("2 is not 1");
        assert_eq!((error.part, error.found, error.rows), ("adapter's magnitude", 2, 1));
        assert_eq!(weight, [0.0; 2]);
    }

    #[test]
    fn each_row_gets_the_length_of_its_magnitude_and_keeps_its_direction() {
        let mut rng = ChaCha8Rng::seed_from_u64(8);
        let (a, b) = (numbers(&mut rng, RANK * INPUTS), numbers(&mut rng, OUTPUTS * RANK));
        let weight = numbers(&mut rng, OUTPUTS * INPUTS);
        let magnitude = numbers(&mut rng, OUTPUTS);
        let sum = naive(&weight, &a, &b);
        let mut merged = weight;
        let factors =
            LoraFactors { a: &a, b: &b, rank: RANK, scale: SCALE, magnitude: Some(&magnitude) };
        merge_lora_rows(&mut merged, INPUTS, &factors).expect("sizes fit");
        for ((row, sum), m) in
            merged.chunks_exact(INPUTS).zip(sum.chunks_exact(INPUTS)).zip(magnitude)
        {
            let length = sum.iter().map(|x| x * x).sum::<f64>().sqrt();
            for (merged, sum) in row.iter().zip(sum) {
                assert!((f64::from(*merged) - f64::from(m) * sum / length).abs() < 1e-6);
            }
        }
    }
}
