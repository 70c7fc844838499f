//! Uploads: files that come in parts, in any order, and are put together at the end.
//!
//! A part is an object of its own until then, so that what has arrived stays when a connection
//! breaks, and the client sends only what is missing.

use crate::files::{self, File, FileFacts, Purpose};
use crate::idempotency::{Creation, Idempotency, Request};
use crate::objects::{ObjectPrefix, Stored};
use crate::tenants::Caller;
use crate::words::words;
use crate::{Store, StoreError, database, rows};
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use md5::{Digest as _, Md5};
use serde_json::json;
use sqlx::postgres::PgRow;
use sqlx::{FromRow, PgExecutor, Row as _};
use std::collections::{HashMap, HashSet};
use std::time::Duration;
use time::OffsetDateTime;
use tunesmith_core::ids::{FileId, ProjectId, UploadId, UploadPartId};

/// How long an upload takes parts.
const LIFETIME: &str = "1 hour";
/// An upload whose time is over is cleared away this much later, so that a completion that began in
/// time finds its parts to the end.
const GRACE: &str = "15 minutes";
/// Parts may hold this many times the announced bytes: a part whose reply was lost comes again.
const MOST_COPIES: u64 = 4;

words! {
    /// Where an upload stands.
    UploadStatus {
        /// It takes parts.
        Pending = "pending",
        /// There is the file.
        Completed = "completed",
        /// Its owner has given it up.
        Cancelled = "cancelled",
        /// Its time is over.
        Expired = "expired",
    }
}

/// An upload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upload {
    /// Its id.
    pub id: UploadId,
    /// Where it stands.
    pub status: UploadStatus,
    /// What the file will be called.
    pub filename: String,
    /// What the file is for.
    pub purpose: Purpose,
    /// How many bytes the parts make up together.
    pub bytes: u64,
    /// How long the file is kept; `None` for ever.
    pub file_expires_after: Option<Duration>,
    /// When it began.
    pub created_at: OffsetDateTime,
    /// Until when it takes parts.
    pub expires_at: OffsetDateTime,
    /// The file, once it is completed.
    pub file_id: Option<FileId>,
    part_ids: Option<Vec<String>>,
}

impl FromRow<'_, PgRow> for Upload {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            id: rows::text(row, "id")?,
            status: rows::word(row, "status_now", UploadStatus::parse)?,
            filename: row.try_get("filename")?,
            purpose: rows::word(row, "purpose", Purpose::parse)?,
            bytes: rows::count(row, "bytes")?,
            file_expires_after: rows::optional_count(row, "file_lifetime_seconds")?
                .map(Duration::from_secs),
            created_at: row.try_get("created_at")?,
            expires_at: row.try_get("expires_at")?,
            file_id: rows::optional_text(row, "file_id")?,
            part_ids: row.try_get("part_ids")?,
        })
    }
}

/// The columns of an [`Upload`]. One whose time is over shows so before anything clears it away.
macro_rules! upload_columns {
    () => {
        "id, CASE WHEN status = 'pending' AND expires_at <= now() THEN 'expired' ELSE status END
             AS status_now,
         filename, purpose, bytes, file_lifetime_seconds, created_at, expires_at, file_id, part_ids"
    };
}

/// An upload that a client asks for.
#[derive(Debug, Clone)]
pub struct NewUpload {
    /// What the file will be called, what it is for, and how long it is kept.
    pub file: FileFacts,
    /// What the client says it is.
    pub mime_type: String,
    /// How many bytes the parts will make up together.
    pub bytes: u64,
}

/// A part that is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UploadPart {
    /// Its id.
    pub id: UploadPartId,
    /// Whose part it is.
    pub upload_id: UploadId,
    /// When it had arrived.
    pub created_at: OffsetDateTime,
}

impl Store {
    /// Begins an upload, which takes parts for an hour, or finds the one that the same request has
    /// begun before.
    ///
    /// # Errors
    /// [`StoreError::IdempotencyConflict`], or those of the database.
    pub async fn create_upload(
        &self,
        caller: &Caller,
        new: &NewUpload,
        idempotency: &Idempotency,
    ) -> Result<Upload, StoreError> {
        let mut transaction = database::begin(&self.pool).await?;
        let request = Request::new(Creation::Upload, caller.api_key_id.as_str(), idempotency);
        if let Some(made) = request.made_before(&mut transaction).await? {
            return find(&mut *transaction, &caller.project_id, &UploadId::from(made)).await;
        }
        let id = UploadId::generate(&mut rand::rng());
        let begun = sqlx::query_as(concat!(
            "INSERT INTO uploads
                 (id, project_id, filename, purpose, mime_type, bytes, file_lifetime_seconds,
                  expires_at)
             VALUES ($1, $2, $3, $4, $5, $6, $7, now() + $8::interval)
             RETURNING ",
            upload_columns!()
        ))
        .bind(id.as_str())
        .bind(caller.project_id.as_str())
        .bind(&new.file.filename)
        .bind(new.file.purpose.as_str())
        .bind(&new.mime_type)
        .bind(rows::bigint(new.bytes))
        .bind(new.file.expires_after.map(|duration| rows::bigint(duration.as_secs())))
        .bind(LIFETIME)
        .fetch_one(&mut *transaction)
        .await?;
        request.remember(&mut transaction, id.as_str()).await?;
        transaction.commit().await?;
        Ok(begun)
    }

    /// An upload of `project`.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], also for an upload of another project.
    pub async fn upload(&self, project: &ProjectId, id: &UploadId) -> Result<Upload, StoreError> {
        find(&self.pool, project, id).await
    }

    /// Stores a part of an upload that takes parts, or finds the one that the same request has stored
    /// before. Memory stays flat. What is asked for is told by the upload and the content, whatever
    /// `idempotency` says of it.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::UploadEnded`], [`StoreError::TooLarge`] for a part
    /// larger than the whole, [`StoreError::UploadParts`] when parts came again and again,
    /// [`StoreError::IdempotencyConflict`], or the stream's. Nothing is kept of what is refused.
    pub async fn add_upload_part<S, E>(
        &self,
        caller: &Caller,
        upload: &UploadId,
        content: S,
        idempotency: &Idempotency,
    ) -> Result<UploadPart, StoreError>
    where
        S: Stream<Item = Result<bytes::Bytes, E>>,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let whole = find(&self.pool, &caller.project_id, upload).await?.pending()?;
        let id = UploadPartId::generate(&mut rand::rng());
        let key = ObjectPrefix::UploadParts(upload.clone()).file(id.as_str());
        let stored = self.objects.put_stream(&key, content, whole.bytes).await?;
        // Parts may be alike, so a client that marks a retry and sends no key may mean another.
        let asked = idempotency.by_key_alone().of(&json!([upload, stored.sha256]));
        let noted = self.note_part(caller, upload, &id, &stored, &asked).await;
        if noted.as_ref().map_or(true, |part| part.id != id)
            && let Err(error) = self.objects.delete(&key).await
        {
            tracing::warn!(%error, %upload, "a part of an upload that is not kept stays in the object store");
        }
        noted
    }

    async fn note_part(
        &self,
        caller: &Caller,
        upload: &UploadId,
        id: &UploadPartId,
        stored: &Stored,
        asked: &Idempotency,
    ) -> Result<UploadPart, StoreError> {
        let mut transaction = database::begin(&self.pool).await?;
        // Who ends the upload waits for this, and sees the part.
        let whole = lock(&mut *transaction, &caller.project_id, upload).await?.pending()?;
        let request = Request::new(Creation::UploadPart, caller.api_key_id.as_str(), asked);
        if let Some(made) = request.made_before(&mut transaction).await? {
            let created_at = sqlx::query_scalar(
                "SELECT created_at FROM upload_parts WHERE id = $1 AND upload_id = $2",
            )
            .bind(&made)
            .bind(upload.as_str())
            .fetch_optional(&mut *transaction)
            .await?
            .ok_or_else(|| StoreError::NotFound { kind: "upload part", id: made.clone() })?;
            return Ok(UploadPart { id: made.into(), upload_id: upload.clone(), created_at });
        }
        let there: i64 = sqlx::query_scalar(
            "SELECT coalesce(sum(bytes), 0)::bigint FROM upload_parts WHERE upload_id = $1",
        )
        .bind(upload.as_str())
        .fetch_one(&mut *transaction)
        .await?;
        let most = whole.bytes.saturating_mul(MOST_COPIES);
        if u64::try_from(there).unwrap_or(0).saturating_add(stored.bytes) > most {
            return Err(StoreError::UploadParts {
                upload: upload.clone(),
                reason: format!(
                    "its parts would hold over {MOST_COPIES} times the {} bytes that were \
                     announced",
                    whole.bytes
                ),
            });
        }
        let created_at = sqlx::query_scalar(
            "INSERT INTO upload_parts (id, upload_id, bytes) VALUES ($1, $2, $3)
             RETURNING created_at",
        )
        .bind(id.as_str())
        .bind(upload.as_str())
        .bind(rows::bigint(stored.bytes))
        .fetch_one(&mut *transaction)
        .await?;
        request.remember(&mut transaction, id.as_str()).await?;
        transaction.commit().await?;
        Ok(UploadPart { id: id.clone(), upload_id: upload.clone(), created_at })
    }

    /// Puts the parts together, in the order of `parts`, as a file. Asked again with the same
    /// parts, it says the same again. Parts that are not named are dropped.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::UploadEnded`], or [`StoreError::UploadParts`] for a
    /// part that is not there or named twice, for parts that do not make up the announced bytes,
    /// and for content of another MD5 (`md5`, hexadecimal) than was said. The upload then still
    /// takes parts.
    pub async fn complete_upload(
        &self,
        project: &ProjectId,
        id: &UploadId,
        parts: &[String],
        md5: Option<&str>,
    ) -> Result<Upload, StoreError> {
        let upload = find(&self.pool, project, id).await?;
        if upload.part_ids.as_deref() == Some(parts) {
            return Ok(upload);
        }
        let upload = upload.pending()?;
        match self.make_file(project, &upload, parts, md5).await {
            Ok(()) => {
                self.clear_parts(id).await;
                find(&self.pool, project, id).await
            }
            Err(error) => {
                // Another request may have completed or ended it meanwhile; its parts are gone then.
                let now = find(&self.pool, project, id).await?;
                if now.part_ids.as_deref() == Some(parts) {
                    return Ok(now);
                }
                now.pending()?;
                Err(error)
            }
        }
    }

    async fn make_file(
        &self,
        project: &ProjectId,
        upload: &Upload,
        parts: &[String],
        md5: Option<&str>,
    ) -> Result<(), StoreError> {
        self.check_parts(upload, parts).await?;
        let file = self.begin_file(project).await?;
        let made = self.assemble(project, upload, parts, md5, &file).await;
        if made.is_err()
            && let Err(error) = self.abandon_file(&file).await
        {
            tracing::warn!(%error, %file, "a file that was not completed stays");
        }
        made
    }

    /// Whether `parts` are all there, each once, and as many bytes as were announced.
    async fn check_parts(&self, upload: &Upload, parts: &[String]) -> Result<(), StoreError> {
        let there: HashMap<String, i64> =
            sqlx::query_as("SELECT id, bytes FROM upload_parts WHERE upload_id = $1")
                .bind(upload.id.as_str())
                .fetch_all(&self.pool)
                .await?
                .into_iter()
                .collect();
        let wrong =
            |reason: String| Err(StoreError::UploadParts { upload: upload.id.clone(), reason });
        let mut seen = HashSet::new();
        let mut bytes = 0_i64;
        for part in parts {
            let Some(size) = there.get(part) else {
                return wrong(format!("it has no part {part}"));
            };
            if !seen.insert(part) {
                return wrong(format!("part {part} is named twice"));
            }
            bytes = bytes.saturating_add(*size);
        }
        if bytes != rows::bigint(upload.bytes) {
            return wrong(format!(
                "the parts have {bytes} bytes together where {} were announced",
                upload.bytes
            ));
        }
        Ok(())
    }

    async fn assemble(
        &self,
        project: &ProjectId,
        upload: &Upload,
        parts: &[String],
        md5: Option<&str>,
        file: &FileId,
    ) -> Result<(), StoreError> {
        let prefix = ObjectPrefix::UploadParts(upload.id.clone());
        let objects = &self.objects;
        let mut hash = Md5::new();
        let content = futures::stream::iter(parts)
            .then(|part| {
                let key = prefix.file(part.as_str());
                async move { objects.get(&key).await.map(|read| read.stream) }
            })
            .try_flatten()
            .inspect_ok(|piece| hash.update(piece));
        let key = crate::objects::ObjectKey::File(file.clone());
        let stored = objects.put_stream(&key, content, upload.bytes).await?;
        let found = hex::encode(hash.finalize());
        if let Some(expected) = md5.filter(|md5| !md5.eq_ignore_ascii_case(&found)) {
            return Err(StoreError::UploadParts {
                upload: upload.id.clone(),
                reason: format!("the content's MD5 is {found} where {expected} was said"),
            });
        }
        let facts = FileFacts {
            filename: upload.filename.clone(),
            purpose: upload.purpose,
            expires_after: upload.file_expires_after,
        };
        let mut transaction = database::begin(&self.pool).await?;
        let locked = lock(&mut *transaction, project, &upload.id).await?;
        // Its time may have run out while it was put together: that it began in time counts.
        if !matches!(locked.status, UploadStatus::Pending | UploadStatus::Expired) {
            return Err(locked.ended());
        }
        let _: File = files::finish(&mut *transaction, file, &facts, &stored).await?;
        let changed = sqlx::query(
            "UPDATE uploads SET status = 'completed', file_id = $2, part_ids = $3
             WHERE id = $1 AND status = 'pending'",
        )
        .bind(upload.id.as_str())
        .bind(file.as_str())
        .bind(parts)
        .execute(&mut *transaction)
        .await?;
        if changed.rows_affected() != 1 {
            return Err(locked.ended());
        }
        transaction.commit().await?;
        Ok(())
    }

    /// Gives an upload up and drops its parts. One that is cancelled already is no error.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or [`StoreError::UploadEnded`] if it is completed or its time is
    /// over.
    pub async fn cancel_upload(
        &self,
        project: &ProjectId,
        id: &UploadId,
    ) -> Result<Upload, StoreError> {
        let mut transaction = database::begin(&self.pool).await?;
        let locked = lock(&mut *transaction, project, id).await?;
        if locked.status != UploadStatus::Cancelled {
            locked.pending()?;
            sqlx::query("UPDATE uploads SET status = 'cancelled' WHERE id = $1")
                .bind(id.as_str())
                .execute(&mut *transaction)
                .await?;
        }
        transaction.commit().await?;
        self.clear_parts(id).await;
        find(&self.pool, project, id).await
    }

    /// Ends uploads whose time is over and drops the parts of ended ones. Says how many were
    /// cleared away. To be called from time to time.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn purge_uploads(&self) -> Result<usize, StoreError> {
        sqlx::query(
            "UPDATE uploads SET status = 'expired'
             WHERE status = 'pending' AND expires_at < now() - $1::interval",
        )
        .bind(GRACE)
        .execute(&self.pool)
        .await?;
        let ended: Vec<String> =
            sqlx::query_scalar("SELECT id FROM uploads WHERE NOT cleared AND status <> 'pending'")
                .fetch_all(&self.pool)
                .await?;
        for id in &ended {
            self.clear_parts(&UploadId::from(id.as_str())).await;
        }
        Ok(ended.len())
    }

    /// Drops the parts of an ended upload. What fails is done by [`purge_uploads`](Self::purge_uploads).
    async fn clear_parts(&self, id: &UploadId) {
        let cleared = async {
            self.objects.delete_prefix(&ObjectPrefix::UploadParts(id.clone())).await?;
            sqlx::query(
                "WITH gone AS (DELETE FROM upload_parts WHERE upload_id = $1)
                 UPDATE uploads SET cleared = true WHERE id = $1",
            )
            .bind(id.as_str())
            .execute(&self.pool)
            .await?;
            Ok::<_, StoreError>(())
        };
        if let Err(error) = cleared.await {
            tracing::warn!(%error, upload = %id, "parts of an ended upload stay for now");
        }
    }
}

impl Upload {
    /// The upload, if it takes parts.
    fn pending(self) -> Result<Self, StoreError> {
        if self.status == UploadStatus::Pending { Ok(self) } else { Err(self.ended()) }
    }

    fn ended(&self) -> StoreError {
        StoreError::UploadEnded { upload: self.id.clone(), status: self.status.as_str() }
    }
}

/// Selects an upload of a project.
macro_rules! upload_of_project {
    () => {
        concat!("SELECT ", upload_columns!(), " FROM uploads WHERE id = $1 AND project_id = $2")
    };
}

async fn find(
    executor: impl PgExecutor<'_>,
    project: &ProjectId,
    id: &UploadId,
) -> Result<Upload, StoreError> {
    select(executor, upload_of_project!(), project, id).await
}

/// The same, and nobody else changes it until the transaction ends.
async fn lock(
    executor: impl PgExecutor<'_>,
    project: &ProjectId,
    id: &UploadId,
) -> Result<Upload, StoreError> {
    select(executor, concat!(upload_of_project!(), " FOR UPDATE"), project, id).await
}

async fn select(
    executor: impl PgExecutor<'_>,
    statement: &'static str,
    project: &ProjectId,
    id: &UploadId,
) -> Result<Upload, StoreError> {
    sqlx::query_as(statement)
        .bind(id.as_str())
        .bind(project.as_str())
        .fetch_optional(executor)
        .await?
        .ok_or_else(|| StoreError::not_found("upload", id))
}

#[cfg(test)]
mod tests;
