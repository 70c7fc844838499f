//! Leave that a project has to use a checkpoint of another project of its organisation.

use crate::page::{Order, Page, PageRequest};
use crate::{Store, StoreError, database, rows};
use sqlx::postgres::PgRow;
use sqlx::{FromRow, Row as _};
use time::OffsetDateTime;
use tunesmith_core::ids::{OrganizationId, PermissionId, ProjectId};

/// Who may say who uses a checkpoint: the project that made it, or the one that looks after its
/// organisation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Granter {
    /// The checkpoint's project.
    Project(ProjectId),
    /// Its organisation.
    Organization(OrganizationId),
}

/// A permission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permission {
    /// Its id.
    pub id: PermissionId,
    /// Who may use the checkpoint.
    pub project_id: ProjectId,
    /// Since when.
    pub created_at: OffsetDateTime,
}

impl FromRow<'_, PgRow> for Permission {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            id: rows::text(row, "id")?,
            project_id: rows::text(row, "project_id")?,
            created_at: row.try_get("created_at")?,
        })
    }
}

impl Store {
    /// Lets projects of the same organisation use the tuned model or checkpoint `name`. A project
    /// that may already keeps its permission. All of them or none.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] for a model that is not the granter's, and for a project that is not
    /// of its organisation.
    pub async fn grant_checkpoint(
        &self,
        granter: &Granter,
        name: &str,
        projects: &[ProjectId],
    ) -> Result<Vec<Permission>, StoreError> {
        let organization = self.require_granted_model(granter, name).await?;
        let mut transaction = database::begin(&self.pool).await?;
        let mut permissions = Vec::with_capacity(projects.len());
        for project in projects {
            sqlx::query("SELECT 1 FROM projects WHERE id = $1 AND organization_id = $2")
                .bind(project.as_str())
                .bind(organization.as_str())
                .fetch_optional(&mut *transaction)
                .await?
                .ok_or_else(|| StoreError::not_found("project", project))?;
            // The empty update gives the row that is there.
            let permission = sqlx::query_as(
                "INSERT INTO checkpoint_permissions (id, model_name, project_id)
                 VALUES ($1, $2, $3)
                 ON CONFLICT (model_name, project_id) DO UPDATE SET project_id = $3
                 RETURNING id, project_id, created_at",
            )
            .bind(PermissionId::generate(&mut rand::rng()).as_str())
            .bind(name)
            .bind(project.as_str())
            .fetch_one(&mut *transaction)
            .await?;
            permissions.push(permission);
        }
        transaction.commit().await?;
        Ok(permissions)
    }

    /// The permissions to use a checkpoint, all or one project's.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] for a model that is not the granter's,
    /// [`StoreError::UnknownCursor`].
    pub async fn list_checkpoint_permissions(
        &self,
        granter: &Granter,
        name: &str,
        project: Option<&ProjectId>,
        request: &PageRequest,
    ) -> Result<Page<Permission>, StoreError> {
        self.require_granted_model(granter, name).await?;
        let after = request
            .sequence(
                &self.pool,
                "SELECT sequence FROM checkpoint_permissions WHERE id = $1 AND model_name = $2",
                Some(name),
            )
            .await?;
        let statement = match request.order {
            Order::Descending => {
                "SELECT id, project_id, created_at FROM checkpoint_permissions
                 WHERE model_name = $1 AND ($2::text IS NULL OR project_id = $2)
                   AND ($3::bigint IS NULL OR sequence < $3)
                 ORDER BY sequence DESC LIMIT $4"
            }
            Order::Ascending => {
                "SELECT id, project_id, created_at FROM checkpoint_permissions
                 WHERE model_name = $1 AND ($2::text IS NULL OR project_id = $2)
                   AND ($3::bigint IS NULL OR sequence > $3)
                 ORDER BY sequence LIMIT $4"
            }
        };
        let found = sqlx::query_as(statement)
            .bind(name)
            .bind(project.map(ProjectId::as_str))
            .bind(after)
            .bind(request.fetch())
            .fetch_all(&self.pool)
            .await?;
        Ok(Page::cut(found, request))
    }

    /// Takes a permission back.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] for a model that is not the granter's, and for a permission that is
    /// not the model's.
    pub async fn revoke_checkpoint_permission(
        &self,
        granter: &Granter,
        name: &str,
        id: &PermissionId,
    ) -> Result<(), StoreError> {
        self.require_granted_model(granter, name).await?;
        let gone =
            sqlx::query("DELETE FROM checkpoint_permissions WHERE id = $1 AND model_name = $2")
                .bind(id.as_str())
                .bind(name)
                .execute(&self.pool)
                .await?;
        if gone.rows_affected() == 1 {
            Ok(())
        } else {
            Err(StoreError::not_found("permission", id))
        }
    }

    /// The organisation of a model that `granter` may share.
    async fn require_granted_model(
        &self,
        granter: &Granter,
        name: &str,
    ) -> Result<OrganizationId, StoreError> {
        let (project, organization) = match granter {
            Granter::Project(id) => (Some(id.as_str()), None),
            Granter::Organization(id) => (None, Some(id.as_str())),
        };
        let found: Option<String> = sqlx::query_scalar(
            "SELECT projects.organization_id
             FROM (
                 SELECT name, job_id FROM models
                 UNION
                 SELECT name, job_id FROM checkpoints WHERE deleted_at IS NULL
             ) AS found
             JOIN jobs ON jobs.id = found.job_id
             JOIN projects ON projects.id = jobs.project_id
             WHERE found.name = $1
               AND ($2::text IS NULL OR projects.id = $2)
               AND ($3::text IS NULL OR projects.organization_id = $3)",
        )
        .bind(name)
        .bind(project)
        .bind(organization)
        .fetch_optional(&self.pool)
        .await?;
        found.map(OrganizationId::from).ok_or_else(|| StoreError::not_found("model", name))
    }
}
