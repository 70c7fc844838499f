//! Ctrl-C and SIGTERM: the first asks for an orderly end, the second ends at once.

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit code of a process that a second signal cut short, by the shells' convention for SIGINT.
const FORCED: i32 = 130;

/// A token that is cancelled by the first signal. A second signal exits the process; the trainer
/// and PostgreSQL end with it, as they do when it is killed.
///
/// # Errors
/// When the signal handlers cannot be installed.
pub(crate) fn on_signal() -> anyhow::Result<CancellationToken> {
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT has no handler")?;
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM has no handler")?;
    let token = CancellationToken::new();
    let cancelled = token.clone();
    tokio::spawn(async move {
        let name = next(&mut interrupt, &mut terminate).await;
        tracing::info!(signal = name, "stopping; a second signal stops at once");
        cancelled.cancel();
        let name = next(&mut interrupt, &mut terminate).await;
        tracing::warn!(signal = name, "stopped at once");
        std::process::exit(FORCED);
    });
    Ok(token)
}

async fn next(interrupt: &mut Signal, terminate: &mut Signal) -> &'static str {
    tokio::select! {
        _ = interrupt.recv() => "SIGINT",
        _ = terminate.recv() => "SIGTERM",
    }
}
