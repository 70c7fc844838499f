//! The loss curve: one row a step.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What one optimiser step showed. Losses are means over the step's total loss weight, measured
/// before the step's update; accuracies are weighted the same way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StepMetrics {
    /// From 1.
    pub step: u64,
    /// Epochs done after this step, e.g. 1.5.
    pub epoch: f64,
    /// Σ wᵢ·NLLᵢ / Σ wᵢ over the step's tokens, or the mean preference loss over its pairs.
    pub train_loss: f64,
    /// Share of target tokens that were also the most likely one; of preference pairs, of the
    /// preferred answers' tokens.
    pub train_mean_token_accuracy: f64,
    /// The validation loss after this step's update, where one was measured.
    pub valid_loss: Option<f64>,
    /// Its accuracy.
    pub valid_mean_token_accuracy: Option<f64>,
    /// The loss over the whole validation set, measured at an epoch's end.
    pub full_valid_loss: Option<f64>,
    /// Its accuracy.
    pub full_valid_mean_token_accuracy: Option<f64>,
    /// The rate that this step used.
    pub learning_rate: f64,
    /// Global L2 norm of the gradients before clipping.
    pub grad_norm: f64,
    /// Tokens seen since the job's start, this step's included.
    pub tokens: u64,
    /// This step's tokens over its time.
    pub tokens_per_second: f64,
    /// Training time since the job's start, time before a resume included.
    pub elapsed_seconds: f64,
    /// Of preference pairs: the share whose preferred answer has the higher implicit reward.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train_reward_accuracy: Option<f64>,
    /// Of preference pairs: the mean difference of the two rewards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train_reward_margin: Option<f64>,
    /// The same share of the validation pairs, where it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_reward_accuracy: Option<f64>,
    /// The same difference.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_reward_margin: Option<f64>,
}

/// The most training rows of a job whose losses are kept: the first ones of the file.
pub const MAX_ROW_LOSSES: u64 = 100_000;

/// What a training row showed when it was last trained on, before that step's update.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RowLoss {
    /// The row's number among those that train, from 0; of a long text each window has one.
    pub row: u64,
    /// Where it begins in its file, from 1.
    pub line: u64,
    /// The step, from 1.
    pub step: u64,
    /// Σ wᵢ·NLLᵢ / Σ wᵢ over the row's targets.
    pub loss: f64,
}

/// The step with the lowest validation loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct BestStep {
    /// Counted from 1.
    pub step: u64,
    /// The loss after that step.
    pub valid_loss: f64,
}
