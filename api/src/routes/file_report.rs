//! `GET /v1/files/{id}/report`: what a file to train on is found to be. Ours.

use crate::auth::Authenticated;
use crate::failure::{Failure, invalid_value};
use crate::query::Query;
use crate::routes::job_create::base_model;
use crate::server::AppState;
use actix_web::http::header::RETRY_AFTER;
use actix_web::{HttpResponse, web};
use serde_json::{Value, json};
use tunesmith_core::ids::FileId;
use tunesmith_store::file_reports::ReportState;
use tunesmith_store::files::Purpose;

/// A report that is being made is worth another look after this many seconds.
const LOOK_AGAIN_SECONDS: u64 = 1;

/// The report, with tokens as the base model `?model=` counts them, or the one that was imported
/// first. One that is not made yet is asked for, and answered with 202 and `Retry-After`.
pub(crate) async fn report(
    state: web::Data<AppState>,
    caller: Authenticated,
    id: web::Path<String>,
    query: Query,
) -> Result<HttpResponse, Failure> {
    let file = state.store.file(&caller.project_id, &FileId::from(id.into_inner())).await?;
    if file.purpose != Purpose::FineTune {
        let given = format!("{}, a file of purpose '{}'", file.id, file.purpose.as_str());
        let rule = format!("a file of purpose '{}'", Purpose::FineTune.as_str());
        return Err(invalid_value("id", given, &rule).into());
    }
    let model = match query.text("model") {
        Some(name) => Some(base_model(&state, name).await?.id),
        None => state.store.default_base_model().await?,
    };
    let mut shown = json!({"object": "file.report", "file_id": file.id});
    match state.store.want_report(&file.id, model.as_ref()).await? {
        ReportState::Done { report, created_at } => {
            shown["status"] = json!("completed");
            shown["created_at"] = json!(created_at.unix_timestamp());
            if let (Value::Object(shown), Value::Object(report)) = (&mut shown, report) {
                shown.extend(report);
            }
            Ok(HttpResponse::Ok().json(shown))
        }
        ReportState::InProgress => {
            shown["status"] = json!("in_progress");
            Ok(HttpResponse::Accepted()
                .insert_header((RETRY_AFTER, LOOK_AGAIN_SECONDS))
                .json(shown))
        }
        ReportState::GivenUp => {
            shown["status"] = json!("failed");
            shown["error"] = json!(
                "The server failed again and again while it read the file. Give whoever runs it \
                 this file's id."
            );
            Ok(HttpResponse::Ok().json(shown))
        }
    }
}
