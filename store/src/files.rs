//! Files: uploaded by clients, or produced by jobs.

use crate::base_models::default_base_model;
use crate::idempotency::{Creation, Idempotency, Request};
use crate::notify::Channel;
use crate::objects::{ObjectKey, Stored};
use crate::page::{Order, Page, PageRequest};
use crate::tenants::Caller;
use crate::words::words;
use crate::{Store, StoreError, database, rows};
use sqlx::postgres::PgRow;
use sqlx::{FromRow, PgExecutor, Row as _};
use std::time::Duration;
use time::OffsetDateTime;
use tunesmith_core::ids::{BatchId, FileId, JobId, ProjectId};

/// True of the files that clients see: whole, not deleted, not expired.
macro_rules! is_there {
    () => {
        "bytes IS NOT NULL AND deleted_at IS NULL AND (expires_at IS NULL OR expires_at > now())"
    };
}
pub(crate) use is_there;

/// What a [`File`] is read from.
macro_rules! file_columns {
    () => {
        "id, filename, purpose, bytes, sha256, created_at, expires_at, status_details"
    };
}

pub(crate) use file_columns;

words! {
    /// What a file is for.
    Purpose {
        /// Examples to train on.
        FineTune = "fine-tune",
        /// A job's loss curve.
        FineTuneResults = "fine-tune-results",
        /// Requests to answer.
        Batch = "batch",
        /// Answers to a batch.
        BatchOutput = "batch_output",
        /// For OpenAI's assistants; kept, not used.
        Assistants = "assistants",
        /// Images; kept, not used.
        Vision = "vision",
        /// Anything.
        UserData = "user_data",
        /// Examples to evaluate on.
        Evals = "evals",
    }
}

words! {
    /// Where a file stands.
    FileStatus {
        /// Its content is still coming.
        Uploading = "uploading",
        /// It is whole.
        Processed = "processed",
    }
}

/// A whole file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Its id.
    pub id: FileId,
    /// As the client named it.
    pub filename: String,
    /// What it is for.
    pub purpose: Purpose,
    /// Its size.
    pub bytes: u64,
    /// The SHA-256 of its content, in lower-case hexadecimal digits.
    pub sha256: String,
    /// When its upload began.
    pub created_at: OffsetDateTime,
    /// When it goes by itself.
    pub expires_at: Option<OffsetDateTime>,
    /// What its report says at a glance, where something is wrong with it.
    pub status_details: Option<String>,
}

impl File {
    /// Where its content lies.
    #[must_use]
    pub fn object(&self) -> ObjectKey {
        ObjectKey::File(self.id.clone())
    }
}

impl FromRow<'_, PgRow> for File {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            id: rows::text(row, "id")?,
            filename: row.try_get("filename")?,
            purpose: rows::word(row, "purpose", Purpose::parse)?,
            bytes: rows::count(row, "bytes")?,
            sha256: row.try_get("sha256")?,
            created_at: row.try_get("created_at")?,
            expires_at: row.try_get("expires_at")?,
            status_details: row.try_get("status_details")?,
        })
    }
}

/// What a client says of a file that it uploads. It may come after the content.
#[derive(Debug, Clone)]
pub struct FileFacts {
    /// As the client named it.
    pub filename: String,
    /// What it is for.
    pub purpose: Purpose,
    /// How long it is kept; `None` for ever.
    pub expires_after: Option<Duration>,
}

/// Uploads that began this long ago and are not whole never will be.
const ABANDONED_AFTER: &str = "1 day";

impl Store {
    /// Notes that a file is coming. Its content then goes to [`ObjectKey::File`] of the id, and
    /// [`finish_file`](Self::finish_file) or [`abandon_file`](Self::abandon_file) ends it.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn begin_file(&self, project: &ProjectId) -> Result<FileId, StoreError> {
        let id = FileId::generate(&mut rand::rng());
        sqlx::query("INSERT INTO files (id, project_id, status) VALUES ($1, $2, $3)")
            .bind(id.as_str())
            .bind(project.as_str())
            .bind(FileStatus::Uploading.as_str())
            .execute(&self.pool)
            .await?;
        Ok(id)
    }

    /// Makes a file whole whose content is stored, and asks for a report on one to train on. Of a
    /// request that has made a file before it is that file, and what came again goes.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if it is not one that is being uploaded, or the one that was made
    /// before is gone; [`StoreError::IdempotencyConflict`].
    pub async fn finish_file(
        &self,
        caller: &Caller,
        id: &FileId,
        facts: &FileFacts,
        stored: &Stored,
        idempotency: &Idempotency,
    ) -> Result<File, StoreError> {
        let mut transaction = database::begin(&self.pool).await?;
        let request = Request::new(Creation::File, caller.api_key_id.as_str(), idempotency);
        let made = match request.made_before(&mut transaction).await {
            Ok(None) => {
                let file = finish(&mut *transaction, id, facts, stored).await?;
                request.remember(&mut transaction, id.as_str()).await?;
                transaction.commit().await?;
                return Ok(file);
            }
            Ok(Some(made)) => Ok(FileId::from(made)),
            Err(error) => Err(error),
        };
        drop(transaction);
        self.abandon_file(id).await?;
        self.file(&caller.project_id, &made?).await
    }

    /// Forgets a file whose upload failed, and its content if there is any.
    ///
    /// # Errors
    /// Those of the database and of the object store.
    pub async fn abandon_file(&self, id: &FileId) -> Result<(), StoreError> {
        sqlx::query("DELETE FROM files WHERE id = $1 AND status = $2")
            .bind(id.as_str())
            .bind(FileStatus::Uploading.as_str())
            .execute(&self.pool)
            .await?;
        self.objects.delete(&ObjectKey::File(id.clone())).await
    }

    /// A whole file of `project`.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], also for a file of another project or one that has expired.
    pub async fn file(&self, project: &ProjectId, id: &FileId) -> Result<File, StoreError> {
        sqlx::query_as(concat!(
            "SELECT ",
            file_columns!(),
            " FROM files WHERE id = $1 AND project_id = $2 AND ",
            is_there!()
        ))
        .bind(id.as_str())
        .bind(project.as_str())
        .fetch_optional(&self.pool)
        .await?
        .ok_or_else(|| StoreError::not_found("file", id))
    }

    /// What the client named a file, whatever became of it since; `None` before it is whole.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn filename(&self, id: &FileId) -> Result<Option<String>, StoreError> {
        let name: Option<Option<String>> =
            sqlx::query_scalar("SELECT filename FROM files WHERE id = $1")
                .bind(id.as_str())
                .fetch_optional(&self.pool)
                .await?;
        Ok(name.flatten())
    }

    /// The whole files of `project`, of one purpose or of all.
    ///
    /// # Errors
    /// [`StoreError::UnknownCursor`] if `after` was never a file of the project.
    pub async fn list_files(
        &self,
        project: &ProjectId,
        purpose: Option<Purpose>,
        request: &PageRequest,
    ) -> Result<Page<File>, StoreError> {
        let after = request
            .sequence(
                &self.pool,
                "SELECT sequence FROM files WHERE id = $1 AND project_id = $2",
                Some(project.as_str()),
            )
            .await?;
        let statement = match request.order {
            Order::Descending => {
                concat!(
                    "SELECT ",
                    file_columns!(),
                    " FROM files WHERE project_id = $1 AND ",
                    is_there!(),
                    " AND ($2::text IS NULL OR purpose = $2)
                      AND ($3::bigint IS NULL OR sequence < $3)
                      ORDER BY sequence DESC LIMIT $4"
                )
            }
            Order::Ascending => {
                concat!(
                    "SELECT ",
                    file_columns!(),
                    " FROM files WHERE project_id = $1 AND ",
                    is_there!(),
                    " AND ($2::text IS NULL OR purpose = $2)
                      AND ($3::bigint IS NULL OR sequence > $3)
                      ORDER BY sequence LIMIT $4"
                )
            }
        };
        let found = sqlx::query_as(statement)
            .bind(project.as_str())
            .bind(purpose.map(Purpose::as_str))
            .bind(after)
            .bind(request.fetch())
            .fetch_all(&self.pool)
            .await?;
        Ok(Page::cut(found, request))
    }

    /// How many bytes the files of `project` have together.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn stored_bytes(&self, project: &ProjectId) -> Result<u64, StoreError> {
        let bytes: i64 = sqlx::query_scalar(concat!(
            "SELECT coalesce(sum(bytes), 0)::bigint FROM files WHERE project_id = $1 AND ",
            is_there!()
        ))
        .bind(project.as_str())
        .fetch_one(&self.pool)
        .await?;
        Ok(u64::try_from(bytes).unwrap_or(0))
    }

    /// Deletes a file and its content.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or [`StoreError::FileInUse`] and [`StoreError::FileInBatch`] while
    /// an unfinished job or batch reads it.
    pub async fn delete_file(&self, project: &ProjectId, id: &FileId) -> Result<(), StoreError> {
        let mut transaction = database::begin(&self.pool).await?;
        // The lock comes first, in a statement of its own: a job that is just being made holds it
        // too, and the next statement sees that job.
        sqlx::query(concat!(
            "SELECT 1 FROM files WHERE id = $1 AND project_id = $2 AND ",
            is_there!(),
            " FOR UPDATE"
        ))
        .bind(id.as_str())
        .bind(project.as_str())
        .fetch_optional(&mut *transaction)
        .await?
        .ok_or_else(|| StoreError::not_found("file", id))?;
        let user = sqlx::query_scalar::<_, String>(
            "SELECT id FROM jobs
             WHERE finished_at IS NULL AND (training_file = $1 OR validation_file = $1) LIMIT 1",
        )
        .bind(id.as_str())
        .fetch_optional(&mut *transaction)
        .await?;
        if let Some(job) = user {
            return Err(StoreError::FileInUse { file: id.clone(), job: JobId::from(job) });
        }
        let batch: Option<String> = sqlx::query_scalar(
            "SELECT id FROM batches WHERE input_file = $1
             AND status IN ('validating', 'in_progress', 'finalizing', 'cancelling') LIMIT 1",
        )
        .bind(id.as_str())
        .fetch_optional(&mut *transaction)
        .await?;
        if let Some(batch) = batch {
            return Err(StoreError::FileInBatch { file: id.clone(), batch: BatchId::from(batch) });
        }
        // A report quotes the file, so it goes too.
        sqlx::query(
            "WITH reports AS (DELETE FROM file_reports WHERE file_id = $1)
             UPDATE files SET deleted_at = now(), status_details = NULL WHERE id = $1",
        )
        .bind(id.as_str())
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        self.delete_content(id).await;
        Ok(())
    }

    /// Removes the content of expired files that no unfinished job or batch reads, and uploads that broke
    /// off. Says how many files went. To be called from time to time.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn purge_files(&self) -> Result<usize, StoreError> {
        let gone: Vec<String> = sqlx::query_scalar(
            "WITH gone AS (
                UPDATE files SET deleted_at = now(), status_details = NULL
                WHERE deleted_at IS NULL
                  AND (expires_at <= now()
                       OR (bytes IS NULL AND created_at < now() - $1::interval))
                  AND NOT EXISTS (SELECT 1 FROM jobs WHERE finished_at IS NULL
                                  AND (training_file = files.id OR validation_file = files.id))
                  AND NOT EXISTS (SELECT 1 FROM batches WHERE input_file = files.id
                                  AND status IN ('validating', 'in_progress', 'finalizing',
                                                 'cancelling'))
                RETURNING id
             ), reports AS (
                DELETE FROM file_reports USING gone WHERE file_reports.file_id = gone.id
             ) SELECT id FROM gone",
        )
        .bind(ABANDONED_AFTER)
        .fetch_all(&self.pool)
        .await?;
        for id in &gone {
            self.delete_content(&FileId::from(id.as_str())).await;
        }
        Ok(gone.len())
    }

    /// The row is gone, which is what counts for the client: content that stays is only litter.
    async fn delete_content(&self, id: &FileId) {
        if let Err(error) = self.objects.delete(&ObjectKey::File(id.clone())).await {
            tracing::warn!(%error, file = %id, "the content of a deleted file stays in the object store");
        }
    }
}

/// Makes a file whole, in the transaction of what it belongs to.
pub(crate) async fn finish(
    executor: impl PgExecutor<'_>,
    id: &FileId,
    facts: &FileFacts,
    stored: &Stored,
) -> Result<File, StoreError> {
    sqlx::query_as(concat!(
        "WITH finished AS (
            UPDATE files SET status = $2, filename = $3, purpose = $4, bytes = $5,
                sha256 = $6, expires_at = created_at + make_interval(secs => $7)
            WHERE id = $1 AND status = $8
            RETURNING ",
        file_columns!(),
        "), report AS (
            INSERT INTO file_reports (file_id, base_model_id)
            SELECT id, coalesce((",
        default_base_model!(),
        "), '')
            FROM finished WHERE purpose = $9
            RETURNING file_id
         ) SELECT finished.*, (SELECT pg_notify($10, '')::text FROM report) FROM finished"
    ))
    .bind(id.as_str())
    .bind(FileStatus::Processed.as_str())
    .bind(&facts.filename)
    .bind(facts.purpose.as_str())
    .bind(rows::bigint(stored.bytes))
    .bind(&stored.sha256)
    .bind(facts.expires_after.map(|duration| duration.as_secs_f64()))
    .bind(FileStatus::Uploading.as_str())
    .bind(Purpose::FineTune.as_str())
    .bind(Channel::Reports.as_str())
    .fetch_optional(executor)
    .await?
    .ok_or_else(|| StoreError::not_found("file being uploaded", id))
}

#[cfg(test)]
mod tests;
