//! `tunesmith sample`: the sampler's child, which answers with one base model.

use std::process::ExitCode;

/// Speaks the sampler's protocol on standard input and output until the input ends.
pub(crate) fn run() -> ExitCode {
    tunesmith_engine::serve::run_sampler()
}
