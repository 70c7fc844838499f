//! Work that waits in the database, done as it comes, by as many processes as there are.

use std::future::Future;
use std::time::Duration;
use tokio::sync::watch;
use tunesmith_store::notify::{Channel, Listener};
use tunesmith_store::{Store, StoreError};

/// After an error, before the next try.
const PAUSE: Duration = Duration::from_secs(1);

/// A kind of work.
pub(crate) trait Work: Send + Sync {
    /// Wakes who waits for it. A notification may be lost.
    const CHANNEL: Channel;
    /// What it is, for the log.
    const NAME: &'static str;

    /// Where it waits.
    fn store(&self) -> &Store;

    /// Does a piece of it, or says how long to wait at most, where there is none.
    fn next(&self) -> impl Future<Output = Result<Option<Duration>, StoreError>> + Send;
}

/// Works until `stopped` turns true; a piece at hand is finished first.
pub(crate) async fn work_off<W: Work>(work: &W, mut stopped: watch::Receiver<bool>) {
    let mut listener = None;
    while !*stopped.borrow() {
        let round = match work.next().await {
            Ok(None) => continue,
            Ok(Some(at_most)) => wait(work, &mut listener, at_most).await,
            Err(error) => Err(error),
        };
        let Err(error) = round else { continue };
        tracing::warn!(%error, "{} paused; it goes on in a moment", W::NAME);
        listener = None;
        // Also ends at once when the server stops.
        let _ = tokio::time::timeout(PAUSE, stopped.changed()).await;
    }
}

/// The same, but a piece at hand is dropped when `stopped` turns true: another process takes it up
/// when its claim runs out.
pub(crate) async fn work_off_until<W: Work>(work: &W, mut stopped: watch::Receiver<bool>) {
    let working = work_off(work, stopped.clone());
    tokio::select! {
        () = working => {}
        _ = stopped.wait_for(|stop| *stop) => {}
    }
}

async fn wait<W: Work>(
    work: &W,
    listener: &mut Option<Listener>,
    at_most: Duration,
) -> Result<(), StoreError> {
    match listener {
        Some(listener) => listener.wait(at_most).await,
        None => {
            // What came before the listener was there is found by looking once more.
            *listener = Some(work.store().listen(W::CHANNEL).await?);
            Ok(())
        }
    }
}
