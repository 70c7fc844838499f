//! `/v1/webhook_endpoints`: who is told of the end of jobs and batches.

use crate::auth::Authenticated;
use crate::body::read_json;
use crate::failure::{Failure, invalid_value, missing};
use crate::fields::{self, given};
use crate::idempotency::idempotency;
use crate::page::Page;
use crate::query::Query;
use crate::routes::path;
use crate::server::AppState;
use crate::webhooks::{Message, new_secret, send};
use actix_web::web::{self, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::ids::{WebhookEndpointId, random_text};
use tunesmith_store::webhooks::{NewWebhookEndpoint, WebhookChange, WebhookEndpoint, WebhookEvent};

/// OpenAI's default; the maxima are ours.
pub(super) const DEFAULT_LIST: u64 = 20;
pub(super) const MAX_LIST: u64 = 100;
pub(super) const MAX_NAME: usize = 255;

/// What a client may send to make one, or to change it.
const FIELDS: [&str; 3] = ["name", "url", "event_types"];
/// The field of a rotation that lets the old secret sign too, for a day.
pub(super) const KEEP: &str = "keep_old_secret_active_for_24_hours";

/// The paths of this group.
pub(crate) fn configure(config: &mut ServiceConfig) {
    config
        .service(path("/v1/webhook_event_types").get(event_types))
        .service(path("/v1/webhook_endpoints").get(list).post(create))
        .service(path("/v1/webhook_endpoints/{id}").get(retrieve).post(update).delete(delete))
        .service(path("/v1/webhook_endpoints/{id}/rotate_secret").post(rotate_secret))
        .service(path("/v1/webhook_endpoints/{id}/test").post(test));
}

/// An endpoint on the wire.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct EndpointObject {
    id: String,
    object: &'static str,
    name: String,
    url: String,
    event_types: Vec<String>,
    created_at: i64,
    updated_at: i64,
    signing_secret_hint: String,
    /// Of one that was just made, or whose secret was just changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    signing_secret: Option<String>,
}

impl From<WebhookEndpoint> for EndpointObject {
    fn from(endpoint: WebhookEndpoint) -> Self {
        let tail = endpoint.secret.len().saturating_sub(4);
        Self {
            id: endpoint.id.to_string(),
            object: "webhook_endpoint",
            signing_secret_hint: format!("whsec_...{}", &endpoint.secret[tail..]),
            name: endpoint.name,
            url: endpoint.url,
            event_types: endpoint.event_types,
            created_at: endpoint.created_at.unix_timestamp(),
            updated_at: endpoint.updated_at.unix_timestamp(),
            signing_secret: None,
        }
    }
}

/// The endpoint with its secret.
fn with_secret(endpoint: WebhookEndpoint) -> EndpointObject {
    let secret = endpoint.secret.clone();
    EndpointObject { signing_secret: Some(secret), ..EndpointObject::from(endpoint) }
}

/// `GET /v1/webhook_event_types`
pub(crate) async fn event_types(_: Authenticated) -> HttpResponse {
    let words: Vec<&str> = WebhookEvent::ALL.iter().map(|event| event.as_str()).collect();
    HttpResponse::Ok().json(json!({ "object": "list", "data": words }))
}

/// `POST /v1/webhook_endpoints`
pub(crate) async fn create(
    request: HttpRequest,
    state: web::Data<AppState>,
    caller: Authenticated,
    payload: web::Payload,
) -> Result<HttpResponse, Failure> {
    let body = read_json(payload).await?;
    let change = change(&state, &body.fields)?;
    let new = NewWebhookEndpoint {
        name: change.name.ok_or_else(|| missing("name"))?,
        url: change.url.ok_or_else(|| missing("url"))?,
        event_types: change.event_types.ok_or_else(|| missing("event_types"))?,
        secret: new_secret(),
    };
    let idempotency = idempotency(&request, body.sha256)?;
    let made = state.store.create_webhook_endpoint(&caller, &new, &idempotency).await?;
    Ok(body.reply(&FIELDS).json(with_secret(made)))
}

/// `GET /v1/webhook_endpoints`
pub(crate) async fn list(
    state: web::Data<AppState>,
    caller: Authenticated,
    query: Query,
) -> Result<web::Json<Page<EndpointObject>>, Failure> {
    let request = query.page(DEFAULT_LIST, MAX_LIST)?;
    let page = state.store.list_webhook_endpoints(&caller.project_id, &request).await?;
    let endpoints = page.items.into_iter().map(EndpointObject::from).collect();
    Ok(web::Json(Page::new(endpoints, page.has_more, |endpoint| &endpoint.id)))
}

/// `GET /v1/webhook_endpoints/{id}`
pub(crate) async fn retrieve(
    state: web::Data<AppState>,
    caller: Authenticated,
    id: web::Path<String>,
) -> Result<web::Json<EndpointObject>, Failure> {
    let id = WebhookEndpointId::from(id.into_inner());
    let endpoint = state.store.webhook_endpoint(&caller.project_id, &id).await?;
    Ok(web::Json(endpoint.into()))
}

/// `POST /v1/webhook_endpoints/{id}`
pub(crate) async fn update(
    state: web::Data<AppState>,
    caller: Authenticated,
    id: web::Path<String>,
    payload: web::Payload,
) -> Result<HttpResponse, Failure> {
    let body = read_json(payload).await?;
    let change = change(&state, &body.fields)?;
    let id = WebhookEndpointId::from(id.into_inner());
    let changed = state.store.change_webhook_endpoint(&caller.project_id, &id, &change).await?;
    Ok(body.reply(&FIELDS).json(EndpointObject::from(changed)))
}

/// `DELETE /v1/webhook_endpoints/{id}`
pub(crate) async fn delete(
    state: web::Data<AppState>,
    caller: Authenticated,
    id: web::Path<String>,
) -> Result<HttpResponse, Failure> {
    let id = WebhookEndpointId::from(id.into_inner());
    state.store.delete_webhook_endpoint(&caller.project_id, &id).await?;
    Ok(HttpResponse::Ok().json(json!({
        "id": id, "object": "webhook_endpoint.deleted", "deleted": true
    })))
}

/// `POST /v1/webhook_endpoints/{id}/rotate_secret`
pub(crate) async fn rotate_secret(
    request: HttpRequest,
    state: web::Data<AppState>,
    caller: Authenticated,
    id: web::Path<String>,
    payload: web::Payload,
) -> Result<HttpResponse, Failure> {
    let body = read_json(payload).await?;
    let keep = match given(&body.fields, KEEP) {
        None => false,
        Some(Value::Bool(keep)) => *keep,
        Some(other) => return Err(invalid_value(KEEP, other, "true or false").into()),
    };
    let id = WebhookEndpointId::from(id.into_inner());
    // The path is a part of what is asked for.
    let asked = idempotency(&request, body.sha256)?.at(id.as_str());
    let secret = new_secret();
    let rotated = state.store.rotate_webhook_secret(&caller, &id, &secret, keep, &asked).await?;
    Ok(body.reply(&[KEEP]).json(with_secret(rotated)))
}

/// `POST /v1/webhook_endpoints/{id}/test`: sends a sample now and says what was answered.
pub(crate) async fn test(
    state: web::Data<AppState>,
    caller: Authenticated,
    id: web::Path<String>,
    payload: web::Payload,
) -> Result<HttpResponse, Failure> {
    let body = read_json(payload).await?;
    let event = fields::required(&body.fields, "event_type")?;
    let event = event_type("event_type", &event)?;
    let id = WebhookEndpointId::from(id.into_inner());
    let endpoint = state.store.webhook_endpoint(&caller.project_id, &id).await?;
    let event_id = format!("evt_{}", random_text(&mut rand::rng(), 24));
    let sample = json!({
        "id": event_id,
        "object": "event",
        "created_at": OffsetDateTime::now_utc().unix_timestamp(),
        "type": event.as_str(),
        "data": { "id": "sample" },
    });
    let message = Message {
        url: &endpoint.url,
        id: &event_id,
        body: &sample.to_string(),
        secrets: std::slice::from_ref(&endpoint.secret),
    };
    match send(&state.webhooks, &message).await {
        Ok(status) => Ok(body.reply(&["event_type"]).json(json!({
            "object": "webhook_endpoint.test",
            "webhook_endpoint_id": endpoint.id,
            "event_type": event.as_str(),
            "status_code": status.as_u16(),
            "success": true,
        }))),
        Err(error) => {
            // What is wrong inside the network is not for the client: it could be mapped like this.
            tracing::info!(%error, endpoint = %endpoint.id, "a webhook's test was not answered");
            Err(ApiError::new(
                ErrorCode::WebhookNotReached,
                "The endpoint did not answer. Look at its address, its certificate, and whether \
                 it answers within 15 seconds.",
            )
            .into())
        }
    }
}

fn change(state: &AppState, fields: &Map<String, Value>) -> Result<WebhookChange, ApiError> {
    let name = fields::text(fields, "name")?;
    if name.as_ref().is_some_and(|name| name.chars().count() > MAX_NAME) {
        let rule = format!("at most {MAX_NAME} characters");
        return Err(invalid_value("name", "too long", &rule));
    }
    let url = fields::text(fields, "url")?;
    let url = url.map(|url| state.webhooks.check(&url).map(String::from)).transpose()?;
    let event_types = match fields::texts(fields, "event_types")? {
        None => None,
        Some(words) if words.is_empty() => {
            return Err(invalid_value("event_types", "none", "a list of at least one event type"));
        }
        Some(words) => {
            let mut events = Vec::new();
            for word in words {
                let event = event_type("event_types", &word)?;
                if !events.contains(&event) {
                    events.push(event);
                }
            }
            Some(events)
        }
    };
    Ok(WebhookChange { name, url, event_types })
}

fn event_type(param: &str, word: &str) -> Result<WebhookEvent, ApiError> {
    WebhookEvent::parse(word).ok_or_else(|| {
        let words: Vec<&str> = WebhookEvent::ALL.iter().map(|event| event.as_str()).collect();
        invalid_value(param, word, &format!("one of {}", words.join(", ")))
    })
}

#[cfg(test)]
mod tests;
