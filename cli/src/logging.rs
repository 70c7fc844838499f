//! Log lines, to standard error only: standard output belongs to a command's result, and in the
//! trainer to its frames.

use clap::ValueEnum;
use std::io::IsTerminal as _;
use tracing_subscriber::{EnvFilter, fmt};

/// What a log line looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For a person.
    Text,
    /// One JSON object a line, for a log collector.
    Json,
}

/// What is logged without RUST_LOG: our own doings, and other crates' warnings. A statement that
/// took more than a second would be logged with its whole text, pages of it for the schema's, on
/// any machine that is busy for a moment: `RUST_LOG=sqlx::query=warn` is for who looks for these.
const DEFAULT_FILTER: &str = "warn,sqlx::query=error,tunesmith=info,tunesmith_api=info,\
                              tunesmith_engine=info,tunesmith_store=info,tunesmith_worker=info";

/// Starts logging for this process.
pub(crate) fn init(format: Format) {
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER));
    let lines = fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match format {
        Format::Text => lines.init(),
        Format::Json => lines.json().flatten_event(true).init(),
    }
}
