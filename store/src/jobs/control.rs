//! What an owner does to a job: cancel, pause, resume. And how any job leaves a state.

use super::{Job, words};
use crate::events::{self, NewEvent, add_events};
use crate::notify::Channel;
use crate::{Store, StoreError, database};
use sqlx::types::Json;
use sqlx::{PgConnection, Row as _};
use tunesmith_core::errors::ApiError;
use tunesmith_core::ids::{JobId, ProjectId};
use tunesmith_core::state::{JobStatus, sources_of};

impl Store {
    /// Ends a job: at once, or, while a worker holds it, as soon as the worker hears of it, which
    /// it does within the time between two renewals of its lease.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or [`StoreError::InvalidState`] for a job that has ended.
    pub async fn request_cancel(&self, project: &ProjectId, id: &JobId) -> Result<Job, StoreError> {
        let mut transaction = database::begin(&self.pool).await?;
        let locked = lock(&mut transaction, project, id).await?;
        if locked.is_held {
            sqlx::query("UPDATE jobs SET cancel_requested = true WHERE id = $1")
                .bind(id.as_str())
                .execute(&mut *transaction)
                .await?;
        } else {
            let departure = Departure::to(JobStatus::Cancelled, NewEvent::cancelled());
            depart(&mut transaction, id, &departure).await?;
        }
        transaction.commit().await?;
        self.job(project, id).await
    }

    /// Lets a job rest: one that waits at once, one that runs after a checkpoint. Resting already
    /// is no error.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or [`StoreError::InvalidState`] for a job that has ended.
    pub async fn pause_job(&self, project: &ProjectId, id: &JobId) -> Result<Job, StoreError> {
        let mut transaction = database::begin(&self.pool).await?;
        let locked = lock(&mut transaction, project, id).await?;
        let event = if locked.is_held { NewEvent::pausing() } else { NewEvent::paused() };
        set_paused(&mut transaction, id, &locked, true, event).await?;
        transaction.commit().await?;
        self.job(project, id).await
    }

    /// Lets a job that rests go on. One that does not rest is no error.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or [`StoreError::InvalidState`] for a job that has ended.
    pub async fn resume_job(&self, project: &ProjectId, id: &JobId) -> Result<Job, StoreError> {
        let mut transaction = database::begin(&self.pool).await?;
        let locked = lock(&mut transaction, project, id).await?;
        set_paused(&mut transaction, id, &locked, false, NewEvent::resumed()).await?;
        transaction.commit().await?;
        self.job(project, id).await
    }
}

/// What was found of a job whose row is now locked.
struct Locked {
    paused: bool,
    /// Whether a worker holds it with a lease that has not run out.
    is_held: bool,
}

/// Locks an unfinished job of `project`.
async fn lock(
    connection: &mut PgConnection,
    project: &ProjectId,
    id: &JobId,
) -> Result<Locked, StoreError> {
    let row = sqlx::query(
        "SELECT status, paused, coalesce(lease_expires_at > now(), false) AS is_held FROM jobs
         WHERE id = $1 AND project_id = $2 FOR UPDATE",
    )
    .bind(id.as_str())
    .bind(project.as_str())
    .fetch_optional(connection)
    .await?
    .ok_or_else(|| StoreError::not_found("job", id))?;
    let status = crate::rows::word(&row, "status", JobStatus::parse)?;
    if status.is_terminal() {
        return Err(StoreError::InvalidState { job: id.clone(), status });
    }
    Ok(Locked { paused: row.try_get("paused")?, is_held: row.try_get("is_held")? })
}

async fn set_paused(
    connection: &mut PgConnection,
    id: &JobId,
    locked: &Locked,
    paused: bool,
    event: NewEvent,
) -> Result<(), StoreError> {
    if locked.paused == paused {
        return Ok(());
    }
    sqlx::query(
        "WITH woken AS (SELECT pg_notify($3, ''))
                 UPDATE jobs SET paused = $2 FROM woken WHERE id = $1",
    )
    .bind(id.as_str())
    .bind(paused)
    .bind(Channel::Queue.as_str())
    .execute(&mut *connection)
    .await?;
    events::insert(connection, id, &[event]).await
}

/// How a job leaves the state that it is in, whoever held it.
pub(crate) struct Departure {
    /// Where it goes.
    pub(crate) next: JobStatus,
    /// Why, if it failed.
    pub(crate) error: Option<ApiError>,
    /// Attempts since the last progress, from now on.
    pub(crate) tries: i32,
    /// What its owner reads.
    pub(crate) events: Vec<NewEvent>,
}

impl Departure {
    /// To `next`, which is not `failed`.
    pub(crate) fn to(next: JobStatus, event: NewEvent) -> Self {
        Self { next, error: None, tries: 0, events: vec![event] }
    }

    /// To `failed`.
    pub(crate) fn failed(error: ApiError) -> Self {
        let event = NewEvent::failed(&error);
        Self { next: JobStatus::Failed, error: Some(error), tries: 0, events: vec![event] }
    }
}

/// Moves a job that the transaction has locked, and that no worker holds any more after this.
pub(crate) async fn depart(
    connection: &mut PgConnection,
    id: &JobId,
    departure: &Departure,
) -> Result<(), StoreError> {
    let moved = sqlx::query(concat!(
        "WITH moved AS (
            UPDATE jobs SET status = $2, error = $3, tries = $4, cancel_requested = false,
                worker_id = NULL, lease_expires_at = NULL,
                finished_at = CASE WHEN $5 THEN now() END
            WHERE id = $1 AND status = ANY($6)
            RETURNING id
         ), ",
        add_events!("$7"),
        " SELECT pg_notify($8, '') FROM moved"
    ))
    .bind(id.as_str())
    .bind(departure.next.as_str())
    .bind(departure.error.as_ref().map(Json))
    .bind(departure.tries)
    .bind(departure.next.is_terminal())
    .bind(words(sources_of(departure.next)))
    .bind(Json(&departure.events))
    .bind(Channel::Queue.as_str())
    .fetch_all(&mut *connection)
    .await?;
    if moved.len() == 1 {
        return Ok(());
    }
    let status: String = sqlx::query_scalar("SELECT status FROM jobs WHERE id = $1")
        .bind(id.as_str())
        .fetch_one(connection)
        .await?;
    let status = JobStatus::parse(&status).unwrap_or(departure.next);
    Err(StoreError::InvalidState { job: id.clone(), status })
}
