//! What a worker writes of a run: facts, steps, checkpoints, the end.

use super::Lease;
use crate::events::{NewEvent, add_events};
use crate::files::{FileStatus, Purpose};
use crate::jobs::words;
use crate::objects::Stored;
use crate::{Store, StoreError, rows};
use sqlx::Row as _;
use sqlx::types::Json;
use tunesmith_core::ids::{CheckpointId, FileId, checkpoint_model_name};
use tunesmith_core::metrics::{RowLoss, StepMetrics};
use tunesmith_core::protocol::Started;
use tunesmith_core::state::{JobStatus, sources_of};
use tunesmith_core::weights::CheckpointPlace;

/// A checkpoint whose objects are all stored.
#[derive(Debug, Clone)]
pub struct NewCheckpoint {
    /// Optimiser steps done.
    pub step: u64,
    /// The step's metrics.
    pub metrics: Option<StepMetrics>,
    /// Whether it is there to resume from and not for people to see.
    pub for_resume_only: bool,
}

/// The checkpoint that a new one has taken the place of, to resume from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SupersededCheckpoint {
    /// Its state is of no use any more.
    pub place: CheckpointPlace,
    /// Nor are its weights: it was never shown.
    pub weights_too: bool,
}

/// How a job ended well.
#[derive(Debug, Clone)]
pub struct Completed {
    /// Tokens seen in training, each epoch counted.
    pub trained_tokens: u64,
    /// Optimiser steps done; what an earlier try stored beyond them goes.
    pub steps: u64,
    /// The step whose recorded checkpoint is the tuned model.
    pub model_step: u64,
    /// The loss curve, begun with [`Store::begin_file`] and stored.
    pub result_file: FileId,
    /// The name under which people download it.
    pub result_filename: String,
    /// What was stored.
    pub result_stored: Stored,
}

impl Store {
    /// Notes the facts of a run that begins or goes on. The loss before the first step stays what
    /// the first attempt found.
    ///
    /// # Errors
    /// [`StoreError::StaleLease`].
    pub async fn record_started(&self, lease: &Lease, run: &Started) -> Result<(), StoreError> {
        let row = fenced!(
            lease,
            "WITH moved AS (
                UPDATE jobs SET run = $4::jsonb || CASE
                    WHEN jsonb_typeof(run -> 'initial_valid_loss') = 'number'
                    THEN jsonb_build_object('initial_valid_loss', run -> 'initial_valid_loss')
                    ELSE '{}' END
                WHERE ",
            fence!(),
            " RETURNING id), ",
            add_events!("$5"),
            " SELECT id FROM moved"
        )
        .bind(Json(run))
        .bind(Json([NewEvent::started()]))
        .fetch_optional(&self.pool)
        .await?;
        lease.one(row).map(drop)
    }

    /// Stores the metrics of steps and what there is to say of them. A step that an earlier
    /// attempt stored is replaced; its events are not said again.
    ///
    /// # Errors
    /// [`StoreError::StaleLease`].
    pub async fn record_steps(
        &self,
        lease: &Lease,
        steps: &[StepMetrics],
        events: &[NewEvent],
    ) -> Result<(), StoreError> {
        let last_step = steps.iter().map(|step| step.step).max().unwrap_or(0);
        let row = fenced!(
            lease,
            "WITH moved AS (
                UPDATE jobs SET last_step = greatest(last_step, $4) WHERE ",
            fence!(),
            " RETURNING id
             ), ",
            add_events!("$5"),
            ", metrics AS (
                INSERT INTO job_metrics (job_id, step, epoch, train_loss,
                    train_mean_token_accuracy, valid_loss, valid_mean_token_accuracy,
                    full_valid_loss, full_valid_mean_token_accuracy, learning_rate, grad_norm,
                    tokens, tokens_per_second, elapsed_seconds, train_reward_accuracy,
                    train_reward_margin, valid_reward_accuracy, valid_reward_margin)
                SELECT moved.id, step.* FROM moved, jsonb_to_recordset($6) AS step (
                    step bigint, epoch double precision, train_loss double precision,
                    train_mean_token_accuracy double precision, valid_loss double precision,
                    valid_mean_token_accuracy double precision,
                    full_valid_loss double precision,
                    full_valid_mean_token_accuracy double precision,
                    learning_rate double precision, grad_norm double precision,
                    tokens bigint, tokens_per_second double precision,
                    elapsed_seconds double precision,
                    train_reward_accuracy double precision, train_reward_margin double precision,
                    valid_reward_accuracy double precision, valid_reward_margin double precision)
                ON CONFLICT (job_id, step) DO UPDATE SET
                    sequence = EXCLUDED.sequence,
                    epoch = EXCLUDED.epoch, train_loss = EXCLUDED.train_loss,
                    train_mean_token_accuracy = EXCLUDED.train_mean_token_accuracy,
                    valid_loss = EXCLUDED.valid_loss,
                    valid_mean_token_accuracy = EXCLUDED.valid_mean_token_accuracy,
                    full_valid_loss = EXCLUDED.full_valid_loss,
                    full_valid_mean_token_accuracy = EXCLUDED.full_valid_mean_token_accuracy,
                    learning_rate = EXCLUDED.learning_rate, grad_norm = EXCLUDED.grad_norm,
                    tokens = EXCLUDED.tokens, tokens_per_second = EXCLUDED.tokens_per_second,
                    elapsed_seconds = EXCLUDED.elapsed_seconds,
                    train_reward_accuracy = EXCLUDED.train_reward_accuracy,
                    train_reward_margin = EXCLUDED.train_reward_margin,
                    valid_reward_accuracy = EXCLUDED.valid_reward_accuracy,
                    valid_reward_margin = EXCLUDED.valid_reward_margin
             ) SELECT id FROM moved"
        )
        .bind(rows::bigint(last_step))
        .bind(Json(events))
        .bind(Json(steps))
        .fetch_optional(&self.pool)
        .await?;
        lease.one(row).map(drop)
    }

    /// Stores what rows showed when they were last trained on, in place of what they showed before.
    ///
    /// # Errors
    /// [`StoreError::StaleLease`].
    pub async fn record_row_losses(
        &self,
        lease: &Lease,
        losses: &[RowLoss],
    ) -> Result<(), StoreError> {
        let row = fenced!(
            lease,
            "WITH held AS (
                SELECT id FROM jobs WHERE ",
            fence!(),
            " FOR UPDATE
             ), losses AS (
                INSERT INTO job_row_losses (job_id, row_number, line, step, loss)
                SELECT held.id, loss.row, loss.line, loss.step, loss.loss
                FROM held, jsonb_to_recordset($4) AS loss (
                    row bigint, line bigint, step bigint, loss double precision)
                ON CONFLICT (job_id, row_number) DO UPDATE SET
                    line = EXCLUDED.line, step = EXCLUDED.step, loss = EXCLUDED.loss
             ) SELECT id FROM held"
        )
        .bind(Json(losses))
        .fetch_optional(&self.pool)
        .await?;
        lease.one(row).map(drop)
    }

    /// Points the job at a checkpoint of this attempt whose objects are all stored, and shows it.
    /// This is the progress that sets the count of lost attempts back to none.
    ///
    /// Returns the checkpoint that is no longer needed to resume from; its objects may go now.
    ///
    /// # Errors
    /// [`StoreError::StaleLease`].
    pub async fn record_checkpoint(
        &self,
        lease: &Lease,
        checkpoint: &NewCheckpoint,
    ) -> Result<Option<SupersededCheckpoint>, StoreError> {
        let id = CheckpointId::generate(&mut rand::rng());
        let mut events = Vec::new();
        if !checkpoint.for_resume_only {
            events.push(NewEvent::checkpoint_created(checkpoint.step, &id));
        }
        let row = fenced!(
            lease,
            "WITH previous AS (
                SELECT resume_attempt, resume_step, resume_is_private FROM jobs WHERE id = $1
             ), moved AS (
                UPDATE jobs SET tries = 0, resume_attempt = $2, resume_step = $4,
                    resume_is_private = $5 AND NOT EXISTS (
                        SELECT 1 FROM checkpoints WHERE job_id = $1 AND step = $4)
                WHERE ",
            fence!(),
            " RETURNING id, model_name
             ), ",
            add_events!("$6"),
            ", shown AS (
                INSERT INTO checkpoints (id, job_id, attempt, step, name, metrics)
                SELECT $7, moved.id, $2, $4, moved.model_name || $8, $9 FROM moved WHERE NOT $5
                ON CONFLICT (job_id, step) DO NOTHING
             ) SELECT previous.* FROM moved, previous"
        )
        .bind(rows::bigint(checkpoint.step))
        .bind(checkpoint.for_resume_only)
        .bind(Json(&events))
        .bind(id.as_str())
        .bind(checkpoint_model_name("", checkpoint.step))
        .bind(checkpoint.metrics.as_ref().map(Json))
        .fetch_optional(&self.pool)
        .await?;
        let row = lease.one(row)?;
        let Some(step) = rows::optional_count(&row, "resume_step")? else { return Ok(None) };
        let attempt = rows::attempt(&row, "resume_attempt")?;
        let place = CheckpointPlace { job: lease.job_id.clone(), attempt, step };
        let is_same = attempt == lease.attempt && step == checkpoint.step;
        let weights_too = row.try_get("resume_is_private")?;
        Ok((!is_same).then_some(SupersededCheckpoint { place, weights_too }))
    }

    /// Ends a job well: its model and its result file are there from now on. The state objects of
    /// the last checkpoint may go after this. The run's total becomes the steps that were done.
    ///
    /// # Errors
    /// [`StoreError::StaleLease`].
    pub async fn complete_job(
        &self,
        lease: &Lease,
        completed: &Completed,
    ) -> Result<(), StoreError> {
        let name = fenced!(lease, "SELECT model_name FROM jobs WHERE ", fence!())
            .fetch_optional(&self.pool)
            .await?;
        // The name never changes, so it may be read ahead of the statement that counts.
        let name: String = lease.one(name)?.try_get("model_name")?;
        let row = fenced!(
            lease,
            "WITH moved AS (
                UPDATE jobs SET status = $4, finished_at = now(), trained_tokens = $5,
                    result_file = $6, worker_id = NULL, lease_expires_at = NULL,
                    cancel_requested = false, paused = false, last_step = $14,
                    run = jsonb_set(run, '{total_steps}', to_jsonb($14::bigint))
                WHERE ",
            fence!(),
            " AND status = ANY($7)
                RETURNING id, project_id, model_name
             ), ",
            add_events!("$8"),
            ", result AS (
                UPDATE files SET status = $9, filename = $10, purpose = $11, bytes = $12,
                    sha256 = $13
                FROM moved WHERE files.id = $6
             ), model AS (
                INSERT INTO models (name, project_id, job_id, attempt, step)
                SELECT model_name, project_id, id,
                    (SELECT attempt FROM checkpoints WHERE job_id = $1 AND step = $15), $15
                FROM moved
             ), beyond AS (
                DELETE FROM job_metrics USING moved
                WHERE job_metrics.job_id = moved.id AND job_metrics.step > $14
             ), rows_beyond AS (
                DELETE FROM job_row_losses USING moved
                WHERE job_row_losses.job_id = moved.id AND job_row_losses.step > $14
             ) SELECT id FROM moved"
        )
        .bind(JobStatus::Succeeded.as_str())
        .bind(rows::bigint(completed.trained_tokens))
        .bind(completed.result_file.as_str())
        .bind(words(sources_of(JobStatus::Succeeded)))
        .bind(Json([NewEvent::model_created(&name), NewEvent::succeeded()]))
        .bind(FileStatus::Processed.as_str())
        .bind(&completed.result_filename)
        .bind(Purpose::FineTuneResults.as_str())
        .bind(rows::bigint(completed.result_stored.bytes))
        .bind(&completed.result_stored.sha256)
        .bind(rows::bigint(completed.steps))
        .bind(rows::bigint(completed.model_step))
        .fetch_optional(&self.pool)
        .await?;
        lease.one(row).map(drop)
    }
}
