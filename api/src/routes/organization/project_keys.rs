//! `/v1/organization/projects/{project}/api_keys`, and `service_accounts`, which makes one: by
//! OpenAI's contract a key is made with the account that it belongs to, and here the two are one.

use super::{DEFAULT_LIST, MAX_LIST, name};
use crate::auth::Admin;
use crate::body::read_json;
use crate::failure::Failure;
use crate::idempotency::idempotency;
use crate::page::Page;
use crate::query::Query;
use crate::server::AppState;
use actix_web::{HttpRequest, HttpResponse, web};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tunesmith_core::ids::{ApiKeyId, ProjectId};
use tunesmith_store::tenants::ApiKey;

/// What an account may do in its project; there are no others.
const ROLE: &str = "member";

/// A key on the wire.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "ProjectKeyObject")]
pub(crate) struct KeyObject {
    id: String,
    object: &'static str,
    name: String,
    redacted_value: String,
    created_at: i64,
    last_used_at: Option<i64>,
    expires_at: Option<i64>,
    owner_project_access: &'static str,
    #[schemars(with = "Map<String, Value>")]
    owner: Value,
}

impl From<&ApiKey> for KeyObject {
    fn from(key: &ApiKey) -> Self {
        let created_at = key.created_at.unix_timestamp();
        Self {
            id: key.id.to_string(),
            object: "organization.project.api_key",
            name: key.name.clone(),
            redacted_value: key.redacted.clone(),
            created_at,
            last_used_at: None,
            expires_at: None,
            owner_project_access: "active",
            owner: json!({
                "type": "service_account",
                "service_account": {
                    "id": key.id, "name": key.name, "created_at": created_at, "role": ROLE,
                },
            }),
        }
    }
}

/// `POST …/service_accounts`: a key, whose secret is shown here and never again.
pub(crate) async fn create(
    request: HttpRequest,
    state: web::Data<AppState>,
    admin: Admin,
    project: web::Path<String>,
    payload: web::Payload,
) -> Result<HttpResponse, Failure> {
    let body = read_json(payload).await?;
    let name = name(&body.fields)?;
    let project = ProjectId::from(project.into_inner());
    state.store.project(&admin.organization_id, &project).await?;
    // The path is a part of what is asked for.
    let idempotency = idempotency(&request, body.sha256)?.at(project.as_str());
    let made = state.store.create_api_key_of_request(&admin, &project, &name, &idempotency).await?;
    let created_at = state.store.api_key(&project, &made.id).await?.created_at.unix_timestamp();
    Ok(body.reply(&["name"]).json(json!({
        "id": made.id,
        "object": "organization.project.service_account",
        "name": name,
        "role": ROLE,
        "created_at": created_at,
        "api_key": {
            "id": made.id,
            "object": "organization.project.service_account.api_key",
            "name": name,
            "created_at": created_at,
            "value": made.secret,
        },
    })))
}

/// `GET …/api_keys`
pub(crate) async fn list(
    state: web::Data<AppState>,
    admin: Admin,
    project: web::Path<String>,
    query: Query,
) -> Result<web::Json<Page<KeyObject>>, Failure> {
    let request = query.page(DEFAULT_LIST, MAX_LIST)?;
    let project = ProjectId::from(project.into_inner());
    state.store.project(&admin.organization_id, &project).await?;
    let page = state.store.list_api_keys(Some(&project), &request).await?;
    let keys = page.items.iter().map(KeyObject::from).collect();
    Ok(web::Json(Page::new(keys, page.has_more, |key| &key.id)))
}

/// `GET …/api_keys/{key}`
pub(crate) async fn retrieve(
    state: web::Data<AppState>,
    admin: Admin,
    path: web::Path<(String, String)>,
) -> Result<web::Json<KeyObject>, Failure> {
    let (project, key) = path.into_inner();
    let project = ProjectId::from(project);
    state.store.project(&admin.organization_id, &project).await?;
    let key = state.store.api_key(&project, &ApiKeyId::from(key)).await?;
    Ok(web::Json(KeyObject::from(&key)))
}

/// `DELETE …/api_keys/{key}`
pub(crate) async fn delete(
    state: web::Data<AppState>,
    admin: Admin,
    path: web::Path<(String, String)>,
) -> Result<HttpResponse, Failure> {
    let (project, key) = path.into_inner();
    let (project, key) = (ProjectId::from(project), ApiKeyId::from(key));
    state.store.project(&admin.organization_id, &project).await?;
    state.store.revoke_api_key(Some(&project), &key).await?;
    Ok(HttpResponse::Ok().json(json!({
        "id": key, "object": "organization.project.api_key.deleted", "deleted": true
    })))
}
