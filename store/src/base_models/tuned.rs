//! A model that was tuned in full as the base model of adapters.
//!
//! It is a row like any other base model's, which no list shows and no name finds, so that whatever
//! trains, answers or exports reads its files as it reads those of an imported one. They are the tuned
//! model's own and lie where its job has put them; they stay for as long as anything stands on them.

use super::{BaseModel, base_models};
use crate::models::Model;
use crate::{Store, StoreError, rows};
use serde_json::Value;
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use tunesmith_core::ids::BaseModelId;
use tunesmith_core::weights::{CONFIG_NAME, MANIFEST_NAME, Manifest, WeightsPlace};

/// What a base model is that was not imported.
#[derive(Debug, Clone, PartialEq)]
pub struct TunedBase {
    /// Where its files lie.
    pub weights: WeightsPlace,
    /// The imported model that it was tuned from, over however many jobs.
    pub origin: BaseModelId,
    /// That model's name.
    pub origin_name: String,
}

impl TunedBase {
    pub(super) fn from_row(row: &PgRow) -> sqlx::Result<Option<Self>> {
        let Some(weights) = rows::optional_json(row, "weights")? else { return Ok(None) };
        let (origin, origin_name) =
            (rows::text(row, "origin_id")?, rows::text(row, "origin_name")?);
        Ok(Some(Self { weights, origin, origin_name }))
    }
}

impl Store {
    /// `model`, which was tuned in full, as the base model of adapters; made on the first call.
    ///
    /// Whoever makes something that stands on it must see to it in the same transaction that the model
    /// is still there.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] for a model that was deleted just now, and those of the database and
    /// the object store.
    pub async fn tuned_base(&self, model: &Model) -> Result<BaseModel, StoreError> {
        if let Some(known) = self.known_tuned_base(&model.place).await? {
            return Ok(known);
        }
        let gone = |error| match error {
            StoreError::NotFound { kind: "object", .. } => {
                StoreError::not_found("model", &model.name)
            }
            error => error,
        };
        let files = model.weights();
        let manifest = self.objects.read(&files.file(MANIFEST_NAME)).await.map_err(gone)?;
        let manifest: Manifest = serde_json::from_slice(&manifest)?;
        let config = self.objects.read(&files.file(CONFIG_NAME)).await.map_err(gone)?;
        let config: Value = serde_json::from_slice(&config)?;
        // Another one may make it at the same time.
        sqlx::query(
            "INSERT INTO base_models
                 (id, name, context_length, config, manifest, weights, origin_id)
             SELECT $1, $2, context_length, $3, $4, $5, coalesce(origin_id, id)
             FROM base_models WHERE id = $6
             ON CONFLICT DO NOTHING",
        )
        .bind(BaseModelId::generate(&mut rand::rng()).as_str())
        .bind(&model.name)
        .bind(Json(config))
        .bind(Json(manifest))
        .bind(Json(&model.place))
        .bind(model.base_model_id.as_str())
        .execute(&self.pool)
        .await?;
        self.known_tuned_base(&model.place)
            .await?
            .ok_or_else(|| StoreError::not_found("model", &model.name))
    }

    /// The base model whose files are these weights of a tuned model, if adapters go on it.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn known_tuned_base(
        &self,
        weights: &WeightsPlace,
    ) -> Result<Option<BaseModel>, StoreError> {
        Ok(sqlx::query_as(concat!(base_models!(), " WHERE base.weights = $1"))
            .bind(Json(weights))
            .fetch_optional(&self.pool)
            .await?)
    }
}
