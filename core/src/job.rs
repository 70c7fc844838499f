//! What a trainer is told to do, with nothing left to choose.

use crate::hyperparameters::ResolvedHyperparameters;
use serde::{Deserialize, Serialize};

/// A job's work, complete: same spec, same files, same numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainSpec {
    /// The base model's name, as the client gave it.
    pub model: String,
    /// Whether the base model of an adapter is itself a tuned model, whose weights were all trained.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub base_is_tuned: bool,
    /// The tuned model whose weights the run begins with, where it is not the base model alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_from: Option<String>,
    /// Seeds the adapter's init, the order of rows, the held-out split and dropout.
    pub seed: u64,
    /// Every hyperparameter, resolved.
    pub hyperparameters: ResolvedHyperparameters,
}
