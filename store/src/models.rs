//! Tuned models: those that jobs made, checkpoints by their model names, and imported adapters.

use crate::base_models::BaseModel;
use crate::idempotency::{Creation, Idempotency, Request};
use crate::imports::{self, Importing};
use crate::objects::ObjectPrefix;
use crate::tenants::Caller;
use crate::{Store, StoreError, database, export_checks, rows, tenants, weights};
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use sqlx::{FromRow, PgConnection, Row as _};
use time::OffsetDateTime;
use tunesmith_core::hyperparameters::AdapterConfig;
use tunesmith_core::ids::{
    BaseModelId, ImportedAdapterId, OrganizationId, ProjectId, tuned_model_name,
};
use tunesmith_core::weights::{CheckpointPlace, WeightsPlace};

/// A job's final model, the one of a checkpoint, or an imported adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// `ft:…`.
    pub name: String,
    /// The owner.
    pub organization_id: OrganizationId,
    /// Where its weights lie.
    pub place: WeightsPlace,
    /// The model that was tuned.
    pub base_model_id: BaseModelId,
    /// What the weights are.
    pub adapter: AdapterConfig,
    /// When it was made.
    pub created_at: OffsetDateTime,
}

/// An adapter that was made elsewhere and lies in the object store already.
#[derive(Debug, Clone)]
pub struct NewImportedAdapter {
    /// Names its objects.
    pub id: ImportedAdapterId,
    /// What it goes on.
    pub base_model_id: BaseModelId,
    /// The tuned model that this is, where it was not imported; it must still be there.
    pub tuned: Option<String>,
    /// The base model's name in the adapter's.
    pub base_model: String,
    /// The client's part of the name.
    pub suffix: Option<String>,
    /// Its shape.
    pub adapter: AdapterConfig,
}

impl Model {
    /// The objects that people download.
    #[must_use]
    pub fn weights(&self) -> ObjectPrefix {
        self.place.clone().into()
    }
}

impl FromRow<'_, PgRow> for Model {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        let imported: Option<ImportedAdapterId> = rows::optional_text(row, "imported_id")?;
        Ok(Self {
            name: row.try_get("name")?,
            organization_id: rows::text(row, "organization_id")?,
            place: match imported {
                Some(id) => WeightsPlace::Imported(id),
                None => checkpoint_place(row)?.into(),
            },
            base_model_id: rows::text(row, "base_model_id")?,
            adapter: rows::json(row, "adapter")?,
            created_at: row.try_get("created_at")?,
        })
    }
}

fn checkpoint_place(row: &PgRow) -> sqlx::Result<CheckpointPlace> {
    Ok(CheckpointPlace {
        job: rows::text(row, "job_id")?,
        attempt: rows::attempt(row, "attempt")?,
        step: rows::count(row, "step")?,
    })
}

/// The columns of a [`Model`] beside its organisation, of imported adapters and of `$made`, which is
/// joined with its job: a query to select from.
macro_rules! models_and_imports {
    ($($made:literal)+) => {
        concat!(
            "(SELECT name, project_id, NULL AS job_id, NULL AS attempt, NULL AS step,
                 id AS imported_id, base_model_id, adapter, created_at FROM imported_adapters",
            $(" UNION ALL
             SELECT made.name, jobs.project_id, made.job_id, made.attempt, made.step, NULL,
                 jobs.base_model_id, jobs.resolved -> 'adapter', made.created_at
             FROM ", $made, " AS made JOIN jobs ON jobs.id = made.job_id",)+
            ") AS found JOIN projects ON projects.id = found.project_id"
        )
    };
}

impl Store {
    /// The tuned models of `project`, oldest first. Checkpoints are listed by their jobs.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn list_models(&self, project: &ProjectId) -> Result<Vec<Model>, StoreError> {
        Ok(sqlx::query_as(concat!(
            "SELECT found.*, projects.organization_id FROM ",
            models_and_imports!("models"),
            " WHERE found.project_id = $1 ORDER BY found.created_at, found.name"
        ))
        .bind(project.as_str())
        .fetch_all(&self.pool)
        .await?)
    }

    /// The tuned model or the checkpoint `name` of `project`, or one that it was given leave to use.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], also for any other model of another project.
    pub async fn model(&self, project: &ProjectId, name: &str) -> Result<Model, StoreError> {
        sqlx::query_as(concat!(
            "SELECT found.*, projects.organization_id FROM ",
            models_and_imports!(
                "models" "(SELECT * FROM checkpoints WHERE deleted_at IS NULL)"
            ),
            " WHERE found.name = $1
               AND (found.project_id = $2
                    OR EXISTS (SELECT 1 FROM checkpoint_permissions AS permission
                               WHERE permission.model_name = found.name
                                 AND permission.project_id = $2))"
        ))
        .bind(name)
        .bind(project.as_str())
        .fetch_optional(&self.pool)
        .await?
        .ok_or_else(|| StoreError::not_found("model", name))
    }

    /// The base model `base_name`, or else what `project` calls `name`, as [`Store::model`] finds it,
    /// beside its base model.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] for a name that is neither.
    pub async fn base_or_tuned_model(
        &self,
        project: &ProjectId,
        base_name: &str,
        name: &str,
    ) -> Result<(BaseModel, Option<Model>), StoreError> {
        match self.base_model(base_name).await {
            Ok(base) => Ok((base, None)),
            Err(StoreError::NotFound { .. }) => {
                let tuned = self.model(project, name).await?;
                Ok((self.base_model_by_id(&tuned.base_model_id).await?, Some(tuned)))
            }
            Err(error) => Err(error),
        }
    }

    /// Registers an adapter, whose import was begun and whose objects are there, as a tuned model of the
    /// caller's project. Of a request that has made a model before it is that model, and the import is
    /// one of which nothing comes.
    ///
    /// # Errors
    /// [`StoreError::ImportGivenUp`], [`StoreError::IdempotencyConflict`],
    /// [`StoreError::NotFound`] for a tuned model to go on that is gone and for a model that was made
    /// before and is gone, and those of the database.
    pub async fn import_adapter(
        &self,
        caller: &Caller,
        new: &NewImportedAdapter,
        idempotency: &Idempotency,
    ) -> Result<Model, StoreError> {
        let mut transaction = database::begin(&self.pool).await?;
        let request =
            Request::new(Creation::ImportedAdapter, caller.api_key_id.as_str(), idempotency);
        if let Some(made) = request.made_before(&mut transaction).await? {
            drop(transaction);
            return self.model(&caller.project_id, &made).await;
        }
        imports::finish(&mut transaction, &Importing::Adapter(new.id.clone())).await?;
        if let Some(tuned) = &new.tuned {
            hold(&mut transaction, tuned).await?;
        }
        let organization = tenants::organization_name(&mut *transaction, caller).await?;
        let suffix = new.suffix.as_deref();
        let name = tuned_model_name(&new.base_model, &organization, suffix, &mut rand::rng());
        let created_at = sqlx::query_scalar(
            "INSERT INTO imported_adapters (id, name, project_id, base_model_id, adapter)
             VALUES ($1, $2, $3, $4, $5) RETURNING created_at",
        )
        .bind(new.id.as_str())
        .bind(&name)
        .bind(caller.project_id.as_str())
        .bind(new.base_model_id.as_str())
        .bind(Json(&new.adapter))
        .fetch_one(&mut *transaction)
        .await?;
        request.remember(&mut transaction, &name).await?;
        transaction.commit().await?;
        Ok(Model {
            name,
            organization_id: caller.organization_id.clone(),
            place: WeightsPlace::Imported(new.id.clone()),
            base_model_id: new.base_model_id.clone(),
            adapter: new.adapter.clone(),
            created_at,
        })
    }

    /// Deletes a tuned model, with the checkpoint that has the same weights, one checkpoint, or an
    /// imported adapter. Weights that something else still needs stay until nothing does: a
    /// checkpoint's that a model has too, that its job may resume from, or that may turn out as the
    /// job's best, any that an unfinished job starts from, and those of a model that was tuned in full
    /// while an adapter goes on it.
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
             ) SELECT job_id, attempt, step FROM model",
        )
        .bind(name)
        .bind(project.as_str())
        .fetch_optional(&mut *transaction)
        .await?;
        let imported: Option<String> = match &model {
            Some(_) => None,
            None => sqlx::query_scalar(
                "DELETE FROM imported_adapters WHERE name = $1 AND project_id = $2 RETURNING id",
            )
            .bind(name)
            .bind(project.as_str())
            .fetch_optional(&mut *transaction)
            .await?,
        };
        let place: WeightsPlace = match (model, imported) {
            (Some(model), _) => checkpoint_place(&model)?.into(),
            (None, Some(id)) => WeightsPlace::Imported(id.into()),
            (None, None) => {
                checkpoint_place(&delete_checkpoint(&mut transaction, project, name).await?)?.into()
            }
        };
        export_checks::forget_model(&mut transaction, name).await?;
        let needed = weights::are_needed(&mut transaction, &place).await?;
        if needed {
            weights::delete_later(&mut transaction, &place).await?;
        }
        transaction.commit().await?;
        if needed {
            return Ok(());
        }
        // The name is gone, which is what counts for the client: objects that stay are only litter.
        if let Err(error) = self.objects.delete_prefix(&place.into()).await {
            tracing::warn!(%error, model = name, "weights of a deleted model stay in the object store");
        }
        Ok(())
    }
}

/// Deletes the checkpoint `name`; gives its place.
async fn delete_checkpoint(
    connection: &mut PgConnection,
    project: &ProjectId,
    name: &str,
) -> Result<PgRow, StoreError> {
    // The job's row is locked so that it cannot succeed with these weights meanwhile.
    sqlx::query(
        "WITH job AS (
             SELECT jobs.id FROM jobs JOIN checkpoints ON checkpoints.job_id = jobs.id
             WHERE checkpoints.name = $1 AND jobs.project_id = $2 FOR UPDATE OF jobs
         ) UPDATE checkpoints SET deleted_at = now() FROM job
         WHERE name = $1 AND job_id = job.id AND deleted_at IS NULL
         RETURNING job_id, attempt, step",
    )
    .bind(name)
    .bind(project.as_str())
    .fetch_optional(connection)
    .await?
    .ok_or_else(|| StoreError::not_found("model", name))
}

/// Keeps the tuned model or checkpoint `name` from being deleted until the transaction ends.
///
/// # Errors
/// [`StoreError::NotFound`] if it is gone.
pub(crate) async fn hold(connection: &mut PgConnection, name: &str) -> Result<(), StoreError> {
    for query in [
        "SELECT 1 FROM models WHERE name = $1 FOR SHARE",
        "SELECT 1 FROM imported_adapters WHERE name = $1 FOR SHARE",
        "SELECT 1 FROM checkpoints WHERE name = $1 AND deleted_at IS NULL FOR SHARE",
    ] {
        if sqlx::query(query).bind(name).fetch_optional(&mut *connection).await?.is_some() {
            return Ok(());
        }
    }
    Err(StoreError::not_found("model", name))
}

#[cfg(test)]
mod tests;
