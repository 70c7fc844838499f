//! Base models: what there is to tune, for every project of the installation, and the models that
//! were tuned in full and that adapters go on.

mod tuned;

pub use tuned::TunedBase;

use crate::imports::{self, Importing};
use crate::objects::{ObjectKey, ObjectPrefix};
use crate::{Store, StoreError, database, rows};
use bytes::Bytes;
use serde_json::Value;
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use sqlx::{FromRow, Row as _};
use std::path::Path;
use time::OffsetDateTime;
use tunesmith_core::ids::BaseModelId;
use tunesmith_core::weights::{MANIFEST_NAME, Manifest, ManifestFile};

/// A base model.
#[derive(Debug, Clone, PartialEq)]
pub struct BaseModel {
    /// Its id.
    pub id: BaseModelId,
    /// What clients call it.
    pub name: String,
    /// Tokens that it can attend to.
    pub context_length: u64,
    /// Its `config.json`.
    pub config: Value,
    /// Its files.
    pub manifest: Manifest,
    /// When it was imported.
    pub created_at: OffsetDateTime,
    /// What it is where it was not imported.
    pub tuned: Option<TunedBase>,
}

impl BaseModel {
    /// Its objects.
    #[must_use]
    pub fn prefix(&self) -> ObjectPrefix {
        match &self.tuned {
            Some(tuned) => tuned.weights.clone().into(),
            None => ObjectPrefix::BaseModel(self.id.clone()),
        }
    }

    /// The object of one of its files.
    #[must_use]
    pub fn file(&self, name: &str) -> ObjectKey {
        self.prefix().file(name)
    }

    /// What the names of models that are tuned from it begin with: the imported model's name.
    #[must_use]
    pub fn origin_name(&self) -> &str {
        self.tuned.as_ref().map_or(&self.name, |tuned| &tuned.origin_name)
    }

    /// How many decoder layers its config.json says that it has.
    #[must_use]
    pub fn num_hidden_layers(&self) -> Option<usize> {
        self.config["num_hidden_layers"].as_u64().and_then(|layers| layers.try_into().ok())
    }

    /// The size of all its files.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.manifest.files.iter().map(|file| file.bytes).sum()
    }
}

impl FromRow<'_, PgRow> for BaseModel {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            id: rows::text(row, "id")?,
            name: row.try_get("name")?,
            context_length: rows::count(row, "context_length")?,
            config: rows::json(row, "config")?,
            manifest: rows::json(row, "manifest")?,
            created_at: row.try_get("created_at")?,
            tuned: TunedBase::from_row(row)?,
        })
    }
}

/// Selects base models, as `base`.
macro_rules! base_models {
    () => {
        "SELECT base.id, base.name, base.context_length, base.config, base.manifest, base.created_at,
             base.weights, base.origin_id, origin.name AS origin_name
         FROM base_models AS base LEFT JOIN base_models AS origin ON origin.id = base.origin_id"
    };
}
use base_models;

/// The id of the base model that was imported first: tokens are counted with it unless another one is
/// named.
macro_rules! default_base_model {
    () => {
        "SELECT id FROM base_models WHERE weights IS NULL ORDER BY created_at, id LIMIT 1"
    };
}
pub(crate) use default_base_model;

/// A base model to be imported.
#[derive(Debug, Clone)]
pub struct NewBaseModel {
    /// What clients will call it.
    pub name: String,
    /// Tokens that it can attend to.
    pub context_length: u64,
    /// Its `config.json`.
    pub config: Value,
}

impl Store {
    /// Stores every file of `directory`, a Hugging Face directory, and registers the model.
    ///
    /// # Errors
    /// [`StoreError::AlreadyExists`] for a name that is taken, a file that cannot be read.
    pub async fn import_base_model(
        &self,
        new: &NewBaseModel,
        directory: &Path,
    ) -> Result<BaseModel, StoreError> {
        let taken = || StoreError::AlreadyExists { kind: "base model", name: new.name.clone() };
        match self.base_model(&new.name).await {
            Ok(_) => return Err(taken()),
            Err(StoreError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
        match self.register_directory(new, directory).await {
            // Another import of the same name was faster.
            Err(StoreError::Database(sqlx::Error::Database(error)))
                if error.is_unique_violation() =>
            {
                Err(taken())
            }
            imported => imported,
        }
    }

    pub(crate) async fn register_directory(
        &self,
        new: &NewBaseModel,
        directory: &Path,
    ) -> Result<BaseModel, StoreError> {
        let id = BaseModelId::generate(&mut rand::rng());
        let importing = Importing::BaseModel(id.clone());
        self.begin_import(&importing).await?;
        let work = self.upload_and_register(&id, &importing, new, directory);
        let imported = self.while_importing(&importing, work).await;
        if imported.is_err() {
            self.abandon_import(&importing).await;
        }
        imported
    }

    async fn upload_and_register(
        &self,
        id: &BaseModelId,
        importing: &Importing,
        new: &NewBaseModel,
        directory: &Path,
    ) -> Result<BaseModel, StoreError> {
        let prefix = importing.prefix();
        let mut manifest = Manifest { files: Vec::new() };
        for name in file_names(directory).await? {
            let stored =
                self.objects.put_file(&prefix.file(&*name), &directory.join(&name)).await?;
            manifest.files.push(ManifestFile { name, bytes: stored.bytes, sha256: stored.sha256 });
        }
        let content = Bytes::from(serde_json::to_vec_pretty(&manifest)?);
        self.objects.put_bytes(&prefix.file(MANIFEST_NAME), content).await?;
        let mut transaction = database::begin(&self.pool).await?;
        imports::finish(&mut transaction, importing).await?;
        let imported = sqlx::query_as(
            "INSERT INTO base_models (id, name, context_length, config, manifest)
             VALUES ($1, $2, $3, $4, $5)
             RETURNING *, NULL AS origin_name",
        )
        .bind(id.as_str())
        .bind(&new.name)
        .bind(rows::bigint(new.context_length))
        .bind(Json(&new.config))
        .bind(Json(&manifest))
        .fetch_one(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(imported)
    }

    /// Every base model that was imported, by name.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn list_base_models(&self) -> Result<Vec<BaseModel>, StoreError> {
        Ok(sqlx::query_as(concat!(
            base_models!(),
            " WHERE base.weights IS NULL ORDER BY base.name"
        ))
        .fetch_all(&self.pool)
        .await?)
    }

    /// The base model that was imported as `name`.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn base_model(&self, name: &str) -> Result<BaseModel, StoreError> {
        sqlx::query_as(concat!(base_models!(), " WHERE base.name = $1 AND base.weights IS NULL"))
            .bind(name)
            .fetch_optional(&self.pool)
            .await?
            .ok_or_else(|| StoreError::not_found("base model", name))
    }

    /// The base model of a job or a tuned model.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn base_model_by_id(&self, id: &BaseModelId) -> Result<BaseModel, StoreError> {
        sqlx::query_as(concat!(base_models!(), " WHERE base.id = $1"))
            .bind(id.as_str())
            .fetch_optional(&self.pool)
            .await?
            .ok_or_else(|| StoreError::not_found("base model", id))
    }
}

/// The plain files that lie directly in `directory`, in the order of their names, but no hidden
/// one (`.gitattributes`) and no manifest of an earlier copy.
async fn file_names(directory: &Path) -> Result<Vec<String>, StoreError> {
    let failed = || StoreError::local_file(directory);
    let mut entries = tokio::fs::read_dir(directory).await.map_err(failed())?;
    let mut names = Vec::new();
    while let Some(entry) = entries.next_entry().await.map_err(failed())? {
        // Follows links: a hub's cache is made of them.
        let path = entry.path();
        let metadata = tokio::fs::metadata(&path).await.map_err(StoreError::local_file(&path))?;
        if let Ok(name) = entry.file_name().into_string()
            && metadata.is_file()
            && !name.starts_with('.')
            && name != MANIFEST_NAME
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests;
