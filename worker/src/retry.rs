//! Trying again when the database or the object store did not answer.

use backon::{BackoffBuilder as _, ExponentialBuilder, Retryable as _};
use std::time::Duration;
use tunesmith_store::StoreError;

/// How the waits between tries grow: quickly to two seconds, and then on and on. What ends the
/// tries is the lease: its own clock runs out while the database is away.
fn policy() -> ExponentialBuilder {
    ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(Duration::from_secs(2))
        .with_jitter()
        .without_max_times()
}

/// The waits of [`policy`], for a loop of its own.
pub(crate) fn waits() -> impl Iterator<Item = Duration> {
    policy().build()
}

/// Does `operation`, again and again while its errors are transient. `what` is for the log.
pub(crate) async fn retry<T, F>(
    what: &'static str,
    operation: impl FnMut() -> F,
) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    operation
        .retry(policy())
        .when(StoreError::is_transient)
        .notify(|error, wait| {
            tracing::warn!(%error, operation = what, ?wait, "the store is away; trying again");
        })
        .await
}
