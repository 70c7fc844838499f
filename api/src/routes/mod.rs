//! The paths of the API. One file a group of routes; its tests lie beside it.

mod adapter_import;
mod batches;
mod checkpoint_permissions;
mod completions;
mod dashboard;
mod file_report;
mod file_upload;
mod files;
mod graders;
mod health;
mod job_create;
mod job_parts;
mod job_preview;
mod job_rows;
mod jobs;
mod models;
mod openapi;
mod organization;
mod uploads;
mod webhook_endpoints;
mod weights;

pub(crate) use job_parts::EventObject;
pub use openapi::yaml as openapi_yaml;

use crate::failure::Failure;
use crate::observe::Route;
use actix_web::guard::GuardContext;
use actix_web::http::header::ALLOW;
use actix_web::middleware::Compress;
use actix_web::web::{self, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse, Resource};
use std::rc::Rc;
use tunesmith_core::errors::{ApiError, ErrorCode};

/// Every path that the server answers.
pub(crate) fn configure(config: &mut ServiceConfig) {
    config
        // Paths are tried in this order, so what clients ask for most comes first. Lists are compressed
        // for who takes that; a reply to a POST is too short to gain by it.
        .service(
            path("/v1/fine_tuning/jobs")
                .route(web::get().to(jobs::list).wrap(Compress::default()))
                .post(job_create::create),
        )
        // Before the ids, which no job's begins like.
        .service(path("/v1/fine_tuning/jobs/preview").post(job_preview::preview))
        .service(path("/v1/fine_tuning/jobs/{id}").get(jobs::retrieve))
        .service(path("/v1/fine_tuning/jobs/{id}/cancel").post(jobs::cancel))
        .service(path("/v1/fine_tuning/jobs/{id}/pause").post(jobs::pause))
        .service(path("/v1/fine_tuning/jobs/{id}/resume").post(jobs::resume))
        .service(path("/v1/fine_tuning/jobs/{id}/events").get(job_parts::events))
        .service(
            path("/v1/fine_tuning/jobs/{id}/checkpoints")
                .get(job_parts::checkpoints)
                .wrap(Compress::default()),
        )
        .service(path("/v1/fine_tuning/jobs/{id}/rows").get(job_rows::rows))
        .service(
            path("/v1/fine_tuning/jobs/{id}/metrics")
                .get(job_parts::metrics)
                .wrap(Compress::default()),
        )
        .service(path("/healthz").get(health::live))
        .service(path("/readyz").get(health::ready))
        .service(path("/metrics").get(health::metrics))
        .service(path("/openapi.yaml").get(openapi::document).wrap(Compress::default()))
        .service(path("/docs").get(openapi::reference).wrap(Compress::default()))
        .service(path("/jobs/{id}").get(dashboard::page))
        .service(path("/playground").get(dashboard::page))
        .service(path("/assets/{name}").get(dashboard::asset).wrap(Compress::default()))
        .service(
            path("/v1/files")
                .route(web::get().to(files::list).wrap(Compress::default()))
                .post(file_upload::create),
        )
        .service(path("/v1/files/{id}").get(files::retrieve).delete(files::delete))
        .service(path("/v1/files/{id}/content").get(files::content))
        .service(path("/v1/files/{id}/report").get(file_report::report))
        .service(path("/v1/uploads").post(uploads::create))
        .service(path("/v1/uploads/{id}/parts").post(uploads::add_part))
        .service(path("/v1/uploads/{id}/complete").post(uploads::complete))
        .service(path("/v1/uploads/{id}/cancel").post(uploads::cancel))
        // The name of a checkpoint may hold slashes too.
        .service(
            path("/v1/fine_tuning/checkpoints/{name:.+}/permissions/{permission}")
                .delete(checkpoint_permissions::delete),
        )
        .service(
            path("/v1/fine_tuning/checkpoints/{name:.+}/permissions")
                .get(checkpoint_permissions::list)
                .post(checkpoint_permissions::create),
        )
        .service(path("/v1/fine_tuning/alpha/graders/run").post(graders::run))
        .service(path("/v1/fine_tuning/alpha/graders/validate").post(graders::validate))
        .configure(batches::configure)
        .configure(completions::configure)
        .configure(organization::configure)
        .configure(webhook_endpoints::configure)
        .service(
            path("/v1/models")
                .route(web::get().to(models::list).wrap(Compress::default()))
                .post(adapter_import::create),
        )
        // A base model's name may hold slashes, and so may the names made of it.
        .service(path("/v1/models/{name:.+}/weights").get(weights::download))
        .service(path("/v1/models/{name:.+}").get(models::retrieve).delete(models::delete))
        .default_service(web::to(unknown_url));
}

/// A path, which requests are counted by; methods that it does not have are answered in the common
/// shape.
fn path(pattern: &str) -> Resource {
    let found = Rc::from(pattern);
    web::resource(pattern)
        .guard(move |request: &GuardContext<'_>| {
            Route::found(request, &found);
            true
        })
        .default_service(web::to(method_not_allowed))
}

async fn unknown_url(request: HttpRequest) -> Result<HttpResponse, Failure> {
    let message = format!("Invalid URL ({} {})", request.method(), request.path());
    Err(ApiError::new(ErrorCode::UnknownUrl, message).into())
}

async fn method_not_allowed(request: HttpRequest) -> HttpResponse {
    let message = format!("Not allowed to {} on {}.", request.method(), request.path());
    let failure = Failure::from(ApiError::new(ErrorCode::MethodNotAllowed, message));
    let mut reply = HttpResponse::from_error(failure);
    let methods = openapi::methods_of(&request.match_pattern().unwrap_or_default());
    if let Ok(methods) = methods.try_into() {
        reply.headers_mut().insert(ALLOW, methods);
    }
    reply
}
