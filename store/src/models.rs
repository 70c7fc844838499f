//! Tuned models, and checkpoints by their model names.

use crate::objects::{CheckpointPlace, ObjectPrefix};
use crate::{Store, StoreError, database, rows};
use sqlx::postgres::PgRow;
use sqlx::{FromRow, Row as _};
use time::OffsetDateTime;
use tunesmith_core::hyperparameters::ResolvedHyperparameters;
use tunesmith_core::ids::{BaseModelId, JobId, OrganizationId, ProjectId};

/// What a job made: its final model, or the one of a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// `ft:…`.
    pub name: String,
    /// The owner.
    pub organization_id: OrganizationId,
    /// The job that made it.
    pub job_id: JobId,
    /// Where its weights lie.
    pub place: CheckpointPlace,
    /// The model that was tuned.
    pub base_model_id: BaseModelId,
    /// That model's name.
    pub base_model: String,
    /// How; its `adapter` says what the weights are.
    pub hyperparameters: ResolvedHyperparameters,
    /// When it was made.
    pub created_at: OffsetDateTime,
}

impl Model {
    /// The objects that people download.
    #[must_use]
    pub fn weights(&self) -> ObjectPrefix {
        ObjectPrefix::CheckpointWeights(self.place.clone())
    }
}

impl FromRow<'_, PgRow> for Model {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            name: row.try_get("name")?,
            organization_id: rows::text(row, "organization_id")?,
            job_id: rows::text(row, "job_id")?,
            place: place(row)?,
            base_model_id: rows::text(row, "base_model_id")?,
            base_model: row.try_get("model")?,
            hyperparameters: rows::json(row, "resolved")?,
            created_at: row.try_get("created_at")?,
        })
    }
}

fn place(row: &PgRow) -> sqlx::Result<CheckpointPlace> {
    Ok(CheckpointPlace {
        job: rows::text(row, "job_id")?,
        attempt: rows::attempt(row, "attempt")?,
        step: rows::count(row, "step")?,
    })
}

impl Store {
    /// The tuned models of `project`, oldest first. Checkpoints are listed by their jobs.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn list_models(&self, project: &ProjectId) -> Result<Vec<Model>, StoreError> {
        Ok(sqlx::query_as(
            "SELECT models.name, projects.organization_id, models.job_id, models.attempt,
                 models.step, jobs.base_model_id, jobs.model, jobs.resolved, models.created_at
             FROM models JOIN jobs ON jobs.id = models.job_id
                 JOIN projects ON projects.id = models.project_id
             WHERE models.project_id = $1 ORDER BY models.created_at, models.name",
        )
        .bind(project.as_str())
        .fetch_all(&self.pool)
        .await?)
    }

    /// The tuned model or the checkpoint `name` of `project`, or one that it was given leave to use.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], also for any other model of another project.
    pub async fn model(&self, project: &ProjectId, name: &str) -> Result<Model, StoreError> {
        sqlx::query_as(
            "SELECT found.name, projects.organization_id, found.job_id, found.attempt,
                 found.step, jobs.base_model_id, jobs.model, jobs.resolved, found.created_at
             FROM (
                 SELECT name, job_id, attempt, step, created_at FROM models
                 UNION ALL
                 SELECT name, job_id, attempt, step, created_at FROM checkpoints
                 WHERE deleted_at IS NULL
             ) AS found
             JOIN jobs ON jobs.id = found.job_id
             JOIN projects ON projects.id = jobs.project_id
             WHERE found.name = $1
               AND (jobs.project_id = $2
                    OR EXISTS (SELECT 1 FROM checkpoint_permissions AS permission
                               WHERE permission.model_name = found.name
                                 AND permission.project_id = $2))",
        )
        .bind(name)
        .bind(project.as_str())
        .fetch_optional(&self.pool)
        .await?
        .ok_or_else(|| StoreError::not_found("model", name))
    }

    /// Deletes a tuned model, with the checkpoint that has the same weights, or one checkpoint.
    /// Weights that something else still needs stay: a checkpoint's that a model has too, that
    /// its job may resume from, or that may turn out as the job's best.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn delete_model(&self, project: &ProjectId, name: &str) -> Result<(), StoreError> {
        let mut transaction = database::begin(&self.pool).await?;
        let model = sqlx::query(
            "WITH model AS (
                 DELETE FROM models WHERE name = $1 AND project_id = $2
                 RETURNING job_id, attempt, step
             ), checkpoint AS (
                 UPDATE checkpoints SET deleted_at = now() FROM model
                 WHERE checkpoints.job_id = model.job_id AND checkpoints.step = model.step
                   AND checkpoints.attempt = model.attempt AND checkpoints.deleted_at IS NULL
             ) SELECT job_id, attempt, step, false AS needed FROM model",
        )
        .bind(name)
        .bind(project.as_str())
        .fetch_optional(&mut *transaction)
        .await?;
        let gone = match model {
            Some(model) => model,
            // The job's row is locked so that it cannot succeed with these weights meanwhile.
            None => sqlx::query(
                "WITH job AS (
                     SELECT jobs.id, finished_at, resume_attempt, resume_step,
                         resolved -> 'load_best_model_at_end' = 'true' AS may_be_best
                     FROM jobs JOIN checkpoints ON checkpoints.job_id = jobs.id
                     WHERE checkpoints.name = $1 AND jobs.project_id = $2 FOR UPDATE OF jobs
                 ), gone AS (
                     UPDATE checkpoints SET deleted_at = now() FROM job
                     WHERE name = $1 AND job_id = job.id AND deleted_at IS NULL
                     RETURNING job_id, attempt, step
                 ) SELECT gone.job_id, gone.attempt, gone.step,
                     (job.finished_at IS NULL AND (job.may_be_best
                         OR job.resume_attempt = gone.attempt
                         AND job.resume_step = gone.step)) IS TRUE
                     OR EXISTS (SELECT 1 FROM models WHERE models.job_id = gone.job_id
                         AND models.attempt = gone.attempt AND models.step = gone.step)
                     AS needed
                 FROM gone, job",
            )
            .bind(name)
            .bind(project.as_str())
            .fetch_optional(&mut *transaction)
            .await?
            .ok_or_else(|| StoreError::not_found("model", name))?,
        };
        transaction.commit().await?;
        if gone.try_get("needed")? {
            return Ok(());
        }
        // The name is gone, which is what counts for the client: objects that stay are only litter.
        if let Err(error) =
            self.objects.delete_prefix(&ObjectPrefix::CheckpointWeights(place(&gone)?)).await
        {
            tracing::warn!(%error, model = name, "weights of a deleted model stay in the object store");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
