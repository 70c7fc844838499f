//! Batches: a file of requests in, a file of answers out.

use crate::files::{self, FileFacts, Purpose, is_there};
use crate::idempotency::{Creation, Idempotency, Request};
use crate::notify::Channel;
use crate::objects::Stored;
use crate::page::{Page, PageRequest};
use crate::tenants::Caller;
use crate::words::words;
use crate::{Store, StoreError, database, rows};
use serde::{Deserialize, Serialize};
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use sqlx::{FromRow, Row as _};
use std::collections::BTreeMap;
use std::time::Duration;
use time::OffsetDateTime;
use tunesmith_core::ids::{BatchId, FileId, ProjectId};

/// The time that a batch has: OpenAI's only completion window.
const WINDOW: &str = "24 hours";
/// How long one who works on a batch has it to itself; renew it in time.
const CLAIM: &str = "60 seconds";

words! {
    /// Where a batch stands.
    BatchStatus {
        /// Its file is read.
        Validating = "validating",
        /// Its file was not in order.
        Failed = "failed",
        /// Its requests are answered.
        InProgress = "in_progress",
        /// The answers are put together.
        Finalizing = "finalizing",
        /// The answers are there.
        Completed = "completed",
        /// Its time was over first.
        Expired = "expired",
        /// Its owner gives it up.
        Cancelling = "cancelling",
        /// Its owner has given it up.
        Cancelled = "cancelled",
    }
}

impl BatchStatus {
    /// Whether nothing more happens to it.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Failed | Self::Completed | Self::Expired | Self::Cancelled)
    }
}

/// What is wrong with a batch's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchError {
    /// For programs.
    pub code: String,
    /// For people.
    pub message: String,
    /// The field at fault.
    pub param: Option<String>,
    /// The line, from 1.
    pub line: Option<u64>,
}

/// A batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Its id.
    pub id: BatchId,
    /// Whose it is.
    pub project_id: ProjectId,
    /// The path that its requests are for.
    pub endpoint: String,
    /// The file of requests.
    pub input_file: FileId,
    /// The client's own notes.
    pub metadata: BTreeMap<String, String>,
    /// How long the files of answers are kept; `None` for ever.
    pub output_expires_after: Option<Duration>,
    /// Where it stands.
    pub status: BatchStatus,
    /// When it was asked for.
    pub created_at: OffsetDateTime,
    /// When its time is over.
    pub expires_at: OffsetDateTime,
    /// When its requests began to be answered.
    pub in_progress_at: Option<OffsetDateTime>,
    /// When the answers began to be put together.
    pub finalizing_at: Option<OffsetDateTime>,
    /// When the answers were there.
    pub completed_at: Option<OffsetDateTime>,
    /// When its file turned out not to be in order.
    pub failed_at: Option<OffsetDateTime>,
    /// When its time was over.
    pub expired_at: Option<OffsetDateTime>,
    /// When its owner gave it up.
    pub cancelling_at: Option<OffsetDateTime>,
    /// When that was done.
    pub cancelled_at: Option<OffsetDateTime>,
    /// What is wrong with its file.
    pub errors: Option<Vec<BatchError>>,
    /// How many requests there are.
    pub total: u64,
    /// How many were answered.
    pub completed: u64,
    /// How many were refused.
    pub failed: u64,
    /// The model that all its requests name.
    pub model: Option<String>,
    /// The answers.
    pub output_file: Option<FileId>,
    /// The refusals.
    pub error_file: Option<FileId>,
}

impl FromRow<'_, PgRow> for Batch {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            id: rows::text(row, "id")?,
            project_id: rows::text(row, "project_id")?,
            endpoint: row.try_get("endpoint")?,
            input_file: rows::text(row, "input_file")?,
            metadata: rows::json(row, "metadata")?,
            output_expires_after: rows::optional_count(row, "output_lifetime_seconds")?
                .map(Duration::from_secs),
            status: rows::word(row, "status", BatchStatus::parse)?,
            created_at: row.try_get("created_at")?,
            expires_at: row.try_get("expires_at")?,
            in_progress_at: row.try_get("in_progress_at")?,
            finalizing_at: row.try_get("finalizing_at")?,
            completed_at: row.try_get("completed_at")?,
            failed_at: row.try_get("failed_at")?,
            expired_at: row.try_get("expired_at")?,
            cancelling_at: row.try_get("cancelling_at")?,
            cancelled_at: row.try_get("cancelled_at")?,
            errors: rows::optional_json(row, "errors")?,
            total: rows::count(row, "total")?,
            completed: rows::count(row, "completed")?,
            failed: rows::count(row, "failed")?,
            model: row.try_get("model")?,
            output_file: rows::optional_text(row, "output_file")?,
            error_file: rows::optional_text(row, "error_file")?,
        })
    }
}

/// A batch that a client asks for.
#[derive(Debug, Clone)]
pub struct NewBatch {
    /// The path that its requests are for.
    pub endpoint: String,
    /// The file of requests.
    pub input_file: FileId,
    /// The client's own notes.
    pub metadata: BTreeMap<String, String>,
    /// How long the files of answers are kept.
    pub output_expires_after: Option<Duration>,
}

/// A stored file of answers or refusals.
#[derive(Debug, Clone)]
pub struct BatchFile {
    /// A file that was begun.
    pub id: FileId,
    /// Its name.
    pub filename: String,
    /// Its content.
    pub stored: Stored,
}

/// How a batch's requests went.
#[derive(Debug, Clone, Default)]
pub struct BatchResult {
    /// How many were answered.
    pub completed: u64,
    /// How many were refused.
    pub failed: u64,
    /// The answers, if there are any.
    pub output: Option<BatchFile>,
    /// The refusals, if there are any.
    pub errors: Option<BatchFile>,
}

impl Store {
    /// Makes a batch whose file is to be read, or finds the one that the same request has made
    /// before.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] for a file that is not in the caller's project (any more),
    /// [`StoreError::IdempotencyConflict`].
    pub async fn create_batch(
        &self,
        caller: &Caller,
        new: &NewBatch,
        idempotency: &Idempotency,
    ) -> Result<Batch, StoreError> {
        let mut transaction = database::begin(&self.pool).await?;
        let request = Request::new(Creation::Batch, caller.api_key_id.as_str(), idempotency);
        if let Some(made) = request.made_before(&mut transaction).await? {
            drop(transaction);
            return self.batch(&caller.project_id, &BatchId::from(made)).await;
        }
        sqlx::query(concat!(
            "SELECT 1 FROM files WHERE id = $1 AND project_id = $2 AND ",
            is_there!(),
            " FOR SHARE"
        ))
        .bind(new.input_file.as_str())
        .bind(caller.project_id.as_str())
        .fetch_optional(&mut *transaction)
        .await?
        .ok_or_else(|| StoreError::not_found("file", &new.input_file))?;
        let made: Batch = sqlx::query_as(
            "WITH woken AS (SELECT pg_notify($8, ''))
             INSERT INTO batches (id, project_id, api_key_id, endpoint, input_file, metadata,
                 output_lifetime_seconds, expires_at)
             SELECT $1, $2, $3, $4, $5, $6, $7, now() + $9::interval FROM woken RETURNING *",
        )
        .bind(BatchId::generate(&mut rand::rng()).as_str())
        .bind(caller.project_id.as_str())
        .bind(caller.api_key_id.as_str())
        .bind(&new.endpoint)
        .bind(new.input_file.as_str())
        .bind(Json(&new.metadata))
        .bind(new.output_expires_after.map(|it| rows::bigint(it.as_secs())))
        .bind(Channel::Batches.as_str())
        .bind(WINDOW)
        .fetch_one(&mut *transaction)
        .await?;
        request.remember(&mut transaction, made.id.as_str()).await?;
        transaction.commit().await?;
        Ok(made)
    }

    /// A batch of `project`.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], also for a batch of another project.
    pub async fn batch(&self, project: &ProjectId, id: &BatchId) -> Result<Batch, StoreError> {
        sqlx::query_as("SELECT * FROM batches WHERE id = $1 AND project_id = $2")
            .bind(id.as_str())
            .bind(project.as_str())
            .fetch_optional(&self.pool)
            .await?
            .ok_or_else(|| StoreError::not_found("batch", id))
    }

    /// The batches of `project`, newest first.
    ///
    /// # Errors
    /// [`StoreError::UnknownCursor`].
    pub async fn list_batches(
        &self,
        project: &ProjectId,
        request: &PageRequest,
    ) -> Result<Page<Batch>, StoreError> {
        let cursor = "SELECT sequence FROM batches WHERE id = $1 AND project_id = $2";
        let list = "SELECT * FROM batches
             WHERE project_id = $1 AND ($2::bigint IS NULL OR sequence < $2)
             ORDER BY sequence DESC LIMIT $3";
        request.fetch_page(&self.pool, cursor, list, Some(project.as_str())).await
    }

    /// Gives a batch up. One that is being given up already is no error.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or [`StoreError::BatchEnded`].
    pub async fn cancel_batch(
        &self,
        project: &ProjectId,
        id: &BatchId,
    ) -> Result<Batch, StoreError> {
        let cancelling = sqlx::query_as(
            "WITH woken AS (SELECT pg_notify($3, ''))
             UPDATE batches SET status = 'cancelling',
                 cancelling_at = coalesce(cancelling_at, now()), claimed_until = now()
             FROM woken
             WHERE id = $1 AND project_id = $2
               AND status IN ('validating', 'in_progress', 'finalizing', 'cancelling')
             RETURNING batches.*",
        )
        .bind(id.as_str())
        .bind(project.as_str())
        .bind(Channel::Batches.as_str())
        .fetch_optional(&self.pool)
        .await?;
        match cancelling {
            Some(batch) => Ok(batch),
            None => {
                let batch = self.batch(project, id).await?;
                Err(StoreError::BatchEnded { batch: batch.id, status: batch.status.as_str() })
            }
        }
    }

    /// Takes a batch that nobody works on, for a minute. One whose time is over expires, and one
    /// that is given up is cancelled, on the way.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn claim_batch(&self) -> Result<Option<Batch>, StoreError> {
        sqlx::query(
            "UPDATE batches SET
                 status = CASE WHEN status = 'cancelling' THEN 'cancelled' ELSE 'expired' END,
                 cancelled_at = CASE WHEN status = 'cancelling' THEN now() END,
                 expired_at = CASE WHEN status <> 'cancelling' THEN now() END
             WHERE claimed_until <= now()
               AND (status = 'cancelling'
                    OR (status IN ('validating', 'in_progress', 'finalizing')
                        AND expires_at <= now()))",
        )
        .execute(&self.pool)
        .await?;
        Ok(sqlx::query_as(
            "UPDATE batches SET claimed_until = now() + $1::interval
             WHERE id = (
                 SELECT id FROM batches
                 WHERE status IN ('validating', 'in_progress', 'finalizing')
                   AND claimed_until <= now()
                 ORDER BY sequence LIMIT 1 FOR UPDATE SKIP LOCKED)
             RETURNING *",
        )
        .bind(CLAIM)
        .fetch_optional(&self.pool)
        .await?)
    }

    /// Keeps others away for another minute, and says how many requests were answered so far and
    /// how many were not.
    ///
    /// # Errors
    /// [`StoreError::BatchEnded`] if it is no longer to be worked on: stop.
    pub async fn keep_batch(
        &self,
        id: &BatchId,
        completed: u64,
        failed: u64,
    ) -> Result<(), StoreError> {
        let kept = sqlx::query(
            "UPDATE batches SET claimed_until = now() + $2::interval, completed = $3, failed = $4
             WHERE id = $1 AND status IN ('validating', 'in_progress', 'finalizing')",
        )
        .bind(id.as_str())
        .bind(CLAIM)
        .bind(rows::bigint(completed))
        .bind(rows::bigint(failed))
        .execute(&self.pool)
        .await?;
        still_there(id, kept.rows_affected())
    }

    /// The file is in order: its requests are answered now.
    ///
    /// # Errors
    /// [`StoreError::BatchEnded`] if it was given up meanwhile.
    pub async fn begin_batch(
        &self,
        id: &BatchId,
        total: u64,
        model: Option<&str>,
    ) -> Result<(), StoreError> {
        let begun = sqlx::query(
            "UPDATE batches SET status = 'in_progress', in_progress_at = coalesce(in_progress_at, now()),
                 total = $2, model = $3
             WHERE id = $1 AND status IN ('validating', 'in_progress', 'finalizing')",
        )
        .bind(id.as_str())
        .bind(rows::bigint(total))
        .bind(model)
        .execute(&self.pool)
        .await?;
        still_there(id, begun.rows_affected())
    }

    /// The file is not in order.
    ///
    /// # Errors
    /// [`StoreError::BatchEnded`] if it was given up meanwhile.
    pub async fn fail_batch(&self, id: &BatchId, errors: &[BatchError]) -> Result<(), StoreError> {
        let failed = sqlx::query(
            "UPDATE batches SET status = 'failed', failed_at = now(), errors = $2
             WHERE id = $1 AND status = 'validating'",
        )
        .bind(id.as_str())
        .bind(Json(errors))
        .execute(&self.pool)
        .await?;
        still_there(id, failed.rows_affected())
    }

    /// The answers are stored: they are there from now on.
    ///
    /// # Errors
    /// [`StoreError::BatchEnded`] if it was given up, or ended by another, meanwhile. Its files are
    /// not there then.
    pub async fn complete_batch(
        &self,
        batch: &Batch,
        result: &BatchResult,
    ) -> Result<(), StoreError> {
        let mut transaction = database::begin(&self.pool).await?;
        for (file, purpose) in [&result.output, &result.errors]
            .into_iter()
            .flatten()
            .map(|file| (file, Purpose::BatchOutput))
        {
            let facts = FileFacts {
                filename: file.filename.clone(),
                purpose,
                expires_after: batch.output_expires_after,
            };
            files::finish(&mut *transaction, &file.id, &facts, &file.stored).await?;
        }
        let completed = sqlx::query(
            "UPDATE batches SET status = 'completed', finalizing_at = now(), completed_at = now(),
                 completed = $2, failed = $3, output_file = $4, error_file = $5
             WHERE id = $1 AND status IN ('in_progress', 'finalizing')",
        )
        .bind(batch.id.as_str())
        .bind(rows::bigint(result.completed))
        .bind(rows::bigint(result.failed))
        .bind(result.output.as_ref().map(|file| file.id.as_str()))
        .bind(result.errors.as_ref().map(|file| file.id.as_str()))
        .execute(&mut *transaction)
        .await?;
        still_there(&batch.id, completed.rows_affected())?;
        transaction.commit().await?;
        Ok(())
    }
}

fn still_there(id: &BatchId, rows: u64) -> Result<(), StoreError> {
    if rows == 1 {
        Ok(())
    } else {
        Err(StoreError::BatchEnded { batch: id.clone(), status: "ended or given up" })
    }
}

#[cfg(test)]
mod tests;
