//! `tunesmith train`: the worker's child, which trains one job.

use std::process::ExitCode;

/// Speaks the worker's protocol on standard input and output until the job is done.
pub(crate) fn run() -> ExitCode {
    tunesmith_engine::child::run_trainer()
}
