//! Log lines, to standard error only: standard output belongs to a command's result, and in the
//! trainer to its frames.

use clap::ValueEnum;
use std::io::IsTerminal as _;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, fmt};
use tunesmith_core::spans;

#[cfg(feature = "otel")]
use crate::otel::Export;

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

/// Logging, for as long as this lives. What is still to be exported goes out at its end.
#[derive(Debug)]
#[must_use]
pub(crate) struct Logging {
    #[cfg(feature = "otel")]
    _export: Option<Export>,
}

/// Starts logging for this process. A service may also export its logs and traces.
///
/// # Errors
/// Settings of the export that make no sense.
pub(crate) fn init(format: Format, is_service: bool) -> anyhow::Result<Logging> {
    let lines = fmt::layer().with_writer(std::io::stderr);
    let lines = lines.with_ansi(std::io::stderr().is_terminal());
    let lines = match format {
        Format::Text => lines.boxed(),
        Format::Json => lines.json().flatten_event(true).boxed(),
    };
    let logging = tracing_subscriber::registry().with(lines.with_filter(filter()));
    #[cfg(feature = "otel")]
    {
        let export = if is_service { Export::from_environment()? } else { None };
        logging.with(export.as_ref().map(Export::layer)).init();
        Ok(Logging { _export: export })
    }
    #[cfg(not(feature = "otel"))]
    {
        let _ = is_service;
        logging.init();
        Ok(Logging {})
    }
}

/// What is logged. No line shows the spans around it.
pub(crate) fn filter() -> EnvFilter {
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER));
    match format!("{}=off", spans::TARGET).parse() {
        Ok(no_spans) => filter.add_directive(no_spans),
        Err(_) => filter,
    }
}
