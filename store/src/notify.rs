//! Waking who waits: PostgreSQL's LISTEN and NOTIFY.
//!
//! A notification carries no data and may be lost when a connection breaks, so a waiter also
//! looks from time to time; it only makes that look come sooner.

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
}

impl Channel {
    /// The channel's name in PostgreSQL.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Validation => "tunesmith_validation",
            Self::Queue => "tunesmith_queue",
        }
    }
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
        match tokio::time::timeout(at_most, self.listener.try_recv()).await {
            Ok(woken) => woken.map(drop).map_err(StoreError::from),
            Err(_elapsed) => Ok(()),
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
