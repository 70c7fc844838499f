//! Looking after projects and keys.

use super::{hash, redacted};
use crate::idempotency::{Creation, Idempotency};
use crate::page::{Page, PageRequest};
use crate::{Store, StoreError, rows};
use sqlx::postgres::{PgQueryResult, PgRow};
use sqlx::{FromRow, PgExecutor, Row as _};
use std::time::Duration;
use time::OffsetDateTime;
use tunesmith_core::ids::{
    ADMIN_KEY_PREFIX, AdminKeyId, ApiKeyId, OrganizationId, ProjectId, generate_admin_key,
};

/// A project.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Project {
    /// Its id.
    pub id: ProjectId,
    /// Its owner.
    pub organization_id: OrganizationId,
    /// The owner's name.
    pub organization: String,
    /// Its name.
    pub name: String,
    /// When it was made.
    pub created_at: OffsetDateTime,
    /// Since when its keys open nothing.
    pub archived_at: Option<OffsetDateTime>,
}

impl FromRow<'_, PgRow> for Project {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            id: rows::text(row, "id")?,
            organization_id: rows::text(row, "organization_id")?,
            organization: row.try_get("organization")?,
            name: row.try_get("name")?,
            created_at: row.try_get("created_at")?,
            archived_at: row.try_get("archived_at")?,
        })
    }
}

macro_rules! project_columns {
    () => {
        "projects.id, projects.organization_id, organizations.name AS organization, projects.name,
         projects.created_at, projects.archived_at"
    };
}

/// An API key that was not revoked, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey {
    /// Its id.
    pub id: ApiKeyId,
    /// What it opens.
    pub project_id: ProjectId,
    /// The project's name.
    pub project: String,
    /// What it is for, in words.
    pub name: String,
    /// Enough of its secret to tell it from another.
    pub redacted: String,
    /// When it was made.
    pub created_at: OffsetDateTime,
}

impl FromRow<'_, PgRow> for ApiKey {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            id: rows::text(row, "id")?,
            project_id: rows::text(row, "project_id")?,
            project: row.try_get("project")?,
            name: row.try_get("name")?,
            redacted: row.try_get("redacted")?,
            created_at: row.try_get("created_at")?,
        })
    }
}

/// An admin key that was not revoked, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdminKey {
    /// Its id.
    pub id: AdminKeyId,
    /// What it is for, in words.
    pub name: String,
    /// Enough of its secret to tell it from another.
    pub redacted: String,
    /// When it was made.
    pub created_at: OffsetDateTime,
    /// When it stops working by itself.
    pub expires_at: Option<OffsetDateTime>,
}

impl FromRow<'_, PgRow> for AdminKey {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            id: rows::text(row, "id")?,
            name: row.try_get("name")?,
            redacted: row.try_get("redacted")?,
            created_at: row.try_get("created_at")?,
            expires_at: row.try_get("expires_at")?,
        })
    }
}

/// An admin key just made. The secret is not stored and cannot be had again.
#[derive(Debug, Clone)]
pub struct NewAdminKey {
    /// The key's row.
    pub key: AdminKey,
    /// What the client sends.
    pub secret: String,
}

/// Whoever showed an admin key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Administrator {
    /// What the key is for.
    pub organization_id: OrganizationId,
    /// The key that was shown.
    pub admin_key_id: AdminKeyId,
}

/// Selects API keys with the names of their projects.
macro_rules! api_keys {
    () => {
        "SELECT api_keys.id, api_keys.project_id, projects.name AS project, api_keys.name,
             api_keys.redacted, api_keys.created_at
         FROM api_keys JOIN projects ON projects.id = api_keys.project_id"
    };
}

impl Store {
    /// The organisation `name`, which is made if it is not there.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn create_organization(&self, name: &str) -> Result<OrganizationId, StoreError> {
        let new = OrganizationId::generate(&mut rand::rng());
        let id: String = sqlx::query_scalar(
            "INSERT INTO organizations (id, name) VALUES ($1, $2)
             ON CONFLICT (name) DO UPDATE SET name = $2 RETURNING id",
        )
        .bind(new.as_str())
        .bind(name)
        .fetch_one(&self.pool)
        .await?;
        Ok(OrganizationId::from(id))
    }

    /// A new project of an organisation, or the one of that name.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn create_project_of(
        &self,
        organization: &OrganizationId,
        name: &str,
    ) -> Result<Project, StoreError> {
        let new = ProjectId::generate(&mut rand::rng());
        let id: String = sqlx::query_scalar(
            "INSERT INTO projects (id, organization_id, name) VALUES ($1, $2, $3)
             ON CONFLICT (organization_id, name) DO UPDATE SET name = $3 RETURNING id",
        )
        .bind(new.as_str())
        .bind(organization.as_str())
        .bind(name)
        .fetch_one(&self.pool)
        .await?;
        self.project(organization, &ProjectId::from(id)).await
    }

    /// A project of an organisation.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn project(
        &self,
        organization: &OrganizationId,
        id: &ProjectId,
    ) -> Result<Project, StoreError> {
        sqlx::query_as(concat!(
            "SELECT ",
            project_columns!(),
            " FROM projects JOIN organizations ON organizations.id = projects.organization_id
              WHERE projects.id = $1 AND projects.organization_id = $2"
        ))
        .bind(id.as_str())
        .bind(organization.as_str())
        .fetch_optional(&self.pool)
        .await?
        .ok_or_else(|| StoreError::not_found("project", id))
    }

    /// The projects of an organisation, or of all, newest first.
    ///
    /// # Errors
    /// [`StoreError::UnknownCursor`].
    pub async fn list_projects(
        &self,
        organization: Option<&OrganizationId>,
        with_archived: bool,
        request: &PageRequest,
    ) -> Result<Page<Project>, StoreError> {
        let organization = organization.map(OrganizationId::as_str);
        let after = request
            .sequence(
                &self.pool,
                "SELECT sequence FROM projects
                 WHERE id = $1 AND ($2::text IS NULL OR organization_id = $2)",
                organization,
            )
            .await?;
        let found = sqlx::query_as(concat!(
            "SELECT ",
            project_columns!(),
            " FROM projects JOIN organizations ON organizations.id = projects.organization_id
              WHERE ($1::text IS NULL OR projects.organization_id = $1)
                AND ($2 OR projects.archived_at IS NULL)
                AND ($3::bigint IS NULL OR projects.sequence < $3)
              ORDER BY projects.sequence DESC LIMIT $4"
        ))
        .bind(organization)
        .bind(with_archived)
        .bind(after)
        .bind(request.fetch())
        .fetch_all(&self.pool)
        .await?;
        Ok(Page::cut(found, request))
    }

    /// Gives a project another name.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or [`StoreError::AlreadyExists`] for a name that is taken.
    pub async fn rename_project(
        &self,
        organization: &OrganizationId,
        id: &ProjectId,
        name: &str,
    ) -> Result<Project, StoreError> {
        let renamed =
            sqlx::query("UPDATE projects SET name = $3 WHERE id = $1 AND organization_id = $2")
                .bind(id.as_str())
                .bind(organization.as_str())
                .bind(name)
                .execute(&self.pool)
                .await;
        match renamed {
            Err(sqlx::Error::Database(error)) if error.is_unique_violation() => {
                Err(StoreError::AlreadyExists { kind: "project", name: name.to_owned() })
            }
            Err(other) => Err(other.into()),
            Ok(_) => self.project(organization, id).await,
        }
    }

    /// Closes a project: its keys open nothing from now on. Jobs that run go on to their end.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn archive_project(
        &self,
        organization: &OrganizationId,
        id: &ProjectId,
    ) -> Result<Project, StoreError> {
        sqlx::query(
            "UPDATE projects SET archived_at = coalesce(archived_at, now())
             WHERE id = $1 AND organization_id = $2",
        )
        .bind(id.as_str())
        .bind(organization.as_str())
        .execute(&self.pool)
        .await?;
        self.project(organization, id).await
    }

    /// The keys of a project, or of all, newest first, without those that were revoked.
    ///
    /// # Errors
    /// [`StoreError::UnknownCursor`].
    pub async fn list_api_keys(
        &self,
        project: Option<&ProjectId>,
        request: &PageRequest,
    ) -> Result<Page<ApiKey>, StoreError> {
        let cursor = "SELECT sequence FROM api_keys
             WHERE id = $1 AND ($2::text IS NULL OR project_id = $2)";
        let list = concat!(
            api_keys!(),
            " WHERE ($1::text IS NULL OR api_keys.project_id = $1) AND api_keys.revoked_at IS NULL
               AND ($2::bigint IS NULL OR api_keys.sequence < $2)
             ORDER BY api_keys.sequence DESC LIMIT $3"
        );
        request.fetch_page(&self.pool, cursor, list, project.map(ProjectId::as_str)).await
    }

    /// A key of a project, unless it was revoked.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn api_key(&self, project: &ProjectId, id: &ApiKeyId) -> Result<ApiKey, StoreError> {
        sqlx::query_as(concat!(
            api_keys!(),
            " WHERE api_keys.id = $1 AND api_keys.project_id = $2 AND api_keys.revoked_at IS NULL"
        ))
        .bind(id.as_str())
        .bind(project.as_str())
        .fetch_optional(&self.pool)
        .await?
        .ok_or_else(|| StoreError::not_found("api key", id))
    }

    /// Makes a key of a project, or of any, worthless from now on.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], also for one that was revoked before.
    pub async fn revoke_api_key(
        &self,
        project: Option<&ProjectId>,
        id: &ApiKeyId,
    ) -> Result<(), StoreError> {
        let revoked = sqlx::query(
            "UPDATE api_keys SET revoked_at = now()
             WHERE id = $1 AND ($2::text IS NULL OR project_id = $2) AND revoked_at IS NULL",
        )
        .bind(id.as_str())
        .bind(project.map(ProjectId::as_str))
        .execute(&self.pool)
        .await?;
        require_revoked(&revoked, id)
    }

    /// A new admin key to an organisation.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn create_admin_key(
        &self,
        organization: &OrganizationId,
        name: &str,
        lifetime: Option<Duration>,
    ) -> Result<NewAdminKey, StoreError> {
        Ok(insert_admin_key(&self.pool, organization, name, lifetime).await?)
    }

    /// The same for an administrator's request, once by its idempotency key, as
    /// [`create_api_key_of_request`](Self::create_api_key_of_request).
    ///
    /// # Errors
    /// [`StoreError::SecretShown`], [`StoreError::IdempotencyConflict`].
    pub async fn create_admin_key_of_request(
        &self,
        administrator: &Administrator,
        name: &str,
        lifetime: Option<Duration>,
        idempotency: &Idempotency,
    ) -> Result<NewAdminKey, StoreError> {
        let organization = &administrator.organization_id;
        self.create_key_of_request(
            administrator,
            Creation::AdminKey,
            idempotency,
            async |connection| {
                let made = insert_admin_key(connection, organization, name, lifetime).await?;
                Ok((made.key.id.to_string(), made))
            },
        )
        .await
    }

    /// The admin keys of an organisation, or of all, newest first, without those that were revoked.
    ///
    /// # Errors
    /// [`StoreError::UnknownCursor`].
    pub async fn list_admin_keys(
        &self,
        organization: Option<&OrganizationId>,
        request: &PageRequest,
    ) -> Result<Page<AdminKey>, StoreError> {
        let cursor = "SELECT sequence FROM admin_keys
             WHERE id = $1 AND ($2::text IS NULL OR organization_id = $2)";
        let list = "SELECT id, name, redacted, created_at, expires_at FROM admin_keys
             WHERE ($1::text IS NULL OR organization_id = $1) AND revoked_at IS NULL
               AND ($2::bigint IS NULL OR sequence < $2)
             ORDER BY sequence DESC LIMIT $3";
        request.fetch_page(&self.pool, cursor, list, organization.map(OrganizationId::as_str)).await
    }

    /// An admin key of an organisation, unless it was revoked.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn admin_key(
        &self,
        organization: &OrganizationId,
        id: &AdminKeyId,
    ) -> Result<AdminKey, StoreError> {
        sqlx::query_as(
            "SELECT id, name, redacted, created_at, expires_at FROM admin_keys
             WHERE id = $1 AND organization_id = $2 AND revoked_at IS NULL",
        )
        .bind(id.as_str())
        .bind(organization.as_str())
        .fetch_optional(&self.pool)
        .await?
        .ok_or_else(|| StoreError::not_found("api key", id))
    }

    /// Makes an admin key of an organisation, or of any, worthless from now on.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], also for one that was revoked before.
    pub async fn revoke_admin_key(
        &self,
        organization: Option<&OrganizationId>,
        id: &AdminKeyId,
    ) -> Result<(), StoreError> {
        let revoked = sqlx::query(
            "UPDATE admin_keys SET revoked_at = now()
             WHERE id = $1 AND ($2::text IS NULL OR organization_id = $2) AND revoked_at IS NULL",
        )
        .bind(id.as_str())
        .bind(organization.map(OrganizationId::as_str))
        .execute(&self.pool)
        .await?;
        require_revoked(&revoked, id)
    }

    /// Whose admin key `secret` is, if it is one that still works.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn authenticate_administrator(
        &self,
        secret: &str,
    ) -> Result<Option<Administrator>, StoreError> {
        let row = sqlx::query(
            "SELECT id, organization_id FROM admin_keys
             WHERE secret_sha256 = $1 AND revoked_at IS NULL
               AND (expires_at IS NULL OR expires_at > now())",
        )
        .bind(hash(secret))
        .fetch_optional(&self.pool)
        .await?;
        let Some(row) = row else { return Ok(None) };
        Ok(Some(Administrator {
            organization_id: rows::text(&row, "organization_id")?,
            admin_key_id: rows::text(&row, "id")?,
        }))
    }
}

async fn insert_admin_key(
    executor: impl PgExecutor<'_>,
    organization: &OrganizationId,
    name: &str,
    lifetime: Option<Duration>,
) -> sqlx::Result<NewAdminKey> {
    let secret = generate_admin_key(&mut rand::rng());
    let key = sqlx::query_as(
        "INSERT INTO admin_keys (id, organization_id, name, secret_sha256, redacted, expires_at)
         VALUES ($1, $2, $3, $4, $5, now() + make_interval(secs => $6))
         RETURNING id, name, redacted, created_at, expires_at",
    )
    .bind(AdminKeyId::generate(&mut rand::rng()).as_str())
    .bind(organization.as_str())
    .bind(name)
    .bind(hash(&secret))
    .bind(redacted(ADMIN_KEY_PREFIX, &secret))
    .bind(lifetime.map(|duration| duration.as_secs_f64()))
    .fetch_one(executor)
    .await?;
    Ok(NewAdminKey { key, secret })
}

fn require_revoked(revoked: &PgQueryResult, id: impl ToString) -> Result<(), StoreError> {
    if revoked.rows_affected() == 1 { Ok(()) } else { Err(StoreError::not_found("api key", id)) }
}
