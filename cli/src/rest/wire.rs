//! The parts of the contract's objects that the commands read.

use crate::table::one_line;
use serde::Deserialize;
use tunesmith_core::metrics::StepMetrics;
use tunesmith_core::state::JobStatus;

/// `{"error": …}`.
#[derive(Debug, Deserialize)]
pub(crate) struct ErrorBody {
    /// Its content.
    pub(crate) error: ErrorMessage,
}

/// What a person reads of an error.
#[derive(Debug, Deserialize)]
pub(crate) struct ErrorMessage {
    /// The message.
    pub(crate) message: String,
    /// Which error of the table.
    #[serde(default)]
    pub(crate) code: Option<String>,
}

/// A page of a list.
#[derive(Debug, Deserialize)]
pub(crate) struct Page<T> {
    /// Newest first.
    pub(crate) data: Vec<T>,
    /// Whether there is another page.
    #[serde(default)]
    pub(crate) has_more: bool,
}

/// A job's curve, whole or from some step on.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct CurvePart {
    /// In their order.
    pub(crate) data: Vec<StepMetrics>,
    /// Steps of the whole job, known once it runs.
    #[serde(default)]
    pub(crate) total_steps: Option<u64>,
    /// Loss on the validation rows before the first step.
    #[serde(default)]
    pub(crate) initial_valid_loss: Option<f64>,
}

/// A file.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct File {
    /// Its id.
    pub(crate) id: String,
    /// Size.
    pub(crate) bytes: u64,
    /// Unix seconds.
    pub(crate) created_at: i64,
    /// As it was uploaded.
    pub(crate) filename: String,
    /// What it is for.
    pub(crate) purpose: String,
    /// uploaded, processed or error.
    #[serde(default)]
    pub(crate) status: String,
}

/// A model, tuned or base.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Model {
    /// Its name.
    pub(crate) id: String,
    /// Unix seconds.
    pub(crate) created: i64,
    /// Who made it.
    pub(crate) owned_by: String,
}

/// A job.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Job {
    /// Its id.
    pub(crate) id: String,
    /// Unix seconds.
    pub(crate) created_at: i64,
    /// The base model's name.
    pub(crate) model: String,
    /// Where it stands.
    pub(crate) status: JobStatus,
    /// Whether it waits because its owner said so.
    #[serde(default)]
    pub(crate) paused: bool,
    /// The model it made.
    pub(crate) fine_tuned_model: Option<String>,
    /// Tokens seen in training.
    pub(crate) trained_tokens: Option<u64>,
    /// Why it failed.
    pub(crate) error: Option<JobError>,
}

/// Why a job failed. Some servers send an object of nulls for a job that did not.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct JobError {
    /// For a person.
    pub(crate) message: Option<String>,
}

/// An event of a job.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Event {
    /// Its id.
    pub(crate) id: String,
    /// info, warn or error.
    level: String,
    /// For a person.
    message: String,
    /// message or metrics.
    #[serde(rename = "type", default)]
    kind: String,
}

impl Event {
    /// Whether it repeats a point of the curve.
    pub(crate) fn is_metrics(&self) -> bool {
        self.kind == "metrics"
    }

    /// The message, with its level where that is not the usual one.
    pub(crate) fn line(&self) -> String {
        let message = one_line(&self.message);
        if self.level == "info" { message } else { format!("{}: {message}", self.level) }
    }
}
