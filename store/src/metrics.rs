//! The loss curve.

use crate::{Store, StoreError, rows};
use sqlx::Row as _;
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use tunesmith_core::hyperparameters::ResolvedHyperparameters;
use tunesmith_core::ids::{BaseModelId, JobId, ProjectId};
use tunesmith_core::metrics::StepMetrics;
use tunesmith_core::state::JobStatus;

/// Selects steps of the job `$1`.
macro_rules! steps_of_job {
    () => {
        "SELECT sequence, step, epoch, train_loss, train_mean_token_accuracy, valid_loss,
             valid_mean_token_accuracy, full_valid_loss, full_valid_mean_token_accuracy,
             learning_rate, grad_norm, tokens, tokens_per_second, elapsed_seconds,
             train_reward_accuracy, train_reward_margin, valid_reward_accuracy, valid_reward_margin
         FROM job_metrics WHERE job_id = $1"
    };
}
pub(crate) use steps_of_job;

/// How fast jobs of a kind trained.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainingSpeed {
    /// How many jobs this is the mean of.
    pub jobs: u64,
    /// Tokens over training time, evaluations included.
    pub tokens_per_second: f64,
}

/// How far a run has come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LastStep {
    /// The last step that it has told of; from 1.
    pub step: u64,
    /// Training time until then.
    pub elapsed_seconds: f64,
}

/// Jobs of which a speed is the mean.
const RECENT_JOBS: i64 = 5;

impl Store {
    /// How fast the last jobs on `base_model` trained that had the method and the kind of adapter
    /// of `like`, whoever's they were; `None` if there was none. Models that were tuned in full from one
    /// imported model are as fast as that.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn training_speed(
        &self,
        base_model: &BaseModelId,
        like: &ResolvedHyperparameters,
    ) -> Result<Option<TrainingSpeed>, StoreError> {
        let row = sqlx::query(
            "WITH alike AS (
                SELECT alike.id FROM base_models AS base JOIN base_models AS alike
                  ON coalesce(alike.origin_id, alike.id) = coalesce(base.origin_id, base.id)
                WHERE base.id = $1)
             SELECT count(*) AS jobs, sum(tokens)::double precision / sum(elapsed_seconds) AS speed
             FROM (
                SELECT job_metrics.tokens, job_metrics.elapsed_seconds
                FROM jobs JOIN job_metrics
                  ON job_metrics.job_id = jobs.id AND job_metrics.step = jobs.last_step
                WHERE jobs.base_model_id IN (SELECT id FROM alike) AND jobs.method = $2 AND jobs.status = $3
                  AND jobs.resolved #> '{adapter,type}' = $4
                  AND job_metrics.elapsed_seconds > 0
                ORDER BY jobs.sequence DESC LIMIT $5) AS recent",
        )
        .bind(base_model.as_str())
        .bind(like.method.as_str())
        .bind(JobStatus::Succeeded.as_str())
        .bind(Json(like.adapter.kind))
        .bind(RECENT_JOBS)
        .fetch_one(&self.pool)
        .await?;
        let speed: Option<f64> = row.try_get("speed")?;
        let jobs = rows::count(&row, "jobs")?;
        Ok(speed.map(|tokens_per_second| TrainingSpeed { jobs, tokens_per_second }))
    }

    /// The metrics of a job's steps after `after_step`, in their order; 0 for all.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if `project` has no such job.
    pub async fn metrics(
        &self,
        project: &ProjectId,
        job: &JobId,
        after_step: u64,
    ) -> Result<Vec<StepMetrics>, StoreError> {
        self.require_job(project, job).await?;
        let found = sqlx::query(concat!(steps_of_job!(), " AND step > $2 ORDER BY step"))
            .bind(job.as_str())
            .bind(rows::bigint(after_step))
            .fetch_all(&self.pool)
            .await?;
        Ok(found.iter().map(step_metrics).collect::<sqlx::Result<_>>()?)
    }

    /// The metrics of a job's last step.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if `project` has no such job.
    pub async fn last_metrics(
        &self,
        project: &ProjectId,
        job: &JobId,
    ) -> Result<Option<StepMetrics>, StoreError> {
        self.require_job(project, job).await?;
        let found = sqlx::query(concat!(steps_of_job!(), " ORDER BY step DESC LIMIT 1"))
            .bind(job.as_str())
            .fetch_optional(&self.pool)
            .await?;
        Ok(found.as_ref().map(step_metrics).transpose()?)
    }
}

pub(crate) fn step_metrics(row: &PgRow) -> sqlx::Result<StepMetrics> {
    Ok(StepMetrics {
        step: rows::count(row, "step")?,
        epoch: row.try_get("epoch")?,
        train_loss: row.try_get("train_loss")?,
        train_mean_token_accuracy: row.try_get("train_mean_token_accuracy")?,
        valid_loss: row.try_get("valid_loss")?,
        valid_mean_token_accuracy: row.try_get("valid_mean_token_accuracy")?,
        full_valid_loss: row.try_get("full_valid_loss")?,
        full_valid_mean_token_accuracy: row.try_get("full_valid_mean_token_accuracy")?,
        learning_rate: row.try_get("learning_rate")?,
        grad_norm: row.try_get("grad_norm")?,
        tokens: rows::count(row, "tokens")?,
        tokens_per_second: row.try_get("tokens_per_second")?,
        elapsed_seconds: row.try_get("elapsed_seconds")?,
        train_reward_accuracy: row.try_get("train_reward_accuracy")?,
        train_reward_margin: row.try_get("train_reward_margin")?,
        valid_reward_accuracy: row.try_get("valid_reward_accuracy")?,
        valid_reward_margin: row.try_get("valid_reward_margin")?,
    })
}
