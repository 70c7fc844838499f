//! The texts and data of a running job's events, as the contract lists them.

use serde_json::{Value, json};
use std::fmt::Write as _;
use tunesmith_core::metrics::StepMetrics;

/// `Step n/N: training loss=x[, validation loss=y[, full validation loss=z]]`.
///
/// Four decimals: late in a run, losses of neighbouring steps often differ by less than a
/// hundredth, and two decimals would show a curve that moves as one that stands still. Readers of
/// OpenAI's two-decimal lines parse a number and take any count of digits.
pub(crate) fn step_message(metrics: &StepMetrics, total_steps: u64) -> String {
    let mut text =
        format!("Step {}/{total_steps}: training loss={:.4}", metrics.step, metrics.train_loss);
    // Writing into a string cannot fail.
    if let Some(loss) = metrics.valid_loss {
        let _ = write!(text, ", validation loss={loss:.4}");
    }
    if let Some(loss) = metrics.full_valid_loss {
        let _ = write!(text, ", full validation loss={loss:.4}");
    }
    text
}

/// The `data` of the same event, of type `metrics`: unrounded; what was not measured is left out.
pub(crate) fn step_data(metrics: &StepMetrics, total_steps: u64) -> Value {
    let mut data = json!({
        "step": metrics.step,
        "total_steps": total_steps,
        "train_loss": metrics.train_loss,
        "train_mean_token_accuracy": metrics.train_mean_token_accuracy,
    });
    let measured = [
        ("valid_loss", metrics.valid_loss),
        ("valid_mean_token_accuracy", metrics.valid_mean_token_accuracy),
        ("full_valid_loss", metrics.full_valid_loss),
        ("full_valid_mean_token_accuracy", metrics.full_valid_mean_token_accuracy),
        ("train_reward_accuracy", metrics.train_reward_accuracy),
        ("train_reward_margin", metrics.train_reward_margin),
        ("valid_reward_accuracy", metrics.valid_reward_accuracy),
        ("valid_reward_margin", metrics.valid_reward_margin),
    ];
    for (name, value) in measured {
        if let Some(value) = value {
            data[name] = json!(value);
        }
    }
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics() -> StepMetrics {
        StepMetrics {
            step: 7,
            epoch: 1.0,
            train_loss: 1.234_56,
            train_mean_token_accuracy: 0.5,
            valid_loss: None,
            valid_mean_token_accuracy: None,
            full_valid_loss: None,
            full_valid_mean_token_accuracy: None,
            learning_rate: 1e-4,
            grad_norm: 1.0,
            tokens: 70,
            tokens_per_second: 10.0,
            elapsed_seconds: 7.0,
            train_reward_accuracy: None,
            train_reward_margin: None,
            valid_reward_accuracy: None,
            valid_reward_margin: None,
        }
    }

    #[test]
    fn a_step_names_only_the_losses_that_were_measured() {
        let mut metrics = metrics();
        assert_eq!(step_message(&metrics, 9), "Step 7/9: training loss=1.2346");
        metrics.valid_loss = Some(2.0);
        assert_eq!(
            step_message(&metrics, 9),
            "Step 7/9: training loss=1.2346, validation loss=2.0000"
        );
        metrics.full_valid_loss = Some(2.5);
        assert_eq!(
            step_message(&metrics, 9),
            "Step 7/9: training loss=1.2346, validation loss=2.0000, full validation loss=2.5000"
        );
    }

    #[test]
    fn the_data_are_unrounded_and_hold_no_nulls() {
        let mut metrics = metrics();
        metrics.valid_loss = Some(2.125);
        assert_eq!(
            step_data(&metrics, 9),
            json!({
                "step": 7,
                "total_steps": 9,
                "train_loss": 1.234_56,
                "train_mean_token_accuracy": 0.5,
                "valid_loss": 2.125,
            })
        );
    }
}
