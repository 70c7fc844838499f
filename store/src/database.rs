//! The connection pool, its transactions and the schema.

use crate::StoreError;
use sqlx::migrate::Migrator;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Connection as _, PgPool, Postgres, Transaction};
use std::time::Duration;

/// Every migration, embedded.
pub(crate) static MIGRATIONS: Migrator = sqlx::migrate!("../migrations");

/// Connections that the pool of a process holds at most, and those of its threads together: a request
/// takes one for milliseconds. Each thread has one more, for looks at jobs.
pub(crate) const MAX_CONNECTIONS: u32 = 16;

/// A connection that was in use so short a time ago is taken to live: asking it costs about as much
/// as the statement that it is wanted for. No database restarts as fast.
const TRUSTED_FOR: Duration = Duration::from_millis(100);

/// A pool on `url` whose database has answered once.
pub(crate) async fn connect(url: &str) -> Result<PgPool, StoreError> {
    let options: PgConnectOptions = url.parse()?;
    let options = options.application_name("tunesmith").options([
        // A transaction whose client hangs must not hold its locks for ever.
        ("idle_in_transaction_session_timeout", "30s"),
    ]);
    Ok(pool_of(MAX_CONNECTIONS).connect_with(options).await?)
}

/// A pool on the database of `pool` whose at most `most` connections are opened as they are needed.
/// It closes when `pool` does.
pub(crate) fn another(pool: &PgPool, most: u32) -> PgPool {
    let other = pool_of(most).connect_lazy_with(PgConnectOptions::clone(&pool.connect_options()));
    let (closed, closing) = (pool.close_event(), other.clone());
    tokio::spawn(async move {
        closed.await;
        closing.close().await;
    });
    other
}

fn pool_of(most: u32) -> PgPoolOptions {
    PgPoolOptions::new()
        .max_connections(most)
        .acquire_timeout(Duration::from_secs(10))
        .test_before_acquire(false)
        .before_acquire(|connection, found| {
            Box::pin(
                async move { Ok(found.idle_for < TRUSTED_FOR || connection.ping().await.is_ok()) },
            )
        })
}

/// Begins a transaction, whatever becomes of the caller. Nothing else in this crate may begin one.
///
/// sqlx 0.9.0 leaves the transaction open in the pool when `Pool::begin` is dropped half-way, as
/// happens when a client hangs up. In a task of its own it always runs to its end, and a
/// transaction that nobody waits for any more is rolled back as it is dropped.
pub(crate) async fn begin(pool: &PgPool) -> Result<Transaction<'static, Postgres>, StoreError> {
    let pool = pool.clone();
    match tokio::spawn(async move { pool.begin().await }).await {
        Ok(begun) => Ok(begun?),
        // Only a runtime that shuts down cancels the task.
        Err(_) => Err(StoreError::Database(sqlx::Error::PoolClosed)),
    }
}

#[cfg(test)]
mod tests;
