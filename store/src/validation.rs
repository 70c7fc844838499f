//! Jobs whose files are being read: who reads them, and how it ends.

use crate::events::{NewEvent, add_events};
use crate::jobs::{Departure, Job, depart, job_columns};
use crate::notify::Channel;
use crate::{Store, StoreError, database};
use sqlx::types::Json;
use std::time::Duration;
use tunesmith_core::errors::ApiError;
use tunesmith_core::hyperparameters::ResolvedHyperparameters;
use tunesmith_core::ids::JobId;
use tunesmith_core::state::JobStatus;

/// How long a validator has a job to itself. One that needs longer says so in time with
/// [`Store::keep_validating`]; one that is lost costs the job this long.
pub const VALIDATION_CLAIM: Duration = Duration::from_secs(60);

/// What came out of a job's files when they are in order.
#[derive(Debug, Clone)]
pub struct Validated {
    /// The hyperparameters with nothing left to choose.
    pub resolved: ResolvedHyperparameters,
    /// What the owner should know: what the rows were read as, warnings.
    pub events: Vec<NewEvent>,
}

impl Store {
    /// Takes the oldest job whose files nobody is reading. No lock is held: two validators may
    /// come to read one job, and the first to finish decides.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn claim_for_validation(&self) -> Result<Option<Job>, StoreError> {
        Ok(sqlx::query_as(concat!(
            "UPDATE jobs SET validate_after = now() + make_interval(secs => $1)
             FROM projects
             WHERE projects.id = jobs.project_id AND jobs.id = (
                 SELECT id FROM jobs WHERE status = $2 AND validate_after <= now()
                 ORDER BY sequence LIMIT 1 FOR UPDATE SKIP LOCKED)
             RETURNING ",
            job_columns!()
        ))
        .bind(VALIDATION_CLAIM.as_secs_f64())
        .bind(JobStatus::ValidatingFiles.as_str())
        .fetch_optional(&self.pool)
        .await?)
    }

    /// Keeps other validators away for another [`VALIDATION_CLAIM`].
    ///
    /// # Errors
    /// [`StoreError::Superseded`] if the job is no longer being validated: stop.
    pub async fn keep_validating(&self, id: &JobId) -> Result<(), StoreError> {
        let kept = sqlx::query(
            "UPDATE jobs SET validate_after = now() + make_interval(secs => $2)
             WHERE id = $1 AND status = $3",
        )
        .bind(id.as_str())
        .bind(VALIDATION_CLAIM.as_secs_f64())
        .bind(JobStatus::ValidatingFiles.as_str())
        .execute(&self.pool)
        .await?;
        if kept.rows_affected() == 1 { Ok(()) } else { Err(superseded(id)) }
    }

    /// Lets a job queue whose files are in order.
    ///
    /// # Errors
    /// [`StoreError::Superseded`] if it is no longer being validated.
    pub async fn accept_files(&self, id: &JobId, validated: Validated) -> Result<(), StoreError> {
        let mut events = validated.events;
        events.push(NewEvent::files_validated());
        let moved = sqlx::query(concat!(
            "WITH moved AS (
                UPDATE jobs SET status = $2, resolved = $3 WHERE id = $1 AND status = $4
                RETURNING id
             ), ",
            add_events!("$5"),
            " SELECT pg_notify($6, '') FROM moved"
        ))
        .bind(id.as_str())
        .bind(JobStatus::Queued.as_str())
        .bind(Json(&validated.resolved))
        .bind(JobStatus::ValidatingFiles.as_str())
        .bind(Json(&events))
        .bind(Channel::Queue.as_str())
        .fetch_all(&self.pool)
        .await?;
        if moved.len() == 1 { Ok(()) } else { Err(superseded(id)) }
    }

    /// Fails a job whose files break a rule.
    ///
    /// # Errors
    /// [`StoreError::Superseded`] if it is no longer being validated.
    pub async fn refuse_files(&self, id: &JobId, error: ApiError) -> Result<(), StoreError> {
        let mut transaction = database::begin(&self.pool).await?;
        sqlx::query("SELECT 1 FROM jobs WHERE id = $1 AND status = $2 FOR UPDATE")
            .bind(id.as_str())
            .bind(JobStatus::ValidatingFiles.as_str())
            .fetch_optional(&mut *transaction)
            .await?
            .ok_or_else(|| superseded(id))?;
        depart(&mut transaction, id, &Departure::failed(error)).await?;
        transaction.commit().await?;
        Ok(())
    }
}

fn superseded(id: &JobId) -> StoreError {
    StoreError::Superseded { job: id.clone() }
}

#[cfg(test)]
mod tests;
