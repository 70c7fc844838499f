//! What a worker does: take a job, hold it, write what it shows, let it go.
//!
//! A lease is 30 s of the database's time. Whoever takes a job raises its `attempt`, and every
//! write names job, attempt and worker, so a worker that lost its lease can change nothing, even
//! if it does not know yet. `worker_id` is set exactly while a job is `running`.

use crate::events::{NewEvent, add_events};
use crate::jobs::{Departure, Job, depart, job_columns, words};
use crate::{Store, StoreError, database, rows};
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use sqlx::{PgConnection, Row as _};
use std::time::Duration;
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::ids::{JobId, WorkerId};
use tunesmith_core::state::{JobStatus, sources_of};

/// How long a lease lasts without renewal.
pub const LEASE_DURATION: Duration = Duration::from_secs(30);
/// How often a worker renews it.
pub const LEASE_RENEWAL: Duration = Duration::from_secs(10);
/// Attempts that may be lost one after another without a new checkpoint.
pub const MAX_TRIES: i32 = 3;

/// The right to write for a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The job.
    pub job_id: JobId,
    /// The fencing token.
    pub attempt: u32,
    /// Who holds it.
    pub worker_id: WorkerId,
}

/// A job that a worker has just taken.
#[derive(Debug, Clone)]
pub struct ClaimedJob {
    /// The job. `resolved` is there, and `resume` says where to go on from.
    pub job: Job,
    /// The right to write for it.
    pub lease: Lease,
}

/// What a renewal brings back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseState {
    /// The owner wants the job to end: kill the trainer and call [`Store::cancel_job`].
    pub cancel_requested: bool,
    /// The owner wants the job to rest: stop at a checkpoint and call [`Store::give_back`].
    pub pause_requested: bool,
}

/// Why a worker lets go of a job that can go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GiveBack {
    /// The worker is stopping.
    WorkerStops,
    /// The owner wants the job to rest.
    Paused,
}

/// Where a job stands whose trainer or worker was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterLoss {
    /// It waits for another attempt.
    Queued,
    /// It has ended: too many losses without progress, or its owner had asked for its end.
    Ended,
}

/// True of the one row that a lease is about, and of none when the lease is lost. Binds `$1` to
/// `$3`. A job has a worker exactly while it is running, so the status need not be asked.
macro_rules! fence {
    () => {
        "jobs.id = $1 AND jobs.attempt = $2 AND jobs.worker_id = $3
         AND jobs.lease_expires_at > now()"
    };
}

/// A query with the three values of [`fence!`] bound.
macro_rules! fenced {
    ($lease:expr, $($sql:tt)+) => {
        sqlx::query(concat!($($sql)+))
            .bind($lease.job_id.as_str())
            .bind(rows::integer($lease.attempt))
            .bind($lease.worker_id.as_str())
    };
}

mod progress;

pub use progress::{Completed, NewCheckpoint, SupersededCheckpoint};

impl Lease {
    fn stale(&self) -> StoreError {
        StoreError::StaleLease { job: self.job_id.clone(), attempt: self.attempt }
    }

    /// The row that a fenced statement returned; none means that the lease is lost.
    fn one(&self, row: Option<PgRow>) -> Result<PgRow, StoreError> {
        row.ok_or_else(|| self.stale())
    }
}

impl Store {
    /// Takes the oldest job that waits for a worker or whose worker was lost.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn claim_job(&self, worker: &WorkerId) -> Result<Option<ClaimedJob>, StoreError> {
        self.end_lost_jobs().await?;
        let job: Option<Job> = sqlx::query_as(concat!(
            "WITH picked AS (
                SELECT id, worker_id IS NOT NULL AS was_lost FROM jobs
                WHERE status = ANY($1) AND NOT paused AND NOT cancel_requested
                  AND (lease_expires_at IS NULL OR (lease_expires_at <= now() AND tries < $2))
                ORDER BY sequence LIMIT 1 FOR UPDATE SKIP LOCKED
             ), taken AS (
                UPDATE jobs SET status = $3, attempt = attempt + 1, tries = tries + 1,
                    worker_id = $4, lease_expires_at = now() + make_interval(secs => $5),
                    started_at = coalesce(started_at, now())
                FROM picked, projects
                WHERE jobs.id = picked.id AND projects.id = jobs.project_id
                RETURNING ",
            job_columns!(),
            "), moved AS (
                SELECT id FROM picked WHERE was_lost
             ), ",
            add_events!("$6"),
            " SELECT * FROM taken"
        ))
        .bind(words(sources_of(JobStatus::Running)))
        .bind(MAX_TRIES)
        .bind(JobStatus::Running.as_str())
        .bind(worker.as_str())
        .bind(LEASE_DURATION.as_secs_f64())
        .bind(Json([NewEvent::worker_lost()]))
        .fetch_optional(&self.pool)
        .await?;
        Ok(job.map(|job| ClaimedJob {
            lease: Lease {
                job_id: job.id.clone(),
                attempt: job.attempt,
                worker_id: worker.clone(),
            },
            job,
        }))
    }

    /// Settles lost jobs that no worker may take over: those whose owner wants them to end or to
    /// rest, and those that were lost too often.
    async fn end_lost_jobs(&self) -> Result<(), StoreError> {
        loop {
            let mut transaction = database::begin(&self.pool).await?;
            let row = sqlx::query(
                "SELECT id, tries, cancel_requested, paused FROM jobs
                 WHERE lease_expires_at <= now()
                   AND (cancel_requested OR paused OR tries >= $1)
                 LIMIT 1 FOR UPDATE SKIP LOCKED",
            )
            .bind(MAX_TRIES)
            .fetch_optional(&mut *transaction)
            .await?;
            let Some(row) = row else { return Ok(()) };
            let id: JobId = rows::text(&row, "id")?;
            let departure = after_loss(&Held::from_row(&row)?, worker_lost());
            depart(&mut transaction, &id, &departure).await?;
            transaction.commit().await?;
        }
    }

    /// Holds a job for another [`LEASE_DURATION`].
    ///
    /// # Errors
    /// [`StoreError::StaleLease`]: kill the trainer, write nothing more.
    pub async fn renew_lease(&self, lease: &Lease) -> Result<LeaseState, StoreError> {
        let row = fenced!(
            lease,
            "UPDATE jobs SET lease_expires_at = now() + make_interval(secs => $4) WHERE ",
            fence!(),
            " RETURNING cancel_requested, paused"
        )
        .bind(LEASE_DURATION.as_secs_f64())
        .fetch_optional(&self.pool)
        .await?;
        let row = lease.one(row)?;
        Ok(LeaseState {
            cancel_requested: row.try_get("cancel_requested")?,
            pause_requested: row.try_get("paused")?,
        })
    }

    /// Ends a job that cannot go on.
    ///
    /// # Errors
    /// [`StoreError::StaleLease`].
    pub async fn fail_job(&self, lease: &Lease, error: ApiError) -> Result<(), StoreError> {
        self.let_go(lease, |_| Departure::failed(error)).await.map(drop)
    }

    /// Ends a job whose owner asked for that.
    ///
    /// # Errors
    /// [`StoreError::StaleLease`].
    pub async fn cancel_job(&self, lease: &Lease) -> Result<(), StoreError> {
        self.let_go(lease, |_| Departure::to(JobStatus::Cancelled, NewEvent::cancelled()))
            .await
            .map(drop)
    }

    /// Lets go of a job that can go on from its last checkpoint. The attempt is not counted.
    ///
    /// # Errors
    /// [`StoreError::StaleLease`].
    pub async fn give_back(&self, lease: &Lease, reason: GiveBack) -> Result<(), StoreError> {
        self.let_go(lease, |held| {
            if held.cancel_requested {
                return Departure::to(JobStatus::Cancelled, NewEvent::cancelled());
            }
            let event = match reason {
                GiveBack::WorkerStops => NewEvent::given_back(),
                GiveBack::Paused => NewEvent::paused(),
            };
            let tries = (held.tries - 1).max(0);
            Departure { tries, ..Departure::to(JobStatus::Queued, event) }
        })
        .await
        .map(drop)
    }

    /// Lets go of a job whose trainer was lost. It goes on from its last checkpoint in another
    /// attempt, or fails with `error` if this was one too many without progress.
    ///
    /// # Errors
    /// [`StoreError::StaleLease`].
    pub async fn lose_job(&self, lease: &Lease, error: ApiError) -> Result<AfterLoss, StoreError> {
        let next = self.let_go(lease, |held| after_loss(held, error)).await?;
        Ok(if next.is_terminal() { AfterLoss::Ended } else { AfterLoss::Queued })
    }

    /// Ends the lease in the way that `decide` finds right for what the locked row says.
    async fn let_go(
        &self,
        lease: &Lease,
        decide: impl FnOnce(&Held) -> Departure,
    ) -> Result<JobStatus, StoreError> {
        let mut transaction = database::begin(&self.pool).await?;
        let held = lock(&mut transaction, lease).await?;
        let departure = decide(&held);
        depart(&mut transaction, &lease.job_id, &departure).await?;
        transaction.commit().await?;
        Ok(departure.next)
    }
}

/// What matters of a job that a worker holds or held.
struct Held {
    tries: i32,
    cancel_requested: bool,
    paused: bool,
}

impl Held {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            tries: row.try_get("tries")?,
            cancel_requested: row.try_get("cancel_requested")?,
            paused: row.try_get("paused")?,
        })
    }
}

async fn lock(connection: &mut PgConnection, lease: &Lease) -> Result<Held, StoreError> {
    let row = fenced!(
        lease,
        "SELECT tries, cancel_requested, paused FROM jobs WHERE ",
        fence!(),
        " FOR UPDATE"
    )
    .fetch_optional(connection)
    .await?;
    Ok(Held::from_row(&lease.one(row)?)?)
}

fn after_loss(held: &Held, error: ApiError) -> Departure {
    if held.cancel_requested {
        Departure::to(JobStatus::Cancelled, NewEvent::cancelled())
    } else if held.tries >= MAX_TRIES {
        Departure::failed(error)
    } else {
        let mut departure = Departure::to(JobStatus::Queued, NewEvent::worker_lost());
        departure.tries = held.tries;
        if held.paused {
            departure.events.push(NewEvent::paused());
        }
        departure
    }
}

fn worker_lost() -> ApiError {
    ApiError::new(
        ErrorCode::WorkerLost,
        format!(
            "The worker was lost {MAX_TRIES} times without a new checkpoint between. Its memory \
             may be too small for the job: try a smaller batch_size or max_seq_length, or a \
             smaller checkpoint_steps."
        ),
    )
}

#[cfg(test)]
mod tests;
