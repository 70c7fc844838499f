//! Checkpoints that people see.

use crate::page::{Page, PageRequest};
use crate::{Store, StoreError, rows};
use sqlx::postgres::PgRow;
use sqlx::{FromRow, Row as _};
use time::OffsetDateTime;
use tunesmith_core::ids::{CheckpointId, JobId, ProjectId};
use tunesmith_core::metrics::StepMetrics;

/// A checkpoint. Its weights are had by its name, as a model's are.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// Its id.
    pub id: CheckpointId,
    /// The job that made it.
    pub job_id: JobId,
    /// The name under which its weights are served.
    pub name: String,
    /// Optimiser steps done.
    pub step: u64,
    /// The step's metrics.
    pub metrics: Option<StepMetrics>,
    /// When it was recorded.
    pub created_at: OffsetDateTime,
}

impl FromRow<'_, PgRow> for Checkpoint {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            id: rows::text(row, "id")?,
            job_id: rows::text(row, "job_id")?,
            name: row.try_get("name")?,
            step: rows::count(row, "step")?,
            metrics: rows::optional_json(row, "metrics")?,
            created_at: row.try_get("created_at")?,
        })
    }
}

impl Store {
    /// The checkpoints of a job whose weights are there, newest first.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if `project` has no such job, [`StoreError::UnknownCursor`].
    pub async fn list_checkpoints(
        &self,
        project: &ProjectId,
        job: &JobId,
        request: &PageRequest,
    ) -> Result<Page<Checkpoint>, StoreError> {
        self.require_job(project, job).await?;
        let cursor = "SELECT sequence FROM checkpoints WHERE id = $1 AND job_id = $2";
        let list = "SELECT id, job_id, name, step, metrics, created_at FROM checkpoints
             WHERE job_id = $1 AND deleted_at IS NULL
               AND ($2::bigint IS NULL OR sequence < $2)
             ORDER BY sequence DESC LIMIT $3";
        request.fetch_page(&self.pool, cursor, list, Some(job.as_str())).await
    }
}
