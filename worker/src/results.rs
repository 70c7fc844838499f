//! The result file: the loss curve as CSV, as OpenAI's clients read it.

use serde::Serialize;
use tunesmith_core::metrics::StepMetrics;

/// One line. The names are the header's.
#[derive(Serialize)]
struct Line {
    step: u64,
    train_loss: f64,
    train_accuracy: f64,
    valid_loss: f64,
    valid_mean_token_accuracy: f64,
}

/// The curve of `steps`, in their order, as CSV.
///
/// Published readers call `isnan` on every cell, so a cell is always a number: a step without an
/// evaluation repeats the last one. Before the first evaluation the loss is `initial_valid_loss`
/// and, as no accuracy is measured there, the accuracy is the first evaluation's. Without any
/// validation rows the columns repeat the training values.
pub(crate) fn results_csv(
    steps: &[StepMetrics],
    initial_valid_loss: Option<f64>,
) -> Result<Vec<u8>, csv::Error> {
    let first = |of: fn(&StepMetrics) -> Option<f64>| steps.iter().find_map(of);
    let mut valid_loss = initial_valid_loss.or_else(|| first(valid_loss_of));
    let mut valid_accuracy = first(valid_accuracy_of);
    let mut writer = csv::Writer::from_writer(Vec::new());
    for step in steps {
        valid_loss = valid_loss_of(step).or(valid_loss);
        valid_accuracy = valid_accuracy_of(step).or(valid_accuracy);
        writer.serialize(Line {
            step: step.step,
            train_loss: step.train_loss,
            train_accuracy: step.train_mean_token_accuracy,
            valid_loss: valid_loss.unwrap_or(step.train_loss),
            valid_mean_token_accuracy: valid_accuracy.unwrap_or(step.train_mean_token_accuracy),
        })?;
    }
    writer.into_inner().map_err(|error| error.into_error().into())
}

/// The step's validation loss; at an epoch's end the one over the whole set stands in where no
/// other was due.
fn valid_loss_of(step: &StepMetrics) -> Option<f64> {
    step.valid_loss.or(step.full_valid_loss)
}

fn valid_accuracy_of(step: &StepMetrics) -> Option<f64> {
    step.valid_mean_token_accuracy.or(step.full_valid_mean_token_accuracy)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64, valid_loss: Option<f64>) -> StepMetrics {
        StepMetrics {
            step,
            epoch: step as f64 / 4.0,
            train_loss: 3.0 - step as f64 / 4.0,
            train_mean_token_accuracy: 0.5,
            valid_loss,
            valid_mean_token_accuracy: valid_loss.map(|_| 0.25),
            full_valid_loss: None,
            full_valid_mean_token_accuracy: None,
            learning_rate: 1e-4,
            grad_norm: 1.0,
            tokens: 10 * step,
            tokens_per_second: 10.0,
            elapsed_seconds: step as f64,
            train_reward_accuracy: None,
            train_reward_margin: None,
            valid_reward_accuracy: None,
            valid_reward_margin: None,
        }
    }

    fn csv(steps: &[StepMetrics], initial: Option<f64>) -> String {
        String::from_utf8(results_csv(steps, initial).expect("csv")).expect("text")
    }

    #[test]
    fn the_last_evaluation_is_carried_and_the_initial_one_comes_before() {
        let steps = [step(1, None), step(2, Some(2.75)), step(3, None)];
        assert_eq!(
            csv(&steps, Some(4.0)),
            "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n\
             1,2.75,0.5,4.0,0.25\n\
             2,2.5,0.5,2.75,0.25\n\
             3,2.25,0.5,2.75,0.25\n"
        );
    }

    #[test]
    fn without_validation_rows_the_training_values_stand_in() {
        assert_eq!(
            csv(&[step(1, None)], None),
            "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n\
             1,2.75,0.5,2.75,0.5\n"
        );
    }

    #[test]
    fn without_an_initial_loss_the_first_evaluation_fills_the_steps_before_it() {
        let steps = [step(1, None), step(2, Some(2.75))];
        let text = csv(&steps, None);
        assert!(text.lines().nth(1).is_some_and(|line| line == "1,2.75,0.5,2.75,0.25"), "{text}");
    }

    #[test]
    fn an_epochs_end_without_another_evaluation_counts_as_one() {
        let mut last = step(2, None);
        last.full_valid_loss = Some(1.5);
        last.full_valid_mean_token_accuracy = Some(0.75);
        let text = csv(&[step(1, Some(2.0)), last], None);
        assert!(text.ends_with("2,2.5,0.5,1.5,0.75\n"), "{text}");
    }
}
