//! tunesmith-store: where tunesmith keeps things.
//!
//! The only crate that speaks SQL or to an object store. Rows lie in PostgreSQL, everything large
//! in object storage. [`Store`] holds both; its methods are spread over the modules by what they
//! are about. Every write of a worker goes through a [`lease::Lease`] and is fenced by it.

pub mod base_models;
pub mod batches;
pub mod checkpoints;
mod database;
pub mod embedded;
mod error;
pub mod events;
pub mod export_checks;
pub mod file_reports;
pub mod files;
#[cfg(any(test, feature = "test-support"))]
mod fixture_mode;
#[cfg(test)]
mod fixtures;
pub mod idempotency;
pub mod imports;
pub mod jobs;
pub mod lease;
pub mod metrics;
pub mod models;
pub mod notify;
pub mod objects;
pub mod page;
pub mod permissions;
pub mod request_budgets;
pub mod row_losses;
mod rows;
pub mod samplers;
pub mod tenants;
#[cfg(any(test, feature = "test-support"))]
pub mod test_db;
pub mod uploads;
pub mod validation;
pub mod watch;
pub mod webhooks;
mod weights;
mod words;

pub use error::StoreError;

use jobs::Looks;
use objects::Objects;
use sqlx::PgPool;
use std::sync::Arc;

/// Connections that a thread may have in any case.
const MIN_SHARE: u32 = 2;

/// What a [`Store`] connects to.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// `postgres://…`.
    pub database_url: String,
    /// `file:///…`, `s3://…`, `gs://…`, `az://…` or `memory:///`.
    pub object_store_url: String,
}

/// PostgreSQL and object storage together. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    pool: PgPool,
    /// Where looks at single jobs are read.
    look_pool: PgPool,
    objects: Objects,
    looks: Arc<Looks>,
}

impl Store {
    /// Connects to both; the database must answer.
    ///
    /// # Errors
    /// A URL of an unknown form, or a database that does not answer.
    pub async fn connect(config: &StoreConfig) -> Result<Self, StoreError> {
        let objects = Objects::open(&config.object_store_url)?;
        let pool = database::connect(&config.database_url).await?;
        Ok(Self { look_pool: pool.clone(), pool, objects, looks: Arc::default() })
    }

    /// The same store for one of `threads` threads that each have a runtime of their own: over
    /// connections that the thread's runtime opens, and drives without waking another thread. To
    /// be called in that runtime.
    #[must_use]
    pub fn of_thread(&self, threads: usize) -> Self {
        let share = database::MAX_CONNECTIONS / u32::try_from(threads).unwrap_or(u32::MAX);
        let pool = database::another(&self.pool, share.max(MIN_SHARE));
        // One look is on its way at a time. Always on the same connection: a pool goes through all that it
        // has in turn, and each of them is a process of the database that has to be woken and whose memory
        // has gone cold.
        let look_pool = database::another(&self.pool, 1);
        Self { pool, look_pool, objects: self.objects.clone(), looks: Arc::default() }
    }

    /// Brings the schema up to this program's version; safe to run by many at once.
    ///
    /// # Errors
    /// A database that is newer than this program, or what the database says.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        database::MIGRATIONS.run(&self.pool).await?;
        Ok(())
    }

    /// Whether the database answers.
    ///
    /// # Errors
    /// What it says, or that it is silent.
    pub async fn ping(&self) -> Result<(), StoreError> {
        sqlx::query("SELECT 1").execute(&self.pool).await?;
        Ok(())
    }

    /// The object storage.
    #[must_use]
    pub fn objects(&self) -> &Objects {
        &self.objects
    }

    /// Closes the connections to the database, after those in use are done.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}
