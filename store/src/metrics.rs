//! The loss curve.

use crate::{Store, StoreError, rows};
use sqlx::Row as _;
use sqlx::postgres::PgRow;
use tunesmith_core::ids::{JobId, ProjectId};
use tunesmith_core::metrics::StepMetrics;

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

impl Store {
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
