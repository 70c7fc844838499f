//! Organisations, projects and API keys.

mod admin;

pub use admin::{AdminKey, Administrator, ApiKey, NewAdminKey, Project};

use crate::idempotency::{Creation, Idempotency, Request};
use crate::{Store, StoreError, database, rows};
use sha2::{Digest as _, Sha256};
use sqlx::{PgConnection, PgExecutor};
use tunesmith_core::ids::{ApiKeyId, OrganizationId, ProjectId, generate_api_key};

/// The organisation that every installation begins with.
pub const DEFAULT_ORGANIZATION: &str = "tunesmith";
/// Its project.
const DEFAULT_PROJECT: &str = "default";

/// Whoever showed a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The project's owner.
    pub organization_id: OrganizationId,
    /// What the caller may see.
    pub project_id: ProjectId,
    /// The key that was shown.
    pub api_key_id: ApiKeyId,
}

/// A key just made. The secret is not stored and cannot be had again.
#[derive(Debug, Clone)]
pub struct NewApiKey {
    /// The key's row.
    pub id: ApiKeyId,
    /// What the client sends.
    pub secret: String,
}

impl Store {
    /// The project that `tunesmith up` works in, made on first use.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn ensure_default_project(&self) -> Result<ProjectId, StoreError> {
        self.create_project(DEFAULT_ORGANIZATION, DEFAULT_PROJECT).await
    }

    /// The project `name` of `organization`; either is made if it is not there.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn create_project(
        &self,
        organization: &str,
        name: &str,
    ) -> Result<ProjectId, StoreError> {
        let organization = self.create_organization(organization).await?;
        Ok(self.create_project_of(&organization, name).await?.id)
    }

    /// A new key to `project`; `name` is for people.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn create_api_key(
        &self,
        project: &ProjectId,
        name: &str,
    ) -> Result<NewApiKey, StoreError> {
        Ok(insert_api_key(&self.pool, project, name).await?)
    }

    /// The same for an administrator's request. One that comes again with its key is refused: what it
    /// was to show is not kept. Without a key it makes another, as the first secret may be lost.
    ///
    /// # Errors
    /// [`StoreError::SecretShown`], [`StoreError::IdempotencyConflict`].
    pub async fn create_api_key_of_request(
        &self,
        administrator: &Administrator,
        project: &ProjectId,
        name: &str,
        idempotency: &Idempotency,
    ) -> Result<NewApiKey, StoreError> {
        self.create_key_of_request(
            administrator,
            Creation::ApiKey,
            idempotency,
            async |connection| {
                let made = insert_api_key(connection, project, name).await?;
                Ok((made.id.to_string(), made))
            },
        )
        .await
    }

    /// What `insert` makes, which gives its id too: once by an administrator's idempotency key.
    async fn create_key_of_request<K>(
        &self,
        administrator: &Administrator,
        creation: Creation,
        idempotency: &Idempotency,
        insert: impl AsyncFnOnce(&mut PgConnection) -> sqlx::Result<(String, K)>,
    ) -> Result<K, StoreError> {
        let mut transaction = database::begin(&self.pool).await?;
        let idempotency = idempotency.by_key_alone();
        let request = Request::new(creation, administrator.admin_key_id.as_str(), &idempotency);
        if let Some(key) = request.made_before(&mut transaction).await? {
            return Err(StoreError::SecretShown { key });
        }
        let (id, made) = insert(&mut transaction).await?;
        request.remember(&mut transaction, &id).await?;
        transaction.commit().await?;
        Ok(made)
    }

    /// Whose key `secret` is, if it is one that was not revoked, to a project that is not archived.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn authenticate(&self, secret: &str) -> Result<Option<Caller>, StoreError> {
        let row = sqlx::query(
            "SELECT api_keys.id, projects.id AS project_id, projects.organization_id
             FROM api_keys JOIN projects ON projects.id = api_keys.project_id
             WHERE api_keys.secret_sha256 = $1 AND api_keys.revoked_at IS NULL
               AND projects.archived_at IS NULL",
        )
        .bind(hash(secret))
        .fetch_optional(&self.pool)
        .await?;
        let Some(row) = row else { return Ok(None) };
        Ok(Some(Caller {
            organization_id: rows::text(&row, "organization_id")?,
            project_id: rows::text(&row, "project_id")?,
            api_key_id: rows::text(&row, "id")?,
        }))
    }
}

async fn insert_api_key(
    executor: impl PgExecutor<'_>,
    project: &ProjectId,
    name: &str,
) -> sqlx::Result<NewApiKey> {
    let key = NewApiKey {
        id: ApiKeyId::generate(&mut rand::rng()),
        secret: generate_api_key(&mut rand::rng()),
    };
    sqlx::query(
        "INSERT INTO api_keys (id, project_id, name, secret_sha256, redacted)
         VALUES ($1, $2, $3, $4, $5)",
    )
    .bind(key.id.as_str())
    .bind(project.as_str())
    .bind(name)
    .bind(hash(&key.secret))
    .bind(redacted("sk-", &key.secret))
    .execute(executor)
    .await?;
    Ok(key)
}

/// What is kept of a key's secret.
pub(crate) fn hash(secret: &str) -> Vec<u8> {
    Sha256::digest(secret.as_bytes()).to_vec()
}

/// Enough of a secret to tell it from another, too little to use it.
fn redacted(prefix: &str, secret: &str) -> String {
    let tail = secret.len().saturating_sub(4);
    format!("{prefix}...{}", secret.get(tail..).unwrap_or_default())
}

/// The name of the caller's organisation, which is a part of its models' names.
pub(crate) async fn organization_name(
    executor: impl PgExecutor<'_>,
    caller: &Caller,
) -> sqlx::Result<String> {
    sqlx::query_scalar("SELECT name FROM organizations WHERE id = $1")
        .bind(caller.organization_id.as_str())
        .fetch_one(executor)
        .await
}

#[cfg(test)]
mod tests;
