//! What is to be done from time to time, whoever does it.

use std::time::Duration;
use tokio::sync::watch;
use tunesmith_store::Store;
use tunesmith_store::imports::IMPORT_SILENCE;

const EVERY: Duration = Duration::from_secs(600);

/// Removes what nobody needs any more, expired files first of all, until `stopped` turns true.
pub(crate) async fn run(store: Store, mut stopped: watch::Receiver<bool>) {
    while !*stopped.borrow() {
        match store.purge_files().await {
            Ok(0) => {}
            Ok(files) => tracing::info!(files, "expired files removed"),
            Err(error) => tracing::warn!(%error, "expired files could not be removed"),
        }
        match store.purge_uploads().await {
            Ok(0) => {}
            Ok(uploads) => tracing::info!(uploads, "ended uploads cleared away"),
            Err(error) => tracing::warn!(%error, "ended uploads could not be cleared away"),
        }
        match store.purge_weights().await {
            Ok(0) => {}
            Ok(models) => tracing::info!(models, "weights of deleted models removed"),
            Err(error) => tracing::warn!(%error, "weights of deleted models could not be removed"),
        }
        match store.purge_imports(IMPORT_SILENCE).await {
            Ok(0) => {}
            Ok(imports) => tracing::info!(imports, "what lost imports had left removed"),
            Err(error) => tracing::warn!(%error, "lost imports could not be cleared away"),
        }
        if let Err(error) = store.purge_deliveries().await {
            tracing::warn!(%error, "old webhook deliveries could not be forgotten");
        }
        if let Err(error) = store.purge_creations().await {
            tracing::warn!(%error, "old requests could not be forgotten");
        }
        let _ = tokio::time::timeout(EVERY, stopped.changed()).await;
    }
}
