//! `/v1/organization/projects`

use super::{DEFAULT_LIST, MAX_LIST, name};
use crate::auth::Admin;
use crate::body::read_json;
use crate::failure::Failure;
use crate::page::Page;
use crate::query::Query;
use crate::server::AppState;
use actix_web::{HttpResponse, web};
use schemars::JsonSchema;
use serde::Serialize;
use tunesmith_core::ids::ProjectId;
use tunesmith_store::tenants::Project;

/// A project on the wire.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ProjectObject {
    id: String,
    object: &'static str,
    name: String,
    created_at: i64,
    archived_at: Option<i64>,
    status: &'static str,
}

impl From<&Project> for ProjectObject {
    fn from(project: &Project) -> Self {
        Self {
            id: project.id.to_string(),
            object: "organization.project",
            name: project.name.clone(),
            created_at: project.created_at.unix_timestamp(),
            archived_at: project.archived_at.map(|time| time.unix_timestamp()),
            status: if project.archived_at.is_some() { "archived" } else { "active" },
        }
    }
}

/// `GET /v1/organization/projects`
pub(crate) async fn list(
    state: web::Data<AppState>,
    admin: Admin,
    query: Query,
) -> Result<web::Json<Page<ProjectObject>>, Failure> {
    let with_archived = query.word("include_archived", &["false", "true"])? == "true";
    let request = query.page(DEFAULT_LIST, MAX_LIST)?;
    let page =
        state.store.list_projects(Some(&admin.organization_id), with_archived, &request).await?;
    let projects = page.items.iter().map(ProjectObject::from).collect();
    Ok(web::Json(Page::new(projects, page.has_more, |project| &project.id)))
}

/// `POST /v1/organization/projects`: a new one, or the one that has this name.
pub(crate) async fn create(
    state: web::Data<AppState>,
    admin: Admin,
    payload: web::Payload,
) -> Result<HttpResponse, Failure> {
    let body = read_json(payload).await?;
    let name = name(&body.fields)?;
    let project = state.store.create_project_of(&admin.organization_id, &name).await?;
    Ok(body.reply(&["name"]).json(ProjectObject::from(&project)))
}

/// `GET /v1/organization/projects/{id}`
pub(crate) async fn retrieve(
    state: web::Data<AppState>,
    admin: Admin,
    id: web::Path<String>,
) -> Result<web::Json<ProjectObject>, Failure> {
    let id = ProjectId::from(id.into_inner());
    let project = state.store.project(&admin.organization_id, &id).await?;
    Ok(web::Json(ProjectObject::from(&project)))
}

/// `POST /v1/organization/projects/{id}`: another name.
pub(crate) async fn rename(
    state: web::Data<AppState>,
    admin: Admin,
    id: web::Path<String>,
    payload: web::Payload,
) -> Result<HttpResponse, Failure> {
    let body = read_json(payload).await?;
    let name = name(&body.fields)?;
    let id = ProjectId::from(id.into_inner());
    let project = state.store.rename_project(&admin.organization_id, &id, &name).await?;
    Ok(body.reply(&["name"]).json(ProjectObject::from(&project)))
}

/// `POST /v1/organization/projects/{id}/archive`
pub(crate) async fn archive(
    state: web::Data<AppState>,
    admin: Admin,
    id: web::Path<String>,
) -> Result<web::Json<ProjectObject>, Failure> {
    let id = ProjectId::from(id.into_inner());
    let project = state.store.archive_project(&admin.organization_id, &id).await?;
    Ok(web::Json(ProjectObject::from(&project)))
}
