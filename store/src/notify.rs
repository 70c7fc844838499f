//! Waking who waits: PostgreSQL's LISTEN and NOTIFY.
//!
//! A notification may be lost when a connection breaks, so a waiter also looks from time to time;
//! it only makes that look come sooner. What it says is at most whose turn it is to be looked at.

use crate::{Store, StoreError};
use sqlx::postgres::PgListener;
use std::time::Duration;

/// What a waiter waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// A job came whose files are to be validated.
    Validation,
    /// A job was queued.
    Queue,
    /// A job has new events or metrics; the notification says which job. A trigger sends it.
    Progress,
    /// A batch came, or was given up.
    Batches,
    /// There is something to tell a webhook endpoint.
    Webhooks,
    /// A report on a file is wanted.
    Reports,
}

impl Channel {
    /// The channel's name in PostgreSQL.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Validation => "tunesmith_validation",
            Self::Queue => "tunesmith_queue",
            Self::Progress => "tunesmith_progress",
            Self::Batches => "tunesmith_batches",
            Self::Webhooks => "tunesmith_webhooks",
            Self::Reports => "tunesmith_reports",
        }
    }
}

/// Why a waiter woke.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Woken {
    /// By a notification that said this.
    By(String),
    /// The time is over, or the connection broke and was made again, so that notifications may
    /// have been lost.
    Unsure,
}

/// One who waits. Holds a connection of its own for as long as it lives.
#[derive(Debug)]
pub struct Listener {
    listener: PgListener,
}

impl Listener {
    /// Wakes at the next notification, or after `at_most`; then look. Also wakes when the
    /// connection broke and was made again, as a notification may have been lost meanwhile.
    ///
    /// # Errors
    /// The connection broke and could not be made again; wait a little before another try.
    pub async fn wait(&mut self, at_most: Duration) -> Result<(), StoreError> {
        self.next(at_most).await.map(drop)
    }

    /// The same, with what the notification said.
    ///
    /// # Errors
    /// As for [`wait`](Self::wait).
    pub async fn next(&mut self, at_most: Duration) -> Result<Woken, StoreError> {
        match tokio::time::timeout(at_most, self.listener.try_recv()).await {
            Ok(Ok(Some(notification))) => Ok(Woken::By(notification.payload().to_owned())),
            Ok(Ok(None)) | Err(_) => Ok(Woken::Unsure),
            Ok(Err(error)) => Err(error.into()),
        }
    }
}

impl Store {
    /// Listens to `channel` from now on.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn listen(&self, channel: Channel) -> Result<Listener, StoreError> {
        let mut listener = PgListener::connect_with(&self.pool).await?;
        listener.listen(channel.as_str()).await?;
        Ok(Listener { listener })
    }
}

#[cfg(test)]
mod tests;
