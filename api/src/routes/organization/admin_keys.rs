//! `/v1/organization/admin_api_keys`

use super::{DEFAULT_LIST, MAX_LIST, name};
use crate::auth::Admin;
use crate::body::read_json;
use crate::failure::Failure;
use crate::fields;
use crate::idempotency::idempotency;
use crate::page::Page;
use crate::query::Query;
use crate::server::AppState;
use actix_web::{HttpRequest, HttpResponse, web};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::time::Duration;
use tunesmith_core::ids::AdminKeyId;
use tunesmith_store::tenants::AdminKey;

/// The longest life of a key that has one: a hundred years.
pub(crate) const MAX_LIFETIME_SECONDS: u64 = 100 * 365 * 24 * 3600;

/// An admin key on the wire.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "AdminKeyObject")]
pub(crate) struct KeyObject {
    id: String,
    object: &'static str,
    name: String,
    redacted_value: String,
    created_at: i64,
    expires_at: Option<i64>,
    last_used_at: Option<i64>,
    #[schemars(with = "Map<String, Value>")]
    owner: Value,
    /// The secret: of a key that was just made.
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<String>,
}

impl From<&AdminKey> for KeyObject {
    fn from(key: &AdminKey) -> Self {
        let created_at = key.created_at.unix_timestamp();
        Self {
            id: key.id.to_string(),
            object: "organization.admin_api_key",
            name: key.name.clone(),
            redacted_value: key.redacted.clone(),
            created_at,
            expires_at: key.expires_at.map(|time| time.unix_timestamp()),
            last_used_at: None,
            owner: json!({
                "type": "service_account",
                "object": "organization.service_account",
                "id": key.id,
                "name": key.name,
                "created_at": created_at,
                "role": "owner",
            }),
            value: None,
        }
    }
}

/// `POST /v1/organization/admin_api_keys`
pub(crate) async fn create(
    request: HttpRequest,
    state: web::Data<AppState>,
    admin: Admin,
    payload: web::Payload,
) -> Result<HttpResponse, Failure> {
    let body = read_json(payload).await?;
    let lifetime = fields::integer(&body.fields, "expires_in_seconds", 1..=MAX_LIFETIME_SECONDS)?;
    let lifetime = lifetime.map(Duration::from_secs);
    let name = name(&body.fields)?;
    let idempotency = idempotency(&request, body.sha256)?;
    let made =
        state.store.create_admin_key_of_request(&admin, &name, lifetime, &idempotency).await?;
    let key = KeyObject { value: Some(made.secret), ..KeyObject::from(&made.key) };
    Ok(body.reply(&["name", "expires_in_seconds"]).json(key))
}

/// `GET /v1/organization/admin_api_keys`
pub(crate) async fn list(
    state: web::Data<AppState>,
    admin: Admin,
    query: Query,
) -> Result<web::Json<Page<KeyObject>>, Failure> {
    let request = query.page(DEFAULT_LIST, MAX_LIST)?;
    let page = state.store.list_admin_keys(Some(&admin.organization_id), &request).await?;
    let keys = page.items.iter().map(KeyObject::from).collect();
    Ok(web::Json(Page::new(keys, page.has_more, |key| &key.id)))
}

/// `GET /v1/organization/admin_api_keys/{key}`
pub(crate) async fn retrieve(
    state: web::Data<AppState>,
    admin: Admin,
    key: web::Path<String>,
) -> Result<web::Json<KeyObject>, Failure> {
    let key = AdminKeyId::from(key.into_inner());
    Ok(web::Json(KeyObject::from(&state.store.admin_key(&admin.organization_id, &key).await?)))
}

/// `DELETE /v1/organization/admin_api_keys/{key}`
pub(crate) async fn delete(
    state: web::Data<AppState>,
    admin: Admin,
    key: web::Path<String>,
) -> Result<HttpResponse, Failure> {
    let key = AdminKeyId::from(key.into_inner());
    state.store.revoke_admin_key(Some(&admin.organization_id), &key).await?;
    Ok(HttpResponse::Ok().json(json!({
        "id": key, "object": "organization.admin_api_key.deleted", "deleted": true
    })))
}
