//! Where the weights of a tuned model lie in the object store.

use crate::ids::{ImportedAdapterId, JobId};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A checkpoint's place: which attempt of which job wrote it, after how many steps.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CheckpointPlace {
    /// The job.
    pub job: JobId,
    /// The attempt that wrote it. No two writers share one, so objects here are written once.
    pub attempt: u32,
    /// Optimiser steps done.
    pub step: u64,
}

/// What made the weights, and so where they lie.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightsPlace {
    /// A job, as one of its checkpoints.
    Checkpoint(CheckpointPlace),
    /// Another program: an adapter that was imported.
    Imported(ImportedAdapterId),
}

impl From<CheckpointPlace> for WeightsPlace {
    fn from(place: CheckpointPlace) -> Self {
        Self::Checkpoint(place)
    }
}

/// A name that no other weights have, and that a file may have.
impl fmt::Display for WeightsPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Checkpoint(CheckpointPlace { job, attempt, step }) => {
                write!(f, "{job}-{attempt}-{step}")
            }
            Self::Imported(id) => id.fmt(f),
        }
    }
}
