//! The learning rate of each step, as a pure function: a resumed run asks for the step it is at.

use std::f64::consts::PI;

use tunesmith_core::hyperparameters::{LrScheduler, ResolvedHyperparameters};

/// The factor on the peak learning rate over a run.
///
/// As Hugging Face's `get_{constant,linear,cosine}_schedule_with_warmup`,
/// `get_cosine_with_min_lr_schedule_with_warmup` and `get_wsd_schedule`. With W warm-up steps of N
/// and the floor m, the factor of step t (0-based) is `t / W` while `t < W`. After that, with
/// `x = (t − W) / (N − W)`:
///
/// ```text
/// constant   1
/// linear     m + (1 − m)·(1 − x)
/// cosine     m + (1 − m)·(1 + cos(π·x)) / 2
/// wsd        1, and in the last D steps, with y = (t − (N − D)) / D, m + (1 − m)·(1 − √y)
/// ```
///
/// The first step of a warm-up thus has a rate of 0 (of m for `wsd`, whose warm-up also begins at
/// the floor), and step N would have m again.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The shape.
    pub scheduler: LrScheduler,
    /// W: steps in which the rate rises.
    pub warmup_steps: u64,
    /// D: steps in which `wsd` falls.
    pub decay_steps: u64,
    /// N: steps of the whole run.
    pub total_steps: u64,
    /// m: where the fall ends.
    pub min_lr_ratio: f64,
}

impl Schedule {
    /// The schedule of a run of `total_steps`. Shares of the steps are rounded, so that a short
    /// run is not all warm-up; warm-up goes before decay where the two would overlap.
    #[must_use]
    pub fn new(hyperparameters: &ResolvedHyperparameters, total_steps: u64) -> Self {
        let steps = |ratio: f64| (ratio * total_steps as f64).round() as u64;
        let warmup_steps = steps(hyperparameters.warmup_ratio);
        Self {
            scheduler: hyperparameters.lr_scheduler,
            warmup_steps,
            decay_steps: steps(hyperparameters.decay_ratio)
                .min(total_steps.saturating_sub(warmup_steps)),
            total_steps,
            min_lr_ratio: hyperparameters.min_lr_ratio,
        }
    }

    /// The factor of update number `step`, from 0.
    #[must_use]
    pub fn factor(&self, step: u64) -> f64 {
        let above_floor = |share: f64| self.min_lr_ratio + (1.0 - self.min_lr_ratio) * share;
        if step < self.warmup_steps {
            let risen = step as f64 / self.warmup_steps as f64;
            return if self.scheduler == LrScheduler::Wsd { above_floor(risen) } else { risen };
        }
        // What is left of a fall over the last `length` steps, as a share of 1 passed.
        let passed = |length: u64| {
            let begin = self.total_steps.saturating_sub(length);
            (step.saturating_sub(begin) as f64 / length.max(1) as f64).min(1.0)
        };
        let after_warmup = self.total_steps.saturating_sub(self.warmup_steps);
        match self.scheduler {
            LrScheduler::Constant => 1.0,
            LrScheduler::Linear => above_floor(1.0 - passed(after_warmup)),
            LrScheduler::Cosine => above_floor(0.5 * (1.0 + (PI * passed(after_warmup)).cos())),
            LrScheduler::Wsd => above_floor(1.0 - passed(self.decay_steps).sqrt()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn schedule(scheduler: LrScheduler, warmup_steps: u64, total_steps: u64) -> Schedule {
        Schedule { scheduler, warmup_steps, decay_steps: 0, total_steps, min_lr_ratio: 0.0 }
    }

    fn factors(scheduler: LrScheduler, warmup_steps: u64, total: u64) -> Vec<f64> {
        let schedule = schedule(scheduler, warmup_steps, total);
        (0..=total).map(|step| schedule.factor(step)).collect()
    }

    #[test]
    fn every_schedule_equals_hugging_faces_at_every_step() {
        let text = include_str!("../../tests/reference/schedules.json");
        let reference: Value = serde_json::from_str(text).expect("JSON");
        let cases = reference["cases"].as_array().expect("cases");
        assert!(cases.len() >= 20, "{} cases", cases.len());
        for case in cases {
            let number = |name: &str| case[name].as_u64().expect("a number");
            let schedule = Schedule {
                scheduler: serde_json::from_value(case["scheduler"].clone()).expect("a word"),
                warmup_steps: number("warmup_steps"),
                decay_steps: number("decay_steps"),
                total_steps: number("total_steps"),
                min_lr_ratio: case["min_lr_ratio"].as_f64().expect("a number"),
            };
            let expected = case["factors"].as_array().expect("factors");
            assert_eq!(expected.len() as u64, schedule.total_steps + 1);
            for (step, expected) in expected.iter().enumerate() {
                let (factor, expected) = (schedule.factor(step as u64), expected.as_f64().unwrap());
                assert!(
                    (factor - expected).abs() < 1e-14,
                    "{schedule:?} at {step}: {factor} {expected}"
                );
            }
        }
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
        assert_eq!(schedule(LrScheduler::Linear, 3, 3).factor(3), 1.0);
        assert_eq!(schedule(LrScheduler::Wsd, 3, 3).factor(3), 1.0);
    }
}
