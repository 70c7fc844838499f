//! Jobs as their owner sees them.

mod control;
mod create;
mod looks;
mod seen;

pub(crate) use control::{Departure, depart};
pub use create::{CreatedJob, NewJob};
pub(crate) use looks::Looks;
pub use seen::SeenJob;

use crate::page::{Page, PageRequest};
use crate::{Store, StoreError, rows};
use serde_json::{Map, Value};
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use sqlx::{FromRow, Row as _};
use std::collections::BTreeMap;
use time::OffsetDateTime;
use tunesmith_core::errors::ApiError;
use tunesmith_core::hyperparameters::{Method, ResolvedHyperparameters};
use tunesmith_core::ids::{BaseModelId, FileId, JobId, OrganizationId, ProjectId};
use tunesmith_core::protocol::Started;
use tunesmith_core::state::JobStatus;
use tunesmith_core::weights::{CheckpointPlace, WeightsPlace};

/// A fine-tuning job, everything that is known of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// Its id.
    pub id: JobId,
    /// Whose it is.
    pub project_id: ProjectId,
    /// The project's owner.
    pub organization_id: OrganizationId,
    /// When it was asked for.
    pub created_at: OffsetDateTime,
    /// The name of the model that it starts from, as the client gave it: a base model's, a tuned
    /// one's, or a checkpoint's.
    pub model: String,
    /// The base model.
    pub base_model_id: BaseModelId,
    /// The weights that it begins with, where these are not the base model's alone.
    pub start: Option<WeightsPlace>,
    /// What it trains on.
    pub training_file: FileId,
    /// What it is measured on, where the client gave a file for that.
    pub validation_file: Option<FileId>,
    /// The client's part of the tuned model's name.
    pub suffix: Option<String>,
    /// Seeds everything that is random.
    pub seed: u64,
    /// The client's own notes.
    pub metadata: BTreeMap<String, String>,
    /// What it learns from.
    pub method: Method,
    /// The hyperparameters as the client gave them.
    pub hyperparameters: Map<String, Value>,
    /// The same with nothing left to choose, once the files are validated.
    pub resolved: Option<ResolvedHyperparameters>,
    /// What the tuned model is or will be called; checkpoints carry it before it exists.
    pub model_name: String,
    /// Where it stands.
    pub status: JobStatus,
    /// Whether its owner wants it to rest. A running job rests after its next checkpoint.
    pub paused: bool,
    /// Whether its owner wants it to end; a running job's worker ends it.
    pub cancel_requested: bool,
    /// When a worker first took it.
    pub started_at: Option<OffsetDateTime>,
    /// When it ended.
    pub finished_at: Option<OffsetDateTime>,
    /// Why it failed.
    pub error: Option<ApiError>,
    /// How often a worker has taken it; the fencing token.
    pub attempt: u32,
    /// The facts of the run, once it began.
    pub run: Option<Started>,
    /// The last step whose metrics are stored; 0 before the first.
    pub last_step: u64,
    /// The checkpoint that a new attempt goes on from. Of a job that succeeded, its final weights.
    pub resume: Option<CheckpointPlace>,
    /// Tokens seen in training, once it succeeded.
    pub trained_tokens: Option<u64>,
    /// The loss curve as CSV, once it succeeded.
    pub result_file: Option<FileId>,
}

impl Job {
    /// The tuned model's name, once there is the model.
    #[must_use]
    pub fn fine_tuned_model(&self) -> Option<&str> {
        (self.status == JobStatus::Succeeded).then_some(self.model_name.as_str())
    }
}

/// The columns of a [`Job`], from `jobs` joined with its `projects`.
macro_rules! job_columns {
    () => {
        "jobs.id, jobs.project_id, projects.organization_id, jobs.created_at, jobs.model,
         jobs.base_model_id, jobs.start, jobs.training_file, jobs.validation_file, jobs.suffix, jobs.seed,
         jobs.metadata, jobs.method, jobs.hyperparameters, jobs.resolved, jobs.model_name, jobs.status,
         jobs.paused, jobs.cancel_requested, jobs.started_at, jobs.finished_at, jobs.error,
         jobs.attempt, jobs.run, jobs.last_step, jobs.resume_attempt, jobs.resume_step,
         jobs.trained_tokens, jobs.result_file"
    };
}
pub(crate) use job_columns;

impl FromRow<'_, PgRow> for Job {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        let id: JobId = rows::text(row, "id")?;
        let resume = match rows::optional_count(row, "resume_step")? {
            None => None,
            Some(step) => Some(CheckpointPlace {
                job: id.clone(),
                attempt: rows::attempt(row, "resume_attempt")?,
                step,
            }),
        };
        Ok(Self {
            id,
            project_id: rows::text(row, "project_id")?,
            organization_id: rows::text(row, "organization_id")?,
            created_at: row.try_get("created_at")?,
            model: row.try_get("model")?,
            base_model_id: rows::text(row, "base_model_id")?,
            start: rows::optional_json(row, "start")?,
            training_file: rows::text(row, "training_file")?,
            validation_file: rows::optional_text(row, "validation_file")?,
            suffix: row.try_get("suffix")?,
            seed: rows::count(row, "seed")?,
            metadata: rows::json(row, "metadata")?,
            method: rows::word(row, "method", Method::parse)?,
            hyperparameters: rows::json(row, "hyperparameters")?,
            resolved: rows::optional_json(row, "resolved")?,
            model_name: row.try_get("model_name")?,
            status: rows::word(row, "status", JobStatus::parse)?,
            paused: row.try_get("paused")?,
            cancel_requested: row.try_get("cancel_requested")?,
            started_at: row.try_get("started_at")?,
            finished_at: row.try_get("finished_at")?,
            error: rows::optional_json(row, "error")?,
            attempt: rows::attempt(row, "attempt")?,
            run: rows::optional_json(row, "run")?,
            last_step: rows::count(row, "last_step")?,
            resume,
            trained_tokens: rows::optional_count(row, "trained_tokens")?,
            result_file: rows::optional_text(row, "result_file")?,
        })
    }
}

/// Which jobs of a list are wanted, by the client's own notes on them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MetadataFilter {
    /// Those whose notes hold all of these; all jobs, if these are none.
    Holds(BTreeMap<String, String>),
    /// Those without notes.
    Empty,
}

impl Store {
    /// A job of `project`.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], also for a job of another project.
    pub async fn job(&self, project: &ProjectId, id: &JobId) -> Result<Job, StoreError> {
        sqlx::query_as(concat!(
            "SELECT ",
            job_columns!(),
            " FROM jobs JOIN projects ON projects.id = jobs.project_id
              WHERE jobs.id = $1 AND jobs.project_id = $2"
        ))
        .bind(id.as_str())
        .bind(project.as_str())
        .fetch_optional(&self.pool)
        .await?
        .ok_or_else(|| StoreError::not_found("job", id))
    }

    /// The jobs of `project` that `metadata` lets through, newest first.
    ///
    /// # Errors
    /// [`StoreError::UnknownCursor`] if `after` is no job of the project.
    pub async fn list_jobs(
        &self,
        project: &ProjectId,
        metadata: &MetadataFilter,
        request: &PageRequest,
    ) -> Result<Page<Job>, StoreError> {
        let after = request
            .sequence(
                &self.pool,
                "SELECT sequence FROM jobs WHERE id = $1 AND project_id = $2",
                Some(project.as_str()),
            )
            .await?;
        let held = match metadata {
            MetadataFilter::Holds(notes) => notes.clone(),
            MetadataFilter::Empty => BTreeMap::new(),
        };
        let found = sqlx::query_as(concat!(
            "SELECT ",
            job_columns!(),
            " FROM jobs JOIN projects ON projects.id = jobs.project_id
              WHERE jobs.project_id = $1 AND jobs.metadata @> $2
                AND (NOT $5 OR jobs.metadata = '{}')
                AND ($3::bigint IS NULL OR jobs.sequence < $3)
              ORDER BY jobs.sequence DESC LIMIT $4"
        ))
        .bind(project.as_str())
        .bind(Json(held))
        .bind(after)
        .bind(request.fetch())
        .bind(*metadata == MetadataFilter::Empty)
        .fetch_all(&self.pool)
        .await?;
        Ok(Page::cut(found, request))
    }

    /// How many jobs have not ended, by their status.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn unfinished_jobs(&self) -> Result<Vec<(JobStatus, u64)>, StoreError> {
        let found = sqlx::query(
            "SELECT status, count(*) AS jobs FROM jobs WHERE finished_at IS NULL GROUP BY status",
        )
        .fetch_all(&self.pool)
        .await?;
        let counted = |row: &PgRow| {
            Ok((rows::word(row, "status", JobStatus::parse)?, rows::count(row, "jobs")?))
        };
        Ok(found.iter().map(counted).collect::<sqlx::Result<_>>()?)
    }

    /// Fails unless `project` has the job.
    pub(crate) async fn require_job(
        &self,
        project: &ProjectId,
        id: &JobId,
    ) -> Result<(), StoreError> {
        sqlx::query("SELECT 1 FROM jobs WHERE id = $1 AND project_id = $2")
            .bind(id.as_str())
            .bind(project.as_str())
            .fetch_optional(&self.pool)
            .await?
            .map(drop)
            .ok_or_else(|| StoreError::not_found("job", id))
    }
}

/// The words of `statuses`, to be bound to `= ANY(…)`.
pub(crate) fn words(statuses: &[JobStatus]) -> Vec<&'static str> {
    statuses.iter().map(|status| status.as_str()).collect()
}

#[cfg(test)]
mod tests;
