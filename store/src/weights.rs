//! The weights of tuned models whose names are gone: whether anything still stands on them, and their
//! end when nothing does.

use crate::{Store, StoreError};
use sqlx::PgConnection;
use sqlx::types::Json;
use tunesmith_core::weights::WeightsPlace;

/// Whether anything needs the weights at the place `$1`: a model, checkpoint or imported adapter that
/// has them, their own job, which may resume from them or turn them out as its best, another unfinished
/// job that begins with them, or what stands on them as on a base model, be it an unfinished job or a
/// model.
///
/// All is asked in one statement, and so of one moment. A job that is made from a model holds that
/// model until it is there itself, so there is no moment at which neither is.
const NEEDED: &str = "
    WITH place AS (
        SELECT $1 #>> '{checkpoint,job}' AS job_id, ($1 #>> '{checkpoint,attempt}')::integer AS attempt,
            ($1 #>> '{checkpoint,step}')::bigint AS step, $1 ->> 'imported' AS imported
    ), named AS NOT MATERIALIZED (
        SELECT jobs.base_model_id, made.job_id, made.attempt, made.step
        FROM (SELECT job_id, attempt, step FROM models
              UNION ALL
              SELECT job_id, attempt, step FROM checkpoints WHERE deleted_at IS NULL) AS made
        JOIN jobs ON jobs.id = made.job_id
    )
    SELECT EXISTS (SELECT 1 FROM named JOIN place USING (job_id, attempt, step))
        OR EXISTS (SELECT 1 FROM imported_adapters JOIN place ON id = imported)
        OR EXISTS (SELECT 1 FROM jobs JOIN place ON jobs.id = place.job_id
                   WHERE finished_at IS NULL
                     AND (resolved -> 'load_best_model_at_end' = 'true'
                          OR resume_attempt = place.attempt AND resume_step = place.step))
        OR EXISTS (SELECT 1 FROM jobs WHERE start = $1 AND finished_at IS NULL)
        OR EXISTS (SELECT 1 FROM base_models AS base WHERE base.weights = $1 AND (
            EXISTS (SELECT 1 FROM jobs WHERE base_model_id = base.id AND finished_at IS NULL)
            OR EXISTS (SELECT 1 FROM named WHERE base_model_id = base.id)
            OR EXISTS (SELECT 1 FROM imported_adapters WHERE base_model_id = base.id)))";

/// Whether anything needs the weights at `place`.
pub(crate) async fn are_needed(
    connection: &mut PgConnection,
    place: &WeightsPlace,
) -> Result<bool, StoreError> {
    Ok(sqlx::query_scalar(NEEDED).bind(Json(place)).fetch_one(connection).await?)
}

/// Notes that the weights at `place`, whose name is gone, are to go when nothing needs them any more.
pub(crate) async fn delete_later(
    connection: &mut PgConnection,
    place: &WeightsPlace,
) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO weights_to_delete (place) VALUES ($1) ON CONFLICT DO NOTHING")
        .bind(Json(place))
        .execute(connection)
        .await?;
    Ok(())
}

impl Store {
    /// Drops the weights of deleted models that something stood on and nothing does any more. Says of
    /// how many. To be called from time to time.
    ///
    /// # Errors
    /// Those of the database and the object store.
    pub async fn purge_weights(&self) -> Result<usize, StoreError> {
        let noted: Vec<Json<WeightsPlace>> =
            sqlx::query_scalar("SELECT place FROM weights_to_delete ORDER BY created_at")
                .fetch_all(&self.pool)
                .await?;
        let mut gone = 0;
        for Json(place) in noted {
            let mut connection = self.pool.acquire().await?;
            if are_needed(&mut connection, &place).await? {
                continue;
            }
            // Nothing that could be made of them has a name any more.
            self.objects.delete_prefix(&place.clone().into()).await?;
            sqlx::query("DELETE FROM weights_to_delete WHERE place = $1")
                .bind(Json(&place))
                .execute(&mut *connection)
                .await?;
            gone += 1;
        }
        Ok(gone)
    }
}

#[cfg(test)]
mod tests;
