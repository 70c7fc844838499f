//! What a job says, read in the order in which it was said, by those who watch it live.
//!
//! Everything that a job says is written under its row's lock, so within a job a place in the
//! sequence is reached once all before it is there: nothing turns up behind a reader.

use crate::events::{EVENT_SEQUENCE, Event};
use crate::metrics::{step_metrics, steps_of_job};
use crate::page::PageRequest;
use crate::{Store, StoreError, rows};
use sqlx::postgres::PgRow;
use sqlx::{FromRow as _, Row as _};
use tunesmith_core::ids::{JobId, ProjectId};
use tunesmith_core::metrics::StepMetrics;
use tunesmith_core::state::JobStatus;

/// What can be watched of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Topic {
    /// Its events.
    Events,
    /// Its loss curve.
    Metrics,
}

/// One thing that a job said.
#[derive(Debug, Clone, PartialEq)]
pub enum Said {
    /// An event.
    Event(Event),
    /// The figures of a step. A resumed run may say a step again; what is said last holds.
    Step(StepMetrics),
}

/// What a job said since a place, oldest first.
#[derive(Debug, Clone, PartialEq)]
pub struct News {
    /// Each with its place.
    pub said: Vec<(i64, Said)>,
    /// Whether `said` is all that the job will ever have said from that place on.
    pub is_complete: bool,
}

/// How far a job has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// Which job.
    pub job: JobId,
    events: i64,
    metrics: i64,
    /// Whether it will say nothing more.
    pub has_ended: bool,
}

impl Standing {
    /// The place of the last thing that it said; 0 for nothing.
    #[must_use]
    pub fn place(&self, topic: Topic) -> i64 {
        match topic {
            Topic::Events => self.events,
            Topic::Metrics => self.metrics,
        }
    }
}

/// Rows that are read at a time.
const BATCH: usize = 500;

impl Store {
    /// What the job said after `place`, 0 for its beginning; at most a few hundred at a time.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] for a job that is not there.
    pub async fn news(&self, job: &JobId, topic: Topic, place: i64) -> Result<News, StoreError> {
        // First whether it has ended: then all that it said is there when that is read.
        let status = sqlx::query("SELECT status FROM jobs WHERE id = $1")
            .bind(job.as_str())
            .fetch_optional(&self.pool)
            .await?
            .ok_or_else(|| StoreError::not_found("job", job))?;
        let has_ended = rows::word(&status, "status", JobStatus::parse)?.is_terminal();
        let statement = match topic {
            Topic::Events => {
                "SELECT sequence, id, created_at, level, type, message, data FROM job_events
                 WHERE job_id = $1 AND sequence > $2 ORDER BY sequence LIMIT $3"
            }
            Topic::Metrics => {
                concat!(steps_of_job!(), " AND sequence > $2 ORDER BY sequence LIMIT $3")
            }
        };
        let found = sqlx::query(statement)
            .bind(job.as_str())
            .bind(place)
            .bind(BATCH as i64)
            .fetch_all(&self.pool)
            .await?;
        let said = found.iter().map(|row| said(topic, row)).collect::<sqlx::Result<Vec<_>>>()?;
        let is_complete = has_ended && said.len() < BATCH;
        Ok(News { said, is_complete })
    }

    /// How far each of `jobs` has come; one query, however many they are.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn standings(&self, jobs: &[JobId]) -> Result<Vec<Standing>, StoreError> {
        let ids: Vec<&str> = jobs.iter().map(JobId::as_str).collect();
        let found = sqlx::query(
            "SELECT id, status,
                 (SELECT coalesce(max(sequence), 0) FROM job_events WHERE job_id = id) AS events,
                 (SELECT coalesce(max(sequence), 0) FROM job_metrics WHERE job_id = id) AS metrics
             FROM jobs WHERE id = ANY($1)",
        )
        .bind(ids)
        .fetch_all(&self.pool)
        .await?;
        let standing = |row: &PgRow| {
            Ok(Standing {
                job: rows::text(row, "id")?,
                events: row.try_get("events")?,
                metrics: row.try_get("metrics")?,
                has_ended: rows::word(row, "status", JobStatus::parse)?.is_terminal(),
            })
        };
        Ok(found.iter().map(standing).collect::<sqlx::Result<_>>()?)
    }

    /// The place of the event `id` of a job of `project`; the beginning for none.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if `project` has no such job, [`StoreError::UnknownCursor`].
    pub async fn place_of_event(
        &self,
        project: &ProjectId,
        job: &JobId,
        id: Option<&str>,
    ) -> Result<i64, StoreError> {
        self.require_job(project, job).await?;
        let request = PageRequest { after: id.map(str::to_owned), ..PageRequest::first(0) };
        let place = request.sequence(&self.pool, EVENT_SEQUENCE, Some(job.as_str())).await?;
        Ok(place.unwrap_or(0))
    }
}

fn said(topic: Topic, row: &PgRow) -> sqlx::Result<(i64, Said)> {
    let said = match topic {
        Topic::Events => Said::Event(Event::from_row(row)?),
        Topic::Metrics => Said::Step(step_metrics(row)?),
    };
    Ok((row.try_get("sequence")?, said))
}

#[cfg(test)]
mod tests;
