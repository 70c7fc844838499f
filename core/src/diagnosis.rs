//! What a loss curve shows, in sentences with the hyperparameter to change.
//!
//! Everything here is a pure function of the curve. The thresholds are deliberately coarse: a
//! curve that is merely noisy must draw no remark.

use crate::metrics::BestStep;
use crate::protocol::NoteLevel;
use serde::{Deserialize, Serialize};

/// The most points, and the most evaluations, that a curve keeps.
const MAX_POINTS: usize = 512;
/// Fewer points than this say nothing.
const FEWEST_POINTS: usize = 24;
/// Points at the curve's begin and end that are averaged: this, or a tenth if that is more.
const FEWEST_IN_WINDOW: usize = 8;
/// Evaluations above the best one that make a rise.
const EVALUATIONS_OF_A_RISE: usize = 3;
/// How far they lie above it at least, in its own size: 1 %.
const RISE: f64 = 0.01;
/// A training loss this far above its start, in the start's size, has gone up.
const GONE_UP: f64 = 0.1;
/// A training loss that moved by less than this, in the start's size, has not moved.
const UNMOVED: f64 = 0.02;
/// What a validation loss must fall over the last quarter of the run to be falling still …
const STILL_FALLING_VALID: f64 = 0.02;
/// … and a training loss, where nothing is held against it.
const STILL_FALLING_TRAIN: f64 = 0.05;
/// Standard errors that a difference must pass, so that noise is not taken for a trend.
const SURE: f64 = 3.0;
/// Windows in which an oscillation is looked for, and turns between them that make one.
const OSCILLATION_WINDOWS: usize = 10;
const OSCILLATION_TURNS: usize = 6;
/// Mean change from window to window that makes one, in the loss's size.
const OSCILLATION_SIZE: f64 = 0.2;

/// A run's losses, kept small: when there are many, neighbours are averaged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LossCurve {
    /// Steps that a point is the mean of.
    steps_per_point: u64,
    /// Mean training losses of equally many steps each.
    points: Vec<f64>,
    /// Sum and number of the steps that do not make a point yet.
    open: (f64, u64),
    /// Steps and their validation losses.
    evaluations: Vec<(u64, f64)>,
}

impl Default for LossCurve {
    fn default() -> Self {
        Self { steps_per_point: 1, points: Vec::new(), open: (0.0, 0), evaluations: Vec::new() }
    }
}

/// What the sentences name.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DiagnosisFacts {
    /// The peak learning rate.
    pub learning_rate: f64,
    /// Passes over the training rows.
    pub n_epochs: u64,
    /// The step with the lowest validation loss.
    pub best: Option<BestStep>,
    /// Whether the run has come to its end: some things can only be said then.
    pub has_ended: bool,
}

/// What a curve may show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FindingKind {
    /// The validation loss rises while the training loss falls.
    Overfitting,
    /// The training loss went up, or swings.
    LearningRateTooHigh,
    /// The training loss did not move.
    LearningRateTooLow,
    /// The loss was still falling at the end.
    StillFalling,
}

impl FindingKind {
    /// A name for programs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Overfitting => "overfitting",
            Self::LearningRateTooHigh => "learning-rate-too-high",
            Self::LearningRateTooLow => "learning-rate-too-low",
            Self::StillFalling => "still-falling",
        }
    }

    /// How much it matters.
    #[must_use]
    pub const fn level(self) -> NoteLevel {
        match self {
            Self::StillFalling => NoteLevel::Info,
            _ => NoteLevel::Warn,
        }
    }
}

/// One thing that a curve shows.
#[derive(Debug, Clone, PartialEq)]
pub struct Finding {
    /// Which.
    pub kind: FindingKind,
    /// What is seen and what to change.
    pub message: String,
}

impl LossCurve {
    /// Takes the training loss of the next step in.
    pub fn push_train(&mut self, loss: f64) {
        self.open = (self.open.0 + loss, self.open.1 + 1);
        if self.open.1 < self.steps_per_point {
            return;
        }
        self.points.push(self.open.0 / self.open.1 as f64);
        self.open = (0.0, 0);
        if self.points.len() == MAX_POINTS {
            self.points = self.points.chunks_exact(2).map(mean).collect();
            self.steps_per_point *= 2;
        }
    }

    /// Takes the validation loss after `step` in.
    pub fn push_valid(&mut self, step: u64, loss: f64) {
        self.evaluations.push((step, loss));
        if self.evaluations.len() == MAX_POINTS {
            self.evaluations = self.evaluations.iter().copied().skip(1).step_by(2).collect();
        }
    }

    /// The mean training loss of the first and of the last steps; `None` before the first step.
    #[must_use]
    pub fn begin_and_end(&self) -> Option<(f64, f64)> {
        if self.points.is_empty() {
            return None;
        }
        let size = self.window().min(self.points.len());
        Some((mean(&self.points[..size]), mean(&self.points[self.points.len() - size..])))
    }

    /// Everything that the curve shows.
    #[must_use]
    pub fn diagnose(&self, facts: &DiagnosisFacts) -> Vec<Finding> {
        let mut findings = Vec::new();
        let mut find = |kind, message: Option<String>| {
            let is_found = message.is_some();
            findings.extend(message.map(|message| Finding { kind, message }));
            is_found
        };
        let overfits = find(FindingKind::Overfitting, self.overfitting(facts));
        let is_high = find(FindingKind::LearningRateTooHigh, self.too_high(facts));
        if facts.has_ended && !is_high {
            let is_low = find(FindingKind::LearningRateTooLow, self.too_low(facts));
            if !is_low && !overfits {
                find(FindingKind::StillFalling, self.still_falling(facts));
            }
        }
        findings
    }

    fn window(&self) -> usize {
        (self.points.len() / 10).max(FEWEST_IN_WINDOW)
    }

    /// The points at the begin and at the end, where there are enough to tell.
    fn windows(&self) -> Option<(&[f64], &[f64])> {
        let (points, size) = (&self.points, self.window());
        (points.len() >= FEWEST_POINTS).then(|| (&points[..size], &points[points.len() - size..]))
    }

    fn overfitting(&self, facts: &DiagnosisFacts) -> Option<String> {
        let best = facts.best?;
        let last = self.evaluations.last_chunk::<EVALUATIONS_OF_A_RISE>()?;
        let is_above = |&(step, loss): &(u64, f64)| {
            step > best.step && loss > best.valid_loss + RISE * best.valid_loss.abs()
        };
        let [(_, first), .., (now, loss)] = *last;
        if !last.iter().all(is_above) || loss < first {
            return None;
        }
        // Steps before and after the best one, equally many if there are.
        let after = self.train_mean(best.step, now)?;
        let before = self.train_mean(best.step.saturating_sub(now - best.step), best.step)?;
        if after >= before {
            return None;
        }
        Some(format!(
            "Overfitting: the validation loss was lowest after step {}, {:.4}, and has risen to \
             {loss:.4} by step {now}, while the training loss fell from {before:.4} to \
             {after:.4}. Lower n_epochs (now {}), set early_stopping_patience, or give more \
             examples.",
            best.step, best.valid_loss, facts.n_epochs
        ))
    }

    /// Mean training loss of the steps after `from` up to `to`.
    fn train_mean(&self, from: u64, to: u64) -> Option<f64> {
        let point = |step: u64| (step / self.steps_per_point) as usize;
        let end = point(to).min(self.points.len());
        let begin = point(from).min(end.saturating_sub(1));
        (end > 0).then(|| mean(&self.points[begin..end]))
    }

    fn too_high(&self, facts: &DiagnosisFacts) -> Option<String> {
        let (first, last) = self.windows()?;
        let (begin, end) = (mean(first), mean(last));
        let rate = facts.learning_rate;
        if end - begin > GONE_UP * begin.abs()
            && end - begin > SURE * error_of_difference(first, last)
        {
            return Some(format!(
                "The learning rate is likely too high: the training loss began at {begin:.4} and \
                 is {end:.4} now. Lower learning_rate (now {rate:e}), to a third for instance, or \
                 raise warmup_ratio."
            ));
        }
        self.oscillates().then(|| {
            format!(
                "The learning rate is likely too high: the training loss swings up and down in \
                 place of falling. Lower learning_rate (now {rate:e}), to a third for instance, \
                 or raise batch_size."
            )
        })
    }

    fn oscillates(&self) -> bool {
        let size = self.points.len() / OSCILLATION_WINDOWS;
        if size < FEWEST_IN_WINDOW / 2 {
            return false;
        }
        let windows: Vec<&[f64]> = self.points.chunks_exact(size).collect();
        let means: Vec<f64> = windows.iter().map(|window| mean(window)).collect();
        let changes: Vec<f64> = means.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let turns = changes.windows(2).filter(|pair| pair[0] * pair[1] < 0.0).count();
        let sizes: Vec<f64> = changes.iter().map(|change| change.abs()).collect();
        let noise: Vec<f64> =
            windows.windows(2).map(|pair| error_of_difference(pair[0], pair[1])).collect();
        turns >= OSCILLATION_TURNS
            && mean(&sizes) > OSCILLATION_SIZE * mean(&means).abs()
            && mean(&sizes) > SURE * mean(&noise)
    }

    fn too_low(&self, facts: &DiagnosisFacts) -> Option<String> {
        let (first, last) = self.windows()?;
        let (begin, end) = (mean(first), mean(last));
        ((end - begin).abs() < UNMOVED * begin.abs()).then(|| {
            format!(
                "The training loss has hardly moved, from {begin:.4} to {end:.4}. Raise \
                 learning_rate (now {:e}), to three times as much for instance, or n_epochs (now \
                 {}).",
                facts.learning_rate, facts.n_epochs
            )
        })
    }

    fn still_falling(&self, facts: &DiagnosisFacts) -> Option<String> {
        let more = |which: &str, before: f64, now: f64| {
            format!(
                "The {which} loss was still falling at the end: from {before:.4} to {now:.4} in \
                 the last quarter of the run. More n_epochs (now {}) would likely bring it lower.",
                facts.n_epochs
            )
        };
        if let (Some(best), Some(&(last_step, last))) = (facts.best, self.evaluations.last()) {
            if self.evaluations.len() < 4 {
                return None;
            }
            let (_, before) = self.evaluations[self.evaluations.len() * 3 / 4 - 1];
            let falls =
                best.step == last_step && before - last > STILL_FALLING_VALID * before.abs();
            return falls.then(|| more("validation", before, last));
        }
        let (_, last) = self.windows()?;
        let quarter = self.points.len() * 3 / 4;
        let before = &self.points[quarter.saturating_sub(last.len())..quarter];
        let (was, now) = (mean(before), mean(last));
        let falls = was - now > STILL_FALLING_TRAIN * was.abs()
            && was - now > SURE * error_of_difference(before, last);
        falls.then(|| more("training", was, now))
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Standard error of the difference between the means of two samples.
fn error_of_difference(one: &[f64], other: &[f64]) -> f64 {
    let squared_error = |values: &[f64]| {
        let centre = mean(values);
        let squares: f64 = values.iter().map(|value| (value - centre).powi(2)).sum();
        squares / (values.len().max(2) - 1) as f64 / values.len() as f64
    };
    (squared_error(one) + squared_error(other)).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Noise in −1..1 that is the same in every run.
    fn noise(step: u64) -> f64 {
        let mixed = (step + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((mixed >> 11) as f64 / (1u64 << 52) as f64) - 1.0
    }

    struct Run {
        curve: LossCurve,
        facts: DiagnosisFacts,
    }

    /// A run of `steps` that is evaluated ten times.
    fn run(
        steps: u64,
        train: impl Fn(f64) -> f64,
        valid: impl Fn(f64) -> Option<f64>,
        noise_size: f64,
    ) -> Run {
        let mut curve = LossCurve::default();
        let mut best: Option<BestStep> = None;
        for step in 1..=steps {
            let share = step as f64 / steps as f64;
            curve.push_train(train(share) + noise_size * noise(step));
            if step.is_multiple_of((steps / 10).max(1))
                && let Some(loss) = valid(share)
            {
                curve.push_valid(step, loss);
                if best.is_none_or(|best| loss < best.valid_loss) {
                    best = Some(BestStep { step, valid_loss: loss });
                }
            }
        }
        let facts = DiagnosisFacts { learning_rate: 2e-4, n_epochs: 3, best, has_ended: true };
        Run { curve, facts }
    }

    fn kinds(run: &Run) -> Vec<FindingKind> {
        run.curve.diagnose(&run.facts).into_iter().map(|finding| finding.kind).collect()
    }

    fn message(run: &Run) -> String {
        run.curve.diagnose(&run.facts).remove(0).message
    }

    const NONE: fn(f64) -> Option<f64> = |_| None;

    /// Falls fast and then lies flat.
    fn healthy(share: f64) -> f64 {
        1.0 + 2.0 * (-12.0 * share).exp()
    }

    #[test]
    fn a_curve_that_falls_and_flattens_draws_no_remark_however_noisy() {
        for noise_size in [0.0, 0.1, 0.5] {
            for steps in [30, 300, 5000] {
                let run = run(steps, healthy, |share| Some(healthy(share)), noise_size);
                assert_eq!(kinds(&run), [], "{steps} steps, noise {noise_size}");
                let without = self::run(steps, healthy, NONE, noise_size);
                assert_eq!(kinds(&without), [], "{steps} steps, noise {noise_size}");
            }
        }
    }

    #[test]
    fn noise_around_a_level_is_neither_a_rise_nor_a_swing() {
        for steps in [24, 40, 200, 3000] {
            let mut run = run(steps, |_| 2.0, NONE, 1.0);
            run.facts.has_ended = false;
            assert_eq!(kinds(&run), [], "{steps}");
        }
    }

    #[test]
    fn a_validation_loss_that_rises_while_the_training_loss_falls_names_the_best_step() {
        let falls = |share: f64| 2.0 - 1.5 * share;
        let turns = |share: f64| Some(1.5 + (share - 0.4).powi(2));
        let mut run = run(100, falls, turns, 0.05);
        assert_eq!(kinds(&run), [FindingKind::Overfitting]);
        let message = message(&run);
        assert!(message.contains("lowest after step 40, 1.5000"), "{message}");
        assert!(message.contains("early_stopping_patience"), "{message}");
        // The same is said while it runs.
        run.facts.has_ended = false;
        assert_eq!(kinds(&run), [FindingKind::Overfitting]);
    }

    #[test]
    fn a_validation_loss_that_rises_with_the_training_loss_is_no_overfitting() {
        let rises = |share: f64| 2.0 + share;
        let run = run(100, rises, |share| Some(rises(share)), 0.01);
        assert_eq!(kinds(&run), [FindingKind::LearningRateTooHigh]);
        assert!(message(&run).contains("Lower learning_rate (now 2e-4)"), "{}", message(&run));
    }

    #[test]
    fn a_validation_loss_that_wavers_above_its_best_is_no_rise() {
        let wavers = |share: f64| Some(1.0 + if share < 0.45 { 0.0 } else { 0.002 });
        let run = run(100, healthy, wavers, 0.0);
        assert_eq!(kinds(&run), []);
    }

    #[test]
    fn a_training_loss_that_swings_widely_says_that_the_rate_is_too_high() {
        let swings = |share: f64| 2.0 + 1.2 * (share * 10.0 * std::f64::consts::PI).sin();
        let run = run(400, swings, NONE, 0.1);
        assert_eq!(kinds(&run), [FindingKind::LearningRateTooHigh]);
        assert!(message(&run).contains("swings"), "{}", message(&run));
    }

    #[test]
    fn a_training_loss_that_does_not_move_says_that_the_rate_is_too_low_at_the_end() {
        let mut run = run(200, |share| 2.0 - 0.01 * share, NONE, 0.02);
        assert_eq!(kinds(&run), [FindingKind::LearningRateTooLow]);
        assert!(message(&run).contains("Raise learning_rate (now 2e-4)"), "{}", message(&run));
        run.facts.has_ended = false;
        assert_eq!(kinds(&run), []);
    }

    #[test]
    fn a_loss_that_still_falls_at_the_end_asks_for_more_epochs() {
        let falls = |share: f64| 3.0 - 2.0 * share;
        for valid in [NONE, |share: f64| Some(3.1 - 2.0 * share)] {
            let run = run(200, falls, valid, 0.05);
            assert_eq!(kinds(&run), [FindingKind::StillFalling]);
            assert!(message(&run).contains("More n_epochs (now 3)"), "{}", message(&run));
        }
    }

    #[test]
    fn a_few_steps_say_nothing() {
        for train in [|share: f64| 2.0 + share, |_: f64| 2.0, |share: f64| 3.0 - 2.0 * share] {
            assert_eq!(kinds(&run(20, train, NONE, 0.0)), []);
        }
        assert_eq!(LossCurve::default().begin_and_end(), None);
    }

    #[test]
    fn a_long_run_keeps_few_points_whose_means_are_the_runs() {
        let mut curve = LossCurve::default();
        for step in 0..10_000u64 {
            curve.push_train(step as f64);
            curve.push_valid(step + 1, 1.0);
        }
        assert!(curve.points.len() < MAX_POINTS && curve.evaluations.len() < MAX_POINTS);
        let covered = curve.points.len() as u64 * curve.steps_per_point;
        assert_eq!(covered + curve.open.1, 10_000);
        assert_eq!(mean(&curve.points), (covered - 1) as f64 / 2.0);
        let text = serde_json::to_string(&curve).expect("JSON");
        assert_eq!(serde_json::from_str::<LossCurve>(&text).expect("read"), curve);
    }
}
