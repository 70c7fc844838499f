//! Making a job, once, however often a client asks.

use super::{Job, job_columns};
use crate::events::{NewEvent, add_events};
use crate::files::is_there;
use crate::idempotency::{Creation, Idempotency, Request, add_creation};
use crate::notify::Channel;
use crate::tenants::Caller;
use crate::{Store, StoreError, database, models};
use serde_json::{Map, Value};
use sqlx::types::Json;
use sqlx::{FromRow as _, PgConnection};
use std::collections::BTreeMap;
use tunesmith_core::hyperparameters::Method;
use tunesmith_core::ids::{BaseModelId, FileId, JobId, tuned_model_name};
use tunesmith_core::state::JobStatus;
use tunesmith_core::weights::WeightsPlace;

/// A job that passed the checks of the request.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// The name of the model to start from, as the client gave it.
    pub model: String,
    /// Whether that is a tuned model or a checkpoint, which must still be there.
    pub is_tuned: bool,
    /// The base model.
    pub base_model_id: BaseModelId,
    /// The base model's name in the tuned model's.
    pub base_model: String,
    /// The weights of `model` to begin with, where it is a tuned model or a checkpoint and not itself
    /// the base model.
    pub start: Option<WeightsPlace>,
    /// What to train on.
    pub training_file: FileId,
    /// What to measure on.
    pub validation_file: Option<FileId>,
    /// The client's part of the tuned model's name.
    pub suffix: Option<String>,
    /// Seeds everything that is random; below 2⁶³.
    pub seed: u64,
    /// The client's own notes.
    pub metadata: BTreeMap<String, String>,
    /// What it learns from.
    pub method: Method,
    /// The hyperparameters as the client gave them.
    pub hyperparameters: Map<String, Value>,
    /// How many unfinished jobs the project may have, this one included.
    pub most_unfinished: Option<u64>,
    /// Events after the first ones: warnings about values that are allowed and rarely meant.
    pub events: Vec<NewEvent>,
}

/// The job of a request.
#[derive(Debug, Clone)]
pub struct CreatedJob {
    /// The job.
    pub job: Job,
    /// Whether this request made it, and not one that it retries.
    pub is_new: bool,
}

impl Store {
    /// Makes a job in the state `validating_files`, with its first events, or finds the one that
    /// the same request has made before.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] with the id of a file that is not in the caller's project, or the
    /// name of a tuned model that is not there (any more), [`StoreError::IdempotencyConflict`],
    /// [`StoreError::TooManyJobs`].
    pub async fn create_job(
        &self,
        caller: &Caller,
        new: &NewJob,
        idempotency: &Idempotency,
    ) -> Result<CreatedJob, StoreError> {
        let mut transaction = database::begin(&self.pool).await?;
        let request = Request::new(Creation::Job, caller.api_key_id.as_str(), idempotency);
        if let Some(made) = request.made_before(&mut transaction).await? {
            drop(transaction);
            let job = self.job(&caller.project_id, &JobId::from(made)).await?;
            return Ok(CreatedJob { job, is_new: false });
        }
        require_room(&mut transaction, caller, new).await?;
        let job = insert(&mut transaction, caller, new, &request).await?;
        transaction.commit().await?;
        Ok(CreatedJob { job, is_new: true })
    }
}

/// Fails if the project has as many unfinished jobs as it may. Jobs that are being made at the same
/// time wait for each other, so that no two take the last place.
async fn require_room(
    connection: &mut PgConnection,
    caller: &Caller,
    new: &NewJob,
) -> Result<(), StoreError> {
    let Some(limit) = new.most_unfinished else { return Ok(()) };
    sqlx::query("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))")
        .bind(format!("jobs of {}", caller.project_id))
        .execute(&mut *connection)
        .await?;
    let unfinished: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM jobs WHERE project_id = $1 AND finished_at IS NULL",
    )
    .bind(caller.project_id.as_str())
    .fetch_one(connection)
    .await?;
    if crate::rows::bigint(limit) <= unfinished {
        return Err(StoreError::TooManyJobs { limit });
    }
    Ok(())
}

/// The job with its first events, the note of its request, and a call to who validates it, as one
/// statement: each more would be another trip to the database while the transaction holds its locks.
async fn insert(
    connection: &mut PgConnection,
    caller: &Caller,
    new: &NewJob,
    request: &Request<'_>,
) -> Result<Job, StoreError> {
    let organization = hold_files(connection, caller, new).await?;
    if new.is_tuned {
        models::hold(connection, &new.model).await?;
    }
    let id = JobId::generate(&mut rand::rng());
    let suffix = new.suffix.as_deref();
    let model_name = tuned_model_name(&new.base_model, &organization, suffix, &mut rand::rng());
    let validating = match &new.validation_file {
        Some(validation) => NewEvent::validating_both_files(&new.training_file, validation),
        None => NewEvent::validating_training_file(&new.training_file),
    };
    let mut events = vec![NewEvent::job_created(&id), validating];
    events.extend_from_slice(&new.events);
    let statement = concat!(
        "WITH moved AS (
             INSERT INTO jobs (id, project_id, api_key_id, model, base_model_id, training_file,
                 validation_file, suffix, seed, metadata, hyperparameters, model_name, status, method,
                 start)
             VALUES ($5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19)
             RETURNING *
         ), ",
        add_creation!(),
        ", ",
        add_events!("$20"),
        ", woken AS (SELECT pg_notify($21, ''))
         SELECT ",
        job_columns!(),
        " FROM moved AS jobs JOIN projects ON projects.id = jobs.project_id, woken"
    );
    let made = request
        .bind(sqlx::query(statement))
        .bind(id.as_str())
        .bind(caller.project_id.as_str())
        .bind(caller.api_key_id.as_str())
        .bind(&new.model)
        .bind(new.base_model_id.as_str())
        .bind(new.training_file.as_str())
        .bind(new.validation_file.as_ref().map(FileId::as_str))
        .bind(suffix)
        .bind(crate::rows::bigint(new.seed))
        .bind(Json(&new.metadata))
        .bind(Json(&new.hyperparameters))
        .bind(model_name)
        .bind(JobStatus::ValidatingFiles.as_str())
        .bind(new.method.as_str())
        .bind(new.start.as_ref().map(Json))
        .bind(Json(events))
        .bind(Channel::Validation.as_str())
        .fetch_one(connection)
        .await?;
    Ok(Job::from_row(&made)?)
}

/// Checks the files and keeps them from being deleted until the job is there to protect them; gives
/// the name of the caller's organisation.
async fn hold_files(
    connection: &mut PgConnection,
    caller: &Caller,
    new: &NewJob,
) -> Result<String, StoreError> {
    let files: Vec<&FileId> =
        std::iter::once(&new.training_file).chain(&new.validation_file).collect();
    let (organization, held): (String, Vec<String>) = sqlx::query_as(concat!(
        "WITH held AS (
             SELECT id FROM files WHERE id = ANY($1) AND project_id = $2 AND ",
        is_there!(),
        " FOR SHARE
         )
         SELECT name, ARRAY(SELECT id FROM held) FROM organizations WHERE id = $3"
    ))
    .bind(files.iter().map(|file| file.as_str()).collect::<Vec<_>>())
    .bind(caller.project_id.as_str())
    .bind(caller.organization_id.as_str())
    .fetch_one(connection)
    .await?;
    match files.into_iter().find(|file| !held.iter().any(|held| held == file.as_str())) {
        Some(missing) => Err(StoreError::not_found("file", missing)),
        None => Ok(organization),
    }
}
