//! The inner loops of attention.

use std::ops::Range;

use crate::ops::attention::Scores;
use crate::ops::cpu::isa::simd_kernels;
use crate::ops::cpu::math::{dot, exp, max, sum, tanh};

/// Some consecutive queries of a unit, and the keys from the first that one of them sees up to
/// the last of them.
#[derive(Clone, Copy)]
pub(super) struct Block {
    /// Columns of the scores.
    pub(super) keys: usize,
    /// The column of the first row's own key; row r sees the `window` keys up to column
    /// `first_position + r`, and what lies before or after these becomes 0.
    pub(super) first_position: usize,
    /// λ.
    pub(super) scale: f32,
    /// c.
    pub(super) softcap: Option<f32>,
    /// `usize::MAX` for none.
    pub(super) window: usize,
}

impl Block {
    /// That of queries from position `first` on, over the keys of the positions `keys`.
    pub(super) fn new(scores: Scores, first: usize, keys: &Range<usize>) -> Self {
        Self {
            keys: keys.len(),
            first_position: first - keys.start,
            scale: scores.scale,
            softcap: scores.softcap,
            window: scores.window.unwrap_or(usize::MAX),
        }
    }

    /// The columns that row `row` sees.
    #[inline(always)]
    fn seen(self, row: usize) -> Range<usize> {
        let end = self.first_position + row + 1;
        end.saturating_sub(self.window)..end
    }
}

simd_kernels! {
    /// One head of one token: y = R·x, where `sin` gives R's direction. Elements behind the pairs
    /// of the table stay as they are.
    pub(super) fn rotate(x: &[f32], cos: &[f32], sin: &[f32], y: &mut [f32]) {
        let half = cos.len();
        y[2 * half..].copy_from_slice(&x[2 * half..]);
        let (cos, sin) = (&cos[..half], &sin[..half]);
        let (x0, x1) = (&x[..half], &x[half..2 * half]);
        let (y0, y1) = y[..2 * half].split_at_mut(half);
        for i in 0..half {
            y0[i] = x0[i] * cos[i] - x1[i] * sin[i];
            y1[i] = x1[i] * cos[i] + x0[i] * sin[i];
        }
    }

    /// One head of one token: y = Rᵀ·x.
    pub(super) fn rotate_back(x: &[f32], cos: &[f32], sin: &[f32], y: &mut [f32]) {
        let half = cos.len();
        y[2 * half..].copy_from_slice(&x[2 * half..]);
        let (cos, sin) = (&cos[..half], &sin[..half]);
        let (x0, x1) = (&x[..half], &x[half..2 * half]);
        let (y0, y1) = y[..2 * half].split_at_mut(half);
        for i in 0..half {
            y0[i] = x0[i] * cos[i] + x1[i] * sin[i];
            y1[i] = x1[i] * cos[i] - x0[i] * sin[i];
        }
    }

    /// Turns rows of q̂·k̂ᵀ into rows of P, and gives log Σ exp of each.
    pub(super) fn causal_softmax(block: Block, scores: &mut [f32], log_sum: &mut [f32]) {
        for (r, (row, log_sum)) in scores.chunks_exact_mut(block.keys).zip(log_sum).enumerate() {
            let columns = block.seen(r);
            let (seen, future) = row.split_at_mut(columns.end);
            let (past, seen) = seen.split_at_mut(columns.start);
            past.fill(0.0);
            let mut scale = block.scale;
            if let Some(cap) = block.softcap {
                for score in seen.iter_mut() {
                    *score = cap * tanh::<M>(*score * (scale / cap));
                }
                scale = 1.0;
            }
            let greatest = max(seen) * scale;
            for score in seen.iter_mut() {
                *score = exp::<M>(M::mul_add(*score, scale, -greatest));
            }
            let total = sum(seen);
            *log_sum = greatest + total.ln();
            let inverse = 1.0 / total;
            for probability in seen.iter_mut() {
                *probability *= inverse;
            }
            future.fill(0.0);
        }
    }

    /// Turns rows of q̂·k̂ᵀ into rows of P, and rows of dP into rows of dS. `inner` is ⟨do, o⟩.
    pub(super) fn causal_softmax_backward(
        block: Block, scores: &mut [f32], d_scores: &mut [f32], log_sum: &[f32], inner: &[f32],
    ) {
        let keys = block.keys;
        let rows = scores.chunks_exact_mut(keys).zip(d_scores.chunks_exact_mut(keys));
        for (r, ((p, ds), (&log_sum, &inner))) in rows.zip(log_sum.iter().zip(inner)).enumerate() {
            let columns = block.seen(r);
            let (p, p_future) = p.split_at_mut(columns.end);
            let (ds, ds_future) = ds.split_at_mut(columns.end);
            let (p_past, p) = p.split_at_mut(columns.start);
            let (ds_past, ds) = ds.split_at_mut(columns.start);
            let ds = &mut ds[..p.len()];
            if let Some(cap) = block.softcap {
                for i in 0..p.len() {
                    let capped = tanh::<M>(p[i] * (block.scale / cap));
                    let probability = exp::<M>(M::mul_add(cap, capped, -log_sum));
                    p[i] = probability;
                    ds[i] = probability * (ds[i] - inner) * block.scale * (1.0 - capped * capped);
                }
            } else {
                for i in 0..p.len() {
                    let probability = exp::<M>(M::mul_add(p[i], block.scale, -log_sum));
                    p[i] = probability;
                    ds[i] = probability * (ds[i] - inner) * block.scale;
                }
            }
            for hidden in [p_past, p_future, ds_past, ds_future] {
                hidden.fill(0.0);
            }
        }
    }

    /// ⟨x, y⟩.
    pub(super) fn inner_product(x: &[f32], y: &[f32]) -> f32 {
        dot::<M>(x, y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::isa::Isa;

    fn wave(n: usize, speed: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * speed).sin() * 3.0).collect()
    }

    #[test]
    fn rotation_turns_half_pairs_and_back_on_every_path() {
        let (x, angles) = (wave(20, 0.7), wave(10, 0.4));
        let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
        for isa in Isa::available() {
            let (mut y, mut back) = ([0.0; 20], [0.0; 20]);
            rotate(isa, &x, &cos, &sin, &mut y);
            rotate_back(isa, &y, &cos, &sin, &mut back);
            for i in 0..10 {
                let (first, second) = (f64::from(x[i]), f64::from(x[i + 10]));
                let (sin, cos) = f64::from(angles[i]).sin_cos();
                assert!((f64::from(y[i]) - (first * cos - second * sin)).abs() < 1e-6, "{isa:?}");
                let expected = second * cos + first * sin;
                assert!((f64::from(y[i + 10]) - expected).abs() < 1e-6, "{isa:?}");
            }
            assert!(x.iter().zip(back).all(|(x, back)| (x - back).abs() < 1e-5), "{isa:?}");
        }
    }

    #[test]
    fn softmax_and_its_gradient_have_the_values_of_f64_on_every_path() {
        // Queries 40 to 44, so that rows are longer than one vector.
        let (queries, first_position, scale) = (5, 40, 0.3);
        let keys = first_position + queries;
        let (scores, d_p) = (wave(queries * keys, 0.9), wave(queries * keys, 0.35));
        let inner = wave(queries, 0.5);
        let kinds =
            [(None, usize::MAX), (None, 37), (Some(0.5), usize::MAX), (Some(0.5), 37), (None, 1)];
        for (isa, (softcap, window)) in
            Isa::available().into_iter().flat_map(|isa| kinds.map(|kind| (isa, kind)))
        {
            let block = Block { keys, first_position, scale, softcap, window };
            let (mut p, mut log_sum) = (scores.clone(), vec![0.0; queries]);
            causal_softmax(isa, block, &mut p, &mut log_sum);
            let (mut p_again, mut ds) = (scores.clone(), d_p.clone());
            causal_softmax_backward(isa, block, &mut p_again, &mut ds, &log_sum, &inner);
            for row in 0..queries {
                let end = first_position + row + 1;
                let seen = end.saturating_sub(window)..end;
                // The score that the softmax sees, and its slope.
                let score = |key: usize| {
                    let score = f64::from(scores[row * keys + key]) * f64::from(scale);
                    match softcap.map(f64::from) {
                        Some(cap) => {
                            (cap * (score / cap).tanh(), 1.0 - (score / cap).tanh().powi(2))
                        }
                        None => (score, 1.0),
                    }
                };
                let total: f64 = seen.clone().map(|key| score(key).0.exp()).sum();
                assert!((f64::from(log_sum[row]) - total.ln()).abs() < 1e-5, "{isa:?}");
                for key in 0..keys {
                    let i = row * keys + key;
                    let (score, slope) = score(key);
                    let expected_p = if seen.contains(&key) { score.exp() / total } else { 0.0 };
                    let d_score = expected_p * (f64::from(d_p[i]) - f64::from(inner[row]));
                    let expected_ds = d_score * slope * f64::from(scale);
                    assert!((f64::from(p[i]) - expected_p).abs() < 1e-6, "{isa:?}");
                    assert!((f64::from(p_again[i]) - expected_p).abs() < 1e-6, "{isa:?}");
                    assert!((f64::from(ds[i]) - expected_ds).abs() < 1e-6, "{isa:?}");
                }
            }
        }
    }
}
