//! `/healthz` and `/readyz`, for whoever watches the process. Neither asks for a key.

use crate::failure::Failure;
use crate::server::AppState;
use actix_web::{HttpResponse, web};
use serde_json::json;

/// The process answers.
pub(crate) async fn live() -> HttpResponse {
    HttpResponse::Ok().json(json!({ "status": "ok" }))
}

/// The process can do its work: its database answers.
pub(crate) async fn ready(state: web::Data<AppState>) -> Result<HttpResponse, Failure> {
    state.store.ping().await.map_err(Failure::unavailable)?;
    Ok(live().await)
}
