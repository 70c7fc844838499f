//! NEFTune: noise on the input embeddings in training (Jain et al. 2023).
//!
//! For a row of L tokens and width d, with u uniform in −1..1, new for every element:
//!
//! ```text
//! y = x + α/√(L·d) · u        dx = dy
//! ```
//!
//! L is the row's own length: there is no padding here that could stretch it. The noise is a pure
//! function of the seed, the step, the row's number and the element, made on the host: it is the
//! same on every device, after a resume, and however rows are packed. Sequences of one row have the
//! same u, as they would if what they have in common were computed once.

use burn::tensor::{Tensor, TensorData};
use rayon::prelude::*;

use super::dropout::{DropoutKey, mix};
use crate::batch::Batch;

/// Parts these numbers from those of the dropout masks of the same seed and step.
const PURPOSE: u64 = 0x6e65_6674_756e_6500;

/// The embeddings `x` `[tokens, width]` of `batch` with the noise of this step.
///
/// # Panics
/// When rows share a beginning: each has noise of its own, so each must be computed whole.
pub(crate) fn with_noise(x: Tensor<2>, alpha: f64, key: DropoutKey, batch: &Batch) -> Tensor<2> {
    let [tokens, width] = x.dims();
    let is_whole = batch.segments.iter().all(|segment| segment.prefix.is_empty());
    assert!(is_whole && batch.segments.len() == batch.rows.len(), "rows with noise share nothing");
    let mut noise = vec![0.0; tokens * width];
    for (segment, &row) in batch.segments.iter().zip(&batch.rows) {
        let segment = &segment.tokens;
        let scale = (alpha / ((segment.len() * width) as f64).sqrt()) as f32;
        let stream = stream(key, row);
        noise[segment.start * width..segment.end * width]
            .par_chunks_mut(width)
            .enumerate()
            .for_each(|(token, values)| {
                for (column, value) in values.iter_mut().enumerate() {
                    *value = scale * uniform(stream, token * width + column);
                }
            });
    }
    let noise = TensorData::new(noise, [tokens, width]);
    let noise: Tensor<2> = Tensor::from_data(noise, &x.device().inner());
    x + noise.autodiff()
}

fn stream(key: DropoutKey, row: usize) -> u64 {
    [PURPOSE, key.step, row as u64]
        .into_iter()
        .fold(mix(key.seed), |state, part| mix(state ^ mix(part)))
}

/// Element number `index` of a stream, in −1..1, as probable as its negative.
#[inline]
fn uniform(stream: u64, index: usize) -> f32 {
    // 23 bits and a half: exact in the 24 of an f32.
    let bits = mix(stream.wrapping_add(index as u64)) >> 41;
    (bits as f32 + 0.5) * (1.0 / (1 << 22) as f32) - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Segment;
    use crate::ops::testing::random;
    use crate::parameter::read;

    const KEY: DropoutKey = DropoutKey { seed: 7, step: 3, micro_batch: 0 };
    const WIDTH: usize = 64;

    fn batch(rows: &[(usize, usize)]) -> Batch {
        let mut batch = Batch::default();
        for &(row, length) in rows {
            let start = batch.ids.len();
            batch.ids.resize(start + length, 0);
            batch.weights.resize(start + length, 1.0);
            batch.segments.push(Segment::whole(start..start + length));
            batch.rows.push(row);
        }
        batch
    }

    /// The noise of each row of a batch.
    fn noise(alpha: f64, key: DropoutKey, rows: &[(usize, usize)]) -> Vec<Vec<f32>> {
        let batch = batch(rows);
        let zeros = random([batch.ids.len(), WIDTH], 1).zeros_like();
        let values = read(with_noise(zeros, alpha, key, &batch)).unwrap();
        let row = |segment: &Segment| {
            values[segment.tokens.start * WIDTH..segment.tokens.end * WIDTH].to_vec()
        };
        batch.segments.iter().map(row).collect()
    }

    #[test]
    fn noise_is_uniform_within_alpha_over_the_root_of_the_rows_own_elements() {
        for (noise, length) in noise(5.0, KEY, &[(0, 100), (1, 400)]).iter().zip([100, 400]) {
            let bound = 5.0 / ((length * WIDTH) as f64).sqrt();
            let n = noise.len() as f64;
            let mean = noise.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
            let variance = noise.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n;
            let greatest = noise.iter().fold(0f32, |most, x| most.max(x.abs()));
            assert!(mean.abs() < 0.03 * bound, "{mean}");
            // Uniform in ±b has the variance b²/3.
            assert!((variance / (bound * bound / 3.0) - 1.0).abs() < 0.03, "{variance}");
            assert!(f64::from(greatest) <= bound * 1.000_001 && f64::from(greatest) > 0.99 * bound);
        }
    }

    #[test]
    fn a_rows_noise_depends_on_seed_step_and_row_and_not_on_how_rows_are_packed() {
        let here = noise(5.0, KEY, &[(4, 9), (2, 5)]);
        assert_eq!(noise(5.0, DropoutKey { micro_batch: 6, ..KEY }, &[(2, 5)])[0], here[1]);
        assert_eq!(noise(5.0, KEY, &[(2, 5), (7, 3), (4, 9)])[2], here[0]);
        for (key, row) in
            [(DropoutKey { seed: 8, ..KEY }, 4), (DropoutKey { step: 4, ..KEY }, 4), (KEY, 5)]
        {
            let other = noise(5.0, key, &[(row, 9)]);
            let equal = other[0].iter().zip(&here[0]).filter(|(a, b)| a == b).count();
            assert!(equal < 5, "{key:?} {row}: {equal}");
        }
    }

    #[test]
    fn gradient_passes_through_unchanged() {
        let x = random([5, WIDTH], 2).autodiff().require_grad();
        let upstream = random([5, WIDTH], 3);
        let y = with_noise(x.clone(), 5.0, KEY, &batch(&[(0, 2), (1, 3)]));
        let gradients = (y * upstream.clone().autodiff()).sum().backward();
        assert_eq!(read(x.grad(&gradients).unwrap()).unwrap(), read(upstream).unwrap());
    }
}
