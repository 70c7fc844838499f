//! What is known of a job's loss curve, and how one line shows it.

use crate::rest::wire::CurvePart;
use std::time::Duration;
use tunesmith_core::metrics::StepMetrics;

/// Time left is judged by the newest steps, as the first ones are slower than the rest.
const RECENT_STEPS: usize = 20;
/// Characters of a sparkline.
const SPARKLINE_WIDTH: usize = 40;

/// The steps seen so far, in order.
#[derive(Debug, Default)]
pub(crate) struct Curve {
    steps: Vec<StepMetrics>,
    total_steps: Option<u64>,
    initial_valid_loss: Option<f64>,
}

impl Curve {
    /// Adds what a part says; a step that is there already is not added again.
    pub(crate) fn extend(&mut self, part: CurvePart) {
        self.total_steps = part.total_steps.or(self.total_steps);
        self.initial_valid_loss = part.initial_valid_loss.or(self.initial_valid_loss);
        for step in part.data {
            if step.step > self.last_step() {
                self.steps.push(step);
            }
        }
    }

    /// Steps of the whole job, once they are known.
    pub(crate) fn total_steps(&self) -> Option<u64> {
        self.total_steps
    }

    /// The newest step; 0 before the first.
    pub(crate) fn last_step(&self) -> u64 {
        self.steps.last().map_or(0, |step| step.step)
    }

    /// `loss 1.234 · valid 1.301 · 512 tokens/s`, and the time left once the total is known.
    pub(crate) fn line(&self) -> String {
        let Some(last) = self.steps.last() else { return String::new() };
        let mut facts = vec![format!("loss {:.4}", last.train_loss)];
        if let Some(loss) = self.steps.iter().rev().find_map(valid_loss) {
            facts.push(format!("valid {loss:.4}"));
        }
        facts.push(format!("{:.0} tokens/s", last.tokens_per_second));
        if let Some(left) = self.time_left() {
            facts.push(format!("{} left", duration(left)));
        }
        facts.join(" · ")
    }

    /// Time until the last step, at the pace of the newest ones.
    fn time_left(&self) -> Option<Duration> {
        let last = self.steps.last()?;
        let left = self.total_steps?.saturating_sub(last.step);
        let first = &self.steps[self.steps.len().saturating_sub(RECENT_STEPS + 1)];
        let (steps, seconds) = if first.step < last.step {
            (last.step - first.step, last.elapsed_seconds - first.elapsed_seconds)
        } else {
            (last.step, last.elapsed_seconds)
        };
        Duration::try_from_secs_f64(seconds / steps as f64 * left as f64).ok()
    }

    /// `training loss 2.1034 → 0.8127  ▇▅▃▂▁`, and the same for validation; empty before a step.
    pub(crate) fn summary(&self) -> String {
        let train: Vec<f64> = self.steps.iter().map(|step| step.train_loss).collect();
        let valid: Vec<f64> = self
            .initial_valid_loss
            .into_iter()
            .chain(self.steps.iter().filter_map(valid_loss))
            .collect();
        let mut lines = Vec::new();
        for (name, losses) in [("training", train), ("validation", valid)] {
            if let [first, .., last] = losses[..] {
                let sparkline = sparkline(&losses);
                lines.push(format!("{name} loss {first:.4} → {last:.4}  {sparkline}"));
            }
        }
        lines.join("\n")
    }
}

fn valid_loss(step: &StepMetrics) -> Option<f64> {
    step.full_valid_loss.or(step.valid_loss)
}

/// `values` as bars; more values than fit are averaged in groups.
fn sparkline(values: &[f64]) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let width = values.len().min(SPARKLINE_WIDTH);
    let groups: Vec<f64> = (0..width)
        .map(|column| {
            let group = &values[column * values.len() / width..(column + 1) * values.len() / width];
            group.iter().sum::<f64>() / group.len() as f64
        })
        .collect();
    let low = groups.iter().copied().fold(f64::INFINITY, f64::min);
    let high = groups.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let top = (BARS.len() - 1) as f64;
    groups
        .iter()
        .map(|value| {
            let height = if high > low { (value - low) / (high - low) * top } else { 0.0 };
            BARS[(height.round() as usize).min(BARS.len() - 1)]
        })
        .collect()
}

/// `8s`, `1m 20s`, `2h 05m`.
fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64().round() as u64;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h {:02}m", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64, train_loss: f64, valid_loss: Option<f64>, elapsed: f64) -> StepMetrics {
        StepMetrics {
            step,
            epoch: 0.5,
            train_loss,
            train_mean_token_accuracy: 0.5,
            valid_loss,
            valid_mean_token_accuracy: valid_loss,
            full_valid_loss: None,
            full_valid_mean_token_accuracy: None,
            learning_rate: 1e-4,
            grad_norm: 1.0,
            tokens: step * 100,
            tokens_per_second: 512.4,
            elapsed_seconds: elapsed,
            train_reward_accuracy: None,
            train_reward_margin: None,
            valid_reward_accuracy: None,
            valid_reward_margin: None,
        }
    }

    fn part(steps: impl IntoIterator<Item = StepMetrics>, total_steps: Option<u64>) -> CurvePart {
        CurvePart { data: steps.into_iter().collect(), total_steps, initial_valid_loss: None }
    }

    fn curve(steps: impl IntoIterator<Item = StepMetrics>, total_steps: Option<u64>) -> Curve {
        let mut curve = Curve::default();
        curve.extend(part(steps, total_steps));
        curve
    }

    #[test]
    fn a_line_shows_the_newest_losses_the_speed_and_the_time_left() {
        let mut seen = curve([step(1, 2.5, Some(2.25), 9.0), step(2, 2.0, None, 11.0)], None);
        assert_eq!(seen.line(), "loss 2.0000 · valid 2.2500 · 512 tokens/s");
        seen.extend(part([step(2, 9.0, None, 0.0), step(3, 1.5, None, 13.0)], Some(43)));
        assert_eq!(
            seen.line(),
            "loss 1.5000 · valid 2.2500 · 512 tokens/s · 1m 20s left",
            "two seconds a step, forty steps to go; the repeated step 2 changes nothing"
        );
        assert_eq!(seen.last_step(), 3);
    }

    #[test]
    fn the_pace_is_that_of_the_newest_steps_and_a_lone_step_counts_from_the_start() {
        let slow_start = (1..=50).map(|n| step(n, 1.0, None, 100.0 + n as f64));
        assert!(curve(slow_start, Some(60)).line().ends_with("· 10s left"));
        assert!(curve([step(1, 1.0, None, 3.0)], Some(3)).line().ends_with("· 6s left"));
        assert!(curve([step(3, 1.0, None, 3.0)], Some(3)).line().ends_with("· 0s left"));
    }

    #[test]
    fn an_empty_curve_draws_nothing() {
        assert_eq!(Curve::default().line(), "");
        assert_eq!(Curve::default().summary(), "");
        assert_eq!(curve([step(1, 2.0, None, 1.0)], None).summary(), "", "one point is no curve");
    }

    #[test]
    fn a_falling_loss_draws_falling_bars() {
        let falling = (1..=8).map(|n| step(n, (9 - n) as f64, None, n as f64));
        let mut curve = curve(falling, None);
        assert_eq!(curve.summary(), "training loss 8.0000 → 1.0000  █▇▆▅▄▃▂▁");
        // The validation loss is drawn from before the first step on.
        curve.extend(CurvePart { initial_valid_loss: Some(2.0), ..CurvePart::default() });
        curve.extend(part([step(9, 1.0, Some(1.0), 9.0)], None));
        assert!(curve.summary().ends_with("\nvalidation loss 2.0000 → 1.0000  █▁"));
    }

    #[test]
    fn a_long_curve_fits_its_width_and_a_flat_one_lies_low() {
        let values: Vec<f64> = (0..1001).map(f64::from).collect();
        let line: Vec<char> = sparkline(&values).chars().collect();
        assert_eq!((line.len(), line[0], line[39]), (SPARKLINE_WIDTH, '▁', '█'));
        assert_eq!(sparkline(&[2.0, 2.0]), "▁▁");
    }

    #[test]
    fn durations_read_as_people_say_them() {
        for (seconds, text) in [(0, "0s"), (59, "59s"), (80, "1m 20s"), (7500, "2h 05m")] {
            assert_eq!(duration(Duration::from_secs(seconds)), text);
        }
    }
}
