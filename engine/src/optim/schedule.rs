//! The learning rate of each step, as a pure function: a resumed run asks for the step it is at.

use std::f64::consts::PI;

use tunesmith_core::hyperparameters::LrScheduler;

/// Factor on the peak learning rate for update number `step` (0-based) of `total`.
///
/// As in Hugging Face's `get_{constant,linear,cosine}_schedule_with_warmup`: with W warm-up steps
/// the factor is `step / W` while `step < W`; after that, with
/// `progress = (step − W) / (total − W)`, it is 1, `1 − progress` or `(1 + cos(π·progress)) / 2`.
/// The first step of a warm-up thus has a rate of 0, and step `total` would have 0 again.
#[must_use]
pub fn learning_rate_factor(
    scheduler: LrScheduler,
    step: u64,
    warmup_steps: u64,
    total: u64,
) -> f64 {
    if step < warmup_steps {
        return step as f64 / warmup_steps as f64;
    }
    let decay_steps = total.saturating_sub(warmup_steps).max(1);
    let progress = ((step - warmup_steps) as f64 / decay_steps as f64).min(1.0);
    match scheduler {
        LrScheduler::Constant => 1.0,
        LrScheduler::Linear => 1.0 - progress,
        LrScheduler::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors(scheduler: LrScheduler, warmup_steps: u64, total: u64) -> Vec<f64> {
        (0..=total).map(|step| learning_rate_factor(scheduler, step, warmup_steps, total)).collect()
    }

    #[test]
    fn warm_up_rises_from_zero_to_the_peak() {
        assert_eq!(factors(LrScheduler::Constant, 4, 6), [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]);
    }

    #[test]
    fn linear_falls_to_zero_after_the_last_step() {
        assert_eq!(factors(LrScheduler::Linear, 0, 4), [1.0, 0.75, 0.5, 0.25, 0.0]);
    }

    #[test]
    fn cosine_is_half_way_down_in_the_middle() {
        let factors = factors(LrScheduler::Cosine, 2, 6);
        assert_eq!(factors[2], 1.0);
        assert!((factors[4] - 0.5).abs() < 1e-15);
        assert!(factors[6].abs() < 1e-15);
    }

    #[test]
    fn warm_up_longer_than_the_run_divides_by_nothing() {
        assert_eq!(factors(LrScheduler::Linear, 5, 3), [0.0, 0.2, 0.4, 0.6]);
        assert_eq!(learning_rate_factor(LrScheduler::Linear, 3, 3, 3), 1.0);
    }
}
