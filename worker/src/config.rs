//! What a worker is told at its start.

use crate::child::ChildCommand;
use crate::model_cache::DEFAULT_TUNED_CACHE_BYTES;
use std::path::PathBuf;
use std::time::Duration;
use tunesmith_store::lease::LEASE_RENEWAL;

/// How a worker works. Made with [`WorkerConfig::new`], then changed field by field.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Base models are kept here, under `models/{id}`; workers may share it.
    pub cache_dir: PathBuf,
    /// Bytes of it that models which were tuned in full take at most, but for those in use.
    pub tuned_cache_bytes: u64,
    /// Files and checkpoints of the job at hand; workers may share it. Nothing in it outlives a
    /// worker's process by more than the start of the next one.
    pub work_dir: PathBuf,
    /// The trainer's device: `auto`, `cpu`, `cuda`, `cuda:N`, or a list of GPUs.
    pub device: String,
    /// The program that trains.
    pub trainer: ChildCommand,
    /// How long an idle worker waits before it looks for a job unasked. A notification wakes it
    /// sooner, so this is the wait for a job whose notification was lost or whose lease ran out.
    pub poll_interval: Duration,
    /// Time between two renewals of a lease.
    pub renew_interval: Duration,
    /// The oldest that a step's metrics grow before they are written.
    pub flush_interval: Duration,
    /// How long a trainer that was told to stop may take to finish its step and its checkpoint.
    pub stop_grace: Duration,
    /// How long a trainer that said its last word may take to exit.
    pub exit_grace: Duration,
}

impl WorkerConfig {
    /// The usual times, with the given places and trainer.
    #[must_use]
    pub fn new(
        cache_dir: impl Into<PathBuf>,
        work_dir: impl Into<PathBuf>,
        device: impl Into<String>,
        trainer: ChildCommand,
    ) -> Self {
        Self {
            cache_dir: cache_dir.into(),
            tuned_cache_bytes: DEFAULT_TUNED_CACHE_BYTES,
            work_dir: work_dir.into(),
            device: device.into(),
            trainer,
            poll_interval: Duration::from_secs(5),
            renew_interval: LEASE_RENEWAL,
            flush_interval: Duration::from_secs(1),
            stop_grace: Duration::from_secs(120),
            exit_grace: Duration::from_secs(10),
        }
    }
}
