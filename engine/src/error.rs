//! What can go wrong in the engine.

use std::path::{Path, PathBuf};

use tunesmith_core::errors::{ApiError, ErrorCode};

/// An error of the engine. Each message names the place, the rule and the way out.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A model directory or file is not what this engine can train.
    #[error("{0}")]
    Model(String),
    /// The adapter does not fit the model.
    #[error("{0}")]
    Adapter(String),
    /// The training data cannot be used.
    #[error("{0}")]
    Data(String),
    /// The numbers went wrong (a loss or gradient that is not finite).
    #[error("{0}")]
    Numeric(String),
    /// The loss leapt far above what it was.
    #[error("{0}")]
    Spike(String),
    /// The device that was asked for is not there or failed.
    #[error("{0}")]
    Device(String),
    /// A checkpoint cannot be resumed from.
    #[error("{0}")]
    Checkpoint(String),
    /// A file of the job's owner breaks a rule; the words are theirs to read.
    #[error("{0}")]
    Input(#[from] ApiError),
    /// Nobody takes the reports of the training any more.
    #[error("the training's reports cannot be delivered: {0}")]
    Report(std::io::Error),
}

impl EngineError {
    /// Makes an error of reading or writing `path` out of what the system said.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { path: path.to_owned(), source }
    }

    /// The error as the job's owner reads it.
    #[must_use]
    pub fn to_api_error(&self) -> ApiError {
        match self {
            Self::Input(error) => error.clone(),
            Self::Numeric(message) => ApiError::new(ErrorCode::NonFiniteLoss, message),
            Self::Spike(message) => ApiError::new(ErrorCode::LossSpike, message),
            other => ApiError::new(ErrorCode::TrainerFailed, other.to_string()),
        }
    }
}
