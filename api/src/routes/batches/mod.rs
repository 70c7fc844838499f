//! `/v1/batches`: files of requests.

use crate::auth::Authenticated;
use crate::batches::MAX_INPUT_BYTES;
use crate::body::read_json;
use crate::failure::{Failure, invalid_value, no_such_file};
use crate::fields::{metadata, required};
use crate::idempotency::idempotency;
use crate::page::Page;
use crate::query::Query;
use crate::routes::openapi::words;
use crate::routes::path;
use crate::routes::uploads::expires_after;
use crate::server::AppState;
use actix_web::web::{self, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use time::OffsetDateTime;
use tunesmith_core::ids::{BatchId, FileId};
use tunesmith_store::StoreError;
use tunesmith_store::batches::{Batch, BatchStatus, NewBatch};
use tunesmith_store::files::Purpose;

/// OpenAI's limits.
pub(super) const DEFAULT_LIST: u64 = 20;
pub(super) const MAX_LIST: u64 = 100;
pub(super) const WINDOW: &str = "24h";
/// The endpoints that a batch may be for.
pub(super) const ENDPOINTS: [&str; 2] = ["/v1/chat/completions", "/v1/completions"];
const FIELDS: [&str; 5] =
    ["input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"];

/// The paths of this group.
pub(crate) fn configure(config: &mut ServiceConfig) {
    config
        .service(path("/v1/batches").get(list).post(create))
        .service(path("/v1/batches/{id}").get(retrieve))
        .service(path("/v1/batches/{id}/cancel").post(cancel));
}

/// A batch on the wire.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct BatchObject {
    id: String,
    object: &'static str,
    endpoint: String,
    model: Option<String>,
    #[schemars(with = "Option<Map<String, Value>>")]
    errors: Option<Value>,
    input_file_id: String,
    completion_window: &'static str,
    #[schemars(extend("enum" = words(BatchStatus::ALL, BatchStatus::as_str)))]
    status: &'static str,
    output_file_id: Option<String>,
    error_file_id: Option<String>,
    created_at: i64,
    in_progress_at: Option<i64>,
    expires_at: i64,
    finalizing_at: Option<i64>,
    completed_at: Option<i64>,
    failed_at: Option<i64>,
    expired_at: Option<i64>,
    cancelling_at: Option<i64>,
    cancelled_at: Option<i64>,
    #[schemars(with = "BTreeMap<String, u64>")]
    request_counts: Value,
    metadata: Option<BTreeMap<String, String>>,
}

impl From<Batch> for BatchObject {
    fn from(batch: Batch) -> Self {
        let unix = |time: Option<OffsetDateTime>| time.map(OffsetDateTime::unix_timestamp);
        Self {
            id: batch.id.to_string(),
            object: "batch",
            endpoint: batch.endpoint,
            model: batch.model,
            errors: batch.errors.map(|errors| json!({ "object": "list", "data": errors })),
            input_file_id: batch.input_file.to_string(),
            completion_window: WINDOW,
            status: batch.status.as_str(),
            output_file_id: batch.output_file.map(|id| id.to_string()),
            error_file_id: batch.error_file.map(|id| id.to_string()),
            created_at: batch.created_at.unix_timestamp(),
            in_progress_at: unix(batch.in_progress_at),
            expires_at: batch.expires_at.unix_timestamp(),
            finalizing_at: unix(batch.finalizing_at),
            completed_at: unix(batch.completed_at),
            failed_at: unix(batch.failed_at),
            expired_at: unix(batch.expired_at),
            cancelling_at: unix(batch.cancelling_at),
            cancelled_at: unix(batch.cancelled_at),
            request_counts: json!({
                "total": batch.total, "completed": batch.completed, "failed": batch.failed,
            }),
            metadata: Some(batch.metadata).filter(|metadata| !metadata.is_empty()),
        }
    }
}

/// `POST /v1/batches`
pub(crate) async fn create(
    request: HttpRequest,
    state: web::Data<AppState>,
    caller: Authenticated,
    payload: web::Payload,
) -> Result<HttpResponse, Failure> {
    let body = read_json(payload).await?;
    let fields = &body.fields;
    let input_file = FileId::from(required(fields, "input_file_id")?);
    let endpoint = required(fields, "endpoint")?;
    if !ENDPOINTS.contains(&endpoint.as_str()) {
        let rule = format!("one of {}", ENDPOINTS.join(", "));
        return Err(invalid_value("endpoint", endpoint, &rule).into());
    }
    let window = required(fields, "completion_window")?;
    if window != WINDOW {
        return Err(invalid_value("completion_window", window, "\"24h\"").into());
    }
    let new = NewBatch {
        endpoint,
        input_file,
        metadata: metadata(fields)?,
        output_expires_after: expires_after(fields, "output_expires_after")?,
    };
    match state.store.file(&caller.project_id, &new.input_file).await {
        Err(StoreError::NotFound { id, .. }) => {
            return Err(no_such_file(&id).with_param("input_file_id").into());
        }
        Ok(file) if file.purpose != Purpose::Batch => {
            let given = format!("{}, a file of purpose '{}'", file.id, file.purpose.as_str());
            return Err(invalid_value("input_file_id", given, "a file of purpose 'batch'").into());
        }
        Ok(file) if file.bytes > MAX_INPUT_BYTES => {
            let given = format!("{}, a file of {} bytes", file.id, file.bytes);
            let rule = format!("a file of at most {MAX_INPUT_BYTES} bytes");
            return Err(invalid_value("input_file_id", given, &rule).into());
        }
        found => found?,
    };
    let idempotency = idempotency(&request, body.sha256)?;
    let batch = state.store.create_batch(&caller, &new, &idempotency).await?;
    Ok(body.reply(&FIELDS).json(BatchObject::from(batch)))
}

/// `GET /v1/batches`
pub(crate) async fn list(
    state: web::Data<AppState>,
    caller: Authenticated,
    query: Query,
) -> Result<web::Json<Page<BatchObject>>, Failure> {
    let request = query.page(DEFAULT_LIST, MAX_LIST)?;
    let page = state.store.list_batches(&caller.project_id, &request).await?;
    let batches = page.items.into_iter().map(BatchObject::from).collect();
    Ok(web::Json(Page::new(batches, page.has_more, |batch| &batch.id)))
}

/// `GET /v1/batches/{id}`
pub(crate) async fn retrieve(
    state: web::Data<AppState>,
    caller: Authenticated,
    id: web::Path<String>,
) -> Result<web::Json<BatchObject>, Failure> {
    let batch = state.store.batch(&caller.project_id, &BatchId::from(id.into_inner())).await?;
    Ok(web::Json(batch.into()))
}

/// `POST /v1/batches/{id}/cancel`
pub(crate) async fn cancel(
    state: web::Data<AppState>,
    caller: Authenticated,
    id: web::Path<String>,
) -> Result<web::Json<BatchObject>, Failure> {
    let id = BatchId::from(id.into_inner());
    Ok(web::Json(state.store.cancel_batch(&caller.project_id, &id).await?.into()))
}

#[cfg(test)]
mod tests;
