//! The connection pool, its transactions and the schema.

use crate::StoreError;
use sqlx::migrate::Migrator;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{PgPool, Postgres, Transaction};
use std::time::Duration;

/// Every migration, embedded.
pub(crate) static MIGRATIONS: Migrator = sqlx::migrate!("../migrations");

/// Connections that one process holds at most: a request takes one for milliseconds.
const MAX_CONNECTIONS: u32 = 16;

/// A pool on `url` whose database has answered once.
pub(crate) async fn connect(url: &str) -> Result<PgPool, StoreError> {
    let options: PgConnectOptions = url.parse()?;
    let options = options.application_name("tunesmith").options([
        // A transaction whose client hangs must not hold its locks for ever.
        ("idle_in_transaction_session_timeout", "30s"),
    ]);
    Ok(PgPoolOptions::new()
        .max_connections(MAX_CONNECTIONS)
        .acquire_timeout(Duration::from_secs(10))
        .connect_with(options)
        .await?)
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
