//! The words of optimisation, and which of them go together.

use super::{AdapterType, Auto, Hyperparameters};
use crate::errors::{ApiError, ErrorCode};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the learning rate moves after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LrScheduler {
    /// Stays at its peak.
    Constant,
    /// Falls on a straight line to `min_lr_ratio` at the last step.
    #[default]
    Linear,
    /// Falls on half a cosine wave to `min_lr_ratio` at the last step.
    Cosine,
    /// Warm-up, stable, decay (Hu et al. 2024): stays at its peak, then falls as 1 − √x over the
    /// last `decay_ratio` of the steps (Hägele et al. 2024).
    Wsd,
}

/// What turns gradients into new weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Optimizer {
    /// Loshchilov and Hutter 2019.
    #[default]
    Adamw,
    /// Shazeer and Stern 2018, with the job's learning rate: a matrix's second moments are kept as
    /// one number a row and one a column, and there is no first moment.
    Adafactor,
    /// Jordan 2024: momentum made orthogonal, for the matrices of full fine-tuning but the
    /// embedding and the head; AdamW for everything else.
    Muon,
}

/// How Muon's learning rate follows a matrix's shape. The words are PyTorch's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MuonLearningRate {
    /// Jordan's √max(1, rows / columns).
    Original,
    /// 0.2·√max(rows, columns): an update as large as AdamW's, so that AdamW's learning rates
    /// serve both (Liu et al. 2025).
    #[default]
    MatchRmsAdamw,
}

/// What a run does when its loss or gradient is no number, or its loss leaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnDivergence {
    /// The job ends, naming the step and the rows.
    #[default]
    Fail,
    /// Back to the last checkpoint, and on at half the learning rate.
    Rollback,
}

/// Refuses values that do not go together.
pub(super) fn check(asked: &Hyperparameters, path: &str) -> Result<(), ApiError> {
    if asked.optimizer == Auto::Value(Optimizer::Muon) && asked.adapter.kind != AdapterType::Full {
        return Err(refused(
            path,
            "optimizer",
            "'muon' makes the updates of whole weight matrices orthogonal, which has no meaning \
             for the two factors of an adapter. Use 'adamw', or train every weight with adapter \
             {\"type\": \"full\"}",
        ));
    }
    if let Auto::Value(factor) = asked.spike_factor
        && factor > 0.0
        && factor <= 1.0
    {
        return Err(refused(
            path,
            "spike_factor",
            "a loss must lie above the usual one to be a leap. Use a number above 1, such as 3, \
             or 0 to let every finite loss pass",
        ));
    }
    Ok(())
}

/// Refuses what looks at the validation loss, for a job that has none.
pub(super) fn check_without_validation_rows(
    asked: &Hyperparameters,
    path: &str,
) -> Result<(), ApiError> {
    const WAY_OUT: &str = "Give a validation_file, or hold rows out with validation_split";
    if matches!(asked.early_stopping_patience, Auto::Value(patience) if patience > 0) {
        let rule = format!(
            "early stopping looks at the validation loss, and this job has no validation rows. \
             {WAY_OUT}"
        );
        return Err(refused(path, "early_stopping_patience", &rule));
    }
    if asked.load_best_model_at_end == Auto::Value(true) {
        let rule = format!(
            "the best checkpoint is the one with the lowest validation loss, and this job has no \
             validation rows. {WAY_OUT}"
        );
        return Err(refused(path, "load_best_model_at_end", &rule));
    }
    Ok(())
}

fn refused(path: &str, name: &str, rule: &str) -> ApiError {
    ApiError::new(ErrorCode::InvalidValue, format!("Invalid value for '{name}': {rule}."))
        .with_param(format!("{path}.{name}"))
}
