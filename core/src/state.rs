//! The states of a job and the moves between them.
//!
//! This table is the only one: the SQL guards in `store` are made from [`sources_of`], so a move
//! that is not here cannot be written.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Where a job stands. The text is the wire's and the database's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobStatus {
    /// The files are being read row by row.
    ValidatingFiles,
    /// Waits for a worker, or is paused.
    Queued,
    /// A worker holds its lease.
    Running,
    /// Ended with a model.
    Succeeded,
    /// Ended with an error.
    Failed,
    /// Ended because its owner said so.
    Cancelled,
}

impl JobStatus {
    /// All of them, in the order a job passes through.
    pub const ALL: [Self; 6] = [
        Self::ValidatingFiles,
        Self::Queued,
        Self::Running,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    /// The word on the wire and in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ValidatingFiles => "validating_files",
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// The status that `word` names.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == word)
    }

    /// Whether nothing can follow.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// Whether a job may move from here to `next`.
    #[must_use]
    pub fn may_become(self, next: Self) -> bool {
        sources_of(next).contains(&self)
    }
}

impl fmt::Display for JobStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The states from which a job may move to `next`.
///
/// `Queued` is reached from `Running` when a worker gives the job back (drain, pause) and
/// `Running` from itself when a lease ran out and another worker takes over.
#[must_use]
pub const fn sources_of(next: JobStatus) -> &'static [JobStatus] {
    use JobStatus::{Queued, Running, ValidatingFiles};
    match next {
        JobStatus::ValidatingFiles => &[],
        JobStatus::Queued => &[ValidatingFiles, Running],
        JobStatus::Running => &[Queued, Running],
        JobStatus::Succeeded => &[Running],
        JobStatus::Failed | JobStatus::Cancelled => &[ValidatingFiles, Queued, Running],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_follows_a_terminal_state() {
        for from in JobStatus::ALL.into_iter().filter(|s| s.is_terminal()) {
            for to in JobStatus::ALL {
                assert!(!from.may_become(to), "{from} → {to}");
            }
        }
    }

    #[test]
    fn every_word_parses_back() {
        for status in JobStatus::ALL {
            assert_eq!(JobStatus::parse(status.as_str()), Some(status));
            assert_eq!(serde_json::to_value(status).expect("json"), status.as_str());
        }
        assert_eq!(JobStatus::parse("paused"), None);
    }

    #[test]
    fn a_job_succeeds_only_out_of_running() {
        assert_eq!(sources_of(JobStatus::Succeeded), [JobStatus::Running]);
    }
}
