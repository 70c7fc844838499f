//! What a job says of itself, line by line.

use crate::page::{Page, PageRequest};
use crate::words::words;
use crate::{Store, StoreError, rows};
use serde::Serialize;
use serde_json::Value;
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use sqlx::{FromRow, Row as _};
use time::OffsetDateTime;
use tunesmith_core::errors::ApiError;
use tunesmith_core::ids::{CheckpointId, EventId, FileId, JobId, ProjectId};
use tunesmith_core::protocol::{Note, NoteLevel};

words! {
    /// How much an event matters.
    Level {
        /// As it should be.
        Info = "info",
        /// Worth a look.
        Warn = "warn",
        /// Why the job failed.
        Error = "error",
    }
}

words! {
    /// What an event carries.
    EventType {
        /// A sentence.
        Message = "message",
        /// A step's figures, in `data`.
        Metrics = "metrics",
    }
}

/// An event that is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its id.
    pub id: EventId,
    /// When.
    pub created_at: OffsetDateTime,
    /// How much it matters.
    pub level: Level,
    /// What it carries.
    pub kind: EventType,
    /// For people.
    pub message: String,
    /// For programs.
    pub data: Option<Value>,
}

impl FromRow<'_, PgRow> for Event {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            id: rows::text(row, "id")?,
            created_at: row.try_get("created_at")?,
            level: rows::word(row, "level", Level::parse)?,
            kind: rows::word(row, "type", EventType::parse)?,
            message: row.try_get("message")?,
            data: rows::optional_json(row, "data")?,
        })
    }
}

/// An event to be stored, in the form that the insert statement reads.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NewEvent {
    id: EventId,
    level: &'static str,
    #[serde(rename = "type")]
    kind: &'static str,
    message: String,
    data: Option<Value>,
    dedupe_key: Option<String>,
}

impl NewEvent {
    /// A sentence.
    pub fn message(level: Level, message: impl Into<String>) -> Self {
        Self {
            id: EventId::generate(&mut rand::rng()),
            level: level.as_str(),
            kind: EventType::Message.as_str(),
            message: message.into(),
            data: None,
            dedupe_key: None,
        }
    }

    /// A step's figures. A run that is resumed says a step again; it is stored once.
    pub fn step(step: u64, message: impl Into<String>, data: Value) -> Self {
        Self {
            kind: EventType::Metrics.as_str(),
            data: Some(data),
            dedupe_key: Some(format!("step-{step}")),
            ..Self::message(Level::Info, message)
        }
    }

    /// The same event at most once in a job, by a key of the caller's.
    #[must_use]
    pub fn once(mut self, key: impl Into<String>) -> Self {
        self.dedupe_key = Some(key.into());
        self
    }

    /// What the trainer has to say. A run that is resumed says it again; it is stored once.
    pub fn note(note: &Note) -> Self {
        let level = match note.level {
            NoteLevel::Info => Level::Info,
            NoteLevel::Warn => Level::Warn,
        };
        Self::message(level, &note.message).once(format!("note-{}", note.key))
    }

    fn info(message: impl Into<String>) -> Self {
        Self::message(Level::Info, message)
    }

    pub(crate) fn job_created(job: &JobId) -> Self {
        Self::info(format!("Created fine-tuning job: {job}"))
    }

    pub(crate) fn validating_training_file(file: &FileId) -> Self {
        Self::info(format!("Validating training file: {file}"))
    }

    pub(crate) fn validating_both_files(training: &FileId, validation: &FileId) -> Self {
        Self::info(format!(
            "Validating training file: {training} and validation file: {validation}"
        ))
    }

    pub(crate) fn files_validated() -> Self {
        Self::info("Files validated, moving job to queued state")
    }

    pub(crate) fn started() -> Self {
        Self::info("Fine-tuning job started").once("started")
    }

    pub(crate) fn checkpoint_created(step: u64, id: &CheckpointId) -> Self {
        Self::info(format!("Checkpoint created at step {step} with Snapshot ID: {id}"))
            .once(format!("checkpoint-{step}"))
    }

    pub(crate) fn model_created(name: &str) -> Self {
        Self::info(format!("New fine-tuned model created: {name}"))
    }

    pub(crate) fn succeeded() -> Self {
        Self::info("The job has successfully completed.")
    }

    pub(crate) fn failed(error: &ApiError) -> Self {
        Self::message(Level::Error, format!("The job failed: {}", error.message))
    }

    pub(crate) fn cancelled() -> Self {
        Self::info("The job was cancelled.")
    }

    pub(crate) fn pausing() -> Self {
        Self::info("Pausing the job: it stops after a checkpoint")
    }

    pub(crate) fn paused() -> Self {
        Self::info("The job is paused")
    }

    pub(crate) fn resumed() -> Self {
        Self::info("The job was resumed")
    }

    pub(crate) fn given_back() -> Self {
        Self::info("The worker is stopping; the job goes on from its last step elsewhere")
    }

    pub(crate) fn worker_lost() -> Self {
        Self::message(Level::Warn, "The worker was lost; the job goes on from its last checkpoint")
    }
}

/// The part of a statement that stores events for the job whose id a CTE called `moved` returns;
/// none if it returns none. `$events` is the placeholder of a JSON array of [`NewEvent`].
macro_rules! add_events {
    ($events:literal) => {
        concat!(
            "events AS (
                INSERT INTO job_events (id, job_id, level, type, message, data, dedupe_key)
                SELECT event.id, moved.id, event.level, event.type, event.message, event.data,
                       event.dedupe_key
                FROM moved, ROWS FROM (jsonb_to_recordset(",
            $events,
            ") AS (
                    id text, level text, type text, message text, data jsonb, dedupe_key text
                )) WITH ORDINALITY AS event
                    (id, level, type, message, data, dedupe_key, position)
                ORDER BY event.position
                ON CONFLICT (job_id, dedupe_key) DO NOTHING
            )"
        )
    };
}
pub(crate) use add_events;

/// Stores events of a job that the transaction has locked or made.
pub(crate) async fn insert(
    connection: &mut sqlx::PgConnection,
    job: &JobId,
    events: &[NewEvent],
) -> Result<(), StoreError> {
    sqlx::query(concat!("WITH moved AS (SELECT $1 AS id), ", add_events!("$2"), " SELECT 1"))
        .bind(job.as_str())
        .bind(Json(events))
        .execute(connection)
        .await?;
    Ok(())
}

/// Selects the place of the event `$1` of the job `$2`.
pub(crate) const EVENT_SEQUENCE: &str =
    "SELECT sequence FROM job_events WHERE id = $1 AND job_id = $2";

impl Store {
    /// The events of a job, newest first.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if `project` has no such job, [`StoreError::UnknownCursor`].
    pub async fn list_events(
        &self,
        project: &ProjectId,
        job: &JobId,
        request: &PageRequest,
    ) -> Result<Page<Event>, StoreError> {
        self.require_job(project, job).await?;
        let cursor = EVENT_SEQUENCE;
        let list = "SELECT id, created_at, level, type, message, data FROM job_events
             WHERE job_id = $1 AND ($2::bigint IS NULL OR sequence < $2)
             ORDER BY sequence DESC LIMIT $3";
        request.fetch_page(&self.pool, cursor, list, Some(job.as_str())).await
    }
}
