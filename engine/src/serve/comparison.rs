//! How far the logits of two models lie from each other.

use rayon::prelude::*;
use tunesmith_core::export_check::Comparison;
use tunesmith_core::weights::FloatType;

use super::choice::most_likely;

/// Sums up a [`Comparison`], one text at a time. Sums are in f64 and in the order of the positions.
#[derive(Debug, Default)]
pub(super) struct Comparer {
    texts: usize,
    positions: usize,
    max_abs_error: f64,
    error_squares: f64,
    squares: f64,
    agreements: usize,
    divergence: f64,
}

/// What one position adds.
struct Position {
    max_abs_error: f64,
    error_squares: f64,
    squares: f64,
    agrees: bool,
    divergence: f64,
}

impl Comparer {
    /// Takes the logits of every position of a text.
    ///
    /// # Errors
    /// Logits that are not numbers, or of another number of tokens.
    pub(super) fn add(&mut self, served: &[Vec<f32>], export: &[Vec<f32>]) -> Result<(), String> {
        let positions: Vec<Result<Position, String>> =
            served.par_iter().zip(export).map(|(served, export)| compare(served, export)).collect();
        for (index, position) in positions.into_iter().enumerate() {
            let position = position
                .map_err(|reason| format!("{reason} (text {}, token {index})", self.texts))?;
            self.positions += 1;
            self.max_abs_error = self.max_abs_error.max(position.max_abs_error);
            self.error_squares += position.error_squares;
            self.squares += position.squares;
            self.agreements += usize::from(position.agrees);
            self.divergence += position.divergence;
        }
        self.texts += 1;
        Ok(())
    }

    /// The comparison of an export whose narrowest floats are `numbers`.
    pub(super) fn finish(self, numbers: Option<FloatType>) -> Comparison {
        let positions = self.positions.max(1) as f64;
        Comparison {
            texts: self.texts,
            positions: self.positions,
            max_abs_error: self.max_abs_error,
            relative_error: (self.error_squares / self.squares.max(f64::MIN_POSITIVE)).sqrt(),
            argmax_agreement: self.agreements as f64 / positions,
            // Rounding can take it below 0.
            mean_kl: (self.divergence / positions).max(0.0),
            numbers,
        }
    }
}

fn compare(served: &[f32], export: &[f32]) -> Result<Position, String> {
    if served.len() != export.len() {
        let (ours, theirs) = (served.len(), export.len());
        return Err(format!("it knows {theirs} tokens and the served model {ours}"));
    }
    for (logits, whose) in [(served, "the served model"), (export, "the export")] {
        if !logits.iter().all(|logit| logit.is_finite()) {
            return Err(format!("{whose} has logits that are not numbers"));
        }
    }
    let (served_log_sum, export_log_sum) = (log_sum_exp(served), log_sum_exp(export));
    let (served_mean, export_mean) = (mean(served), mean(export));
    let mut found = Position {
        max_abs_error: 0.0,
        error_squares: 0.0,
        squares: 0.0,
        agrees: most_likely(served, 1) == most_likely(export, 1),
        divergence: 0.0,
    };
    for (&s, &e) in served.iter().zip(export) {
        let (s, e) = (f64::from(s), f64::from(e));
        found.max_abs_error = found.max_abs_error.max((e - s).abs());
        let centred = s - served_mean;
        found.error_squares += (e - export_mean - centred).powi(2);
        found.squares += centred.powi(2);
        let (log_p, log_q) = (s - served_log_sum, e - export_log_sum);
        found.divergence += log_p.exp() * (log_p - log_q);
    }
    Ok(found)
}

fn mean(logits: &[f32]) -> f64 {
    logits.iter().copied().map(f64::from).sum::<f64>() / logits.len().max(1) as f64
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let most = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    logits.iter().map(|&logit| (f64::from(logit) - most).exp()).sum::<f64>().ln() + most
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compared(served: &[&[f32]], export: &[&[f32]]) -> Result<Comparison, String> {
        let owned = |rows: &[&[f32]]| rows.iter().map(|row| row.to_vec()).collect::<Vec<_>>();
        let mut comparer = Comparer::default();
        comparer.add(&owned(served), &owned(export))?;
        Ok(comparer.finish(None))
    }

    #[test]
    fn equal_logits_have_no_error() {
        let logits: &[&[f32]] = &[&[1.0, -2.0, 30.0]];
        let comparison = compared(logits, logits).expect("numbers");
        assert_eq!((comparison.max_abs_error, comparison.relative_error), (0.0, 0.0));
        assert_eq!((comparison.argmax_agreement, comparison.mean_kl), (1.0, 0.0));
        assert_eq!((comparison.texts, comparison.positions), (1, 1));
    }

    #[test]
    fn errors_are_those_of_sums_done_by_hand() {
        // Softmax of (0, ln 3) is (1/4, 3/4), and that of (ln 3, 0) is (3/4, 1/4).
        let ln_3 = 3f32.ln();
        let comparison = compared(&[&[0.0, ln_3], &[0.0, ln_3]], &[&[0.0, ln_3], &[ln_3, 0.0]])
            .expect("numbers");
        assert!((comparison.max_abs_error - f64::from(ln_3)).abs() < 1e-12);
        assert_eq!(comparison.argmax_agreement, 0.5);
        // Around its mean a position is ±ln 3 / 2; the second one's error is ∓ln 3.
        assert!((comparison.relative_error - 2f64.sqrt()).abs() < 1e-6);
        // 1/4·ln(1/3) + 3/4·ln 3, over two positions.
        assert!((comparison.mean_kl - 0.25 * 3f64.ln()).abs() < 1e-6, "{comparison:?}");
    }

    #[test]
    fn what_is_added_to_all_logits_of_a_position_is_no_relative_error() {
        let comparison = compared(&[&[1.0, 2.0, 4.0]], &[&[6.0, 7.0, 9.0]]).expect("numbers");
        assert_eq!(comparison.max_abs_error, 5.0);
        assert!(comparison.relative_error < 1e-12 && comparison.mean_kl < 1e-12);
    }

    #[test]
    fn logits_that_cannot_be_compared_say_whose_they_are_and_where() {
        let error = compared(&[&[0.0, 1.0], &[0.0, 1.0]], &[&[0.0, 1.0], &[0.0, f32::NAN]])
            .expect_err("no number");
        assert_eq!(error, "the export has logits that are not numbers (text 0, token 1)");
        let error = compared(&[&[f32::INFINITY, 1.0]], &[&[0.0, 1.0]]).expect_err("no number");
        assert!(error.starts_with("the served model"), "{error}");
        let error = compared(&[&[0.0]], &[&[0.0, 1.0]]).expect_err("another vocabulary");
        assert!(error.starts_with("it knows 2 tokens and the served model 1"), "{error}");
    }
}
