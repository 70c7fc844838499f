//! `/v1/fine_tuning/jobs` once a job is there: retrieve, list, cancel, pause, resume.

use crate::auth::{Authenticated, authenticated_job};
use crate::failure::{Failure, invalid_value};
use crate::page::Page;
use crate::query::Query;
use crate::server::AppState;
use actix_web::http::header::ContentType;
use actix_web::{HttpRequest, HttpResponse, web};
use bytes::Bytes;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use time::OffsetDateTime;
use tunesmith_core::errors::ApiError;
use tunesmith_core::hyperparameters::{Hyperparameters, Method};
use tunesmith_core::ids::JobId;
use tunesmith_core::state::JobStatus;
use tunesmith_store::jobs::{Job, MetadataFilter, SeenJob};
use tunesmith_store::metrics::LastStep;

/// OpenAI's default; the maximum is ours.
pub(super) const DEFAULT_LIST: u64 = 20;
pub(super) const MAX_LIST: u64 = 1000;
/// The hyperparameters that the job's old, top-level place shows: OpenAI's three.
const TOP_LEVEL_HYPERPARAMETERS: [&str; 3] = ["n_epochs", "batch_size", "learning_rate_multiplier"];

/// A job on the wire. What the SDKs declare is there even when it is null.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct JobObject {
    id: String,
    object: &'static str,
    created_at: i64,
    model: String,
    status: JobStatus,
    /// Ours: the clients' enum has no word for a job that rests.
    #[serde(skip_serializing_if = "Option::is_none")]
    paused: Option<bool>,
    training_file: String,
    validation_file: Option<String>,
    fine_tuned_model: Option<String>,
    trained_tokens: Option<u64>,
    finished_at: Option<i64>,
    estimated_finish: Option<i64>,
    organization_id: String,
    result_files: Vec<String>,
    seed: u64,
    error: Option<ApiError>,
    /// OpenAI's three.
    #[schemars(with = "Map<String, Value>")]
    hyperparameters: Value,
    /// The type of the method, and under its name all hyperparameters.
    #[schemars(with = "Map<String, Value>")]
    method: Value,
    #[schemars(with = "Vec<Value>", extend("maxItems" = 0))]
    integrations: [(); 0],
    metadata: BTreeMap<String, String>,
}

impl JobObject {
    /// The job as its owner sees it now.
    pub(crate) fn new(job: &Job, estimated_finish: Option<OffsetDateTime>) -> Self {
        let hyperparameters = hyperparameters(job);
        let top_level = TOP_LEVEL_HYPERPARAMETERS
            .map(|name| (name.to_owned(), hyperparameters[name].clone()))
            .into_iter()
            .collect();
        Self {
            id: job.id.to_string(),
            object: "fine_tuning.job",
            created_at: job.created_at.unix_timestamp(),
            model: job.model.clone(),
            status: job.status,
            paused: (job.paused && !job.status.is_terminal()).then_some(true),
            training_file: job.training_file.to_string(),
            validation_file: job.validation_file.as_ref().map(ToString::to_string),
            fine_tuned_model: job.fine_tuned_model().map(str::to_owned),
            trained_tokens: job.trained_tokens,
            finished_at: job.finished_at.map(|time| time.unix_timestamp()),
            estimated_finish: estimated_finish.map(|time| time.unix_timestamp()),
            organization_id: job.organization_id.to_string(),
            result_files: job.result_file.iter().map(ToString::to_string).collect(),
            seed: job.seed,
            error: job.error.clone(),
            hyperparameters: Value::Object(top_level),
            method: method(job.method, hyperparameters),
            integrations: [],
            metadata: job.metadata.clone(),
        }
    }
}

/// What the job learns from, and under its name all hyperparameters.
fn method(method: Method, hyperparameters: Value) -> Value {
    // Moved: the macro would copy them.
    let under_its_name = Map::from_iter([("hyperparameters".to_owned(), hyperparameters)]);
    Value::Object(Map::from_iter([
        ("type".to_owned(), Value::from(method.as_str())),
        (method.as_str().to_owned(), Value::Object(under_its_name)),
    ]))
}

/// Resolved as soon as that is done, the client's before.
fn hyperparameters(job: &Job) -> Value {
    match &job.resolved {
        Some(resolved) => {
            let mut shown = resolved.to_wire();
            // The one thing that is decided by the machine that runs the job.
            if let Some(run) = &job.run {
                shown["precision"] = json!(run.precision);
            }
            shown
        }
        // They were read once when the job was made, so they are read again without an error.
        None => Hyperparameters::parse_for(job.method, &job.hyperparameters, "hyperparameters")
            .map(|(parsed, _)| parsed)
            .unwrap_or_default()
            .to_wire(),
    }
}

/// The JSON of the job, as of now.
fn body(seen: &SeenJob) -> Result<Bytes, Failure> {
    let SeenJob { job, last_step, shown, .. } = seen;
    let body = |finish| {
        let body = serde_json::to_vec(&JobObject::new(job, finish));
        body.map(Bytes::from).map_err(Failure::internal)
    };
    if job.status == JobStatus::Running {
        // It tells the time.
        return body(last_step.and_then(|last| estimated_finish(job, last)));
    }
    if let Some(shown) = shown.get() {
        return Ok(shown.clone());
    }
    let made = body(None)?;
    Ok(shown.get_or_init(|| made).clone())
}

/// The job with the time at which it should end, where that can be told.
pub(crate) async fn shown(state: &AppState, job: &Job) -> Result<JobObject, Failure> {
    if job.status != JobStatus::Running {
        return Ok(JobObject::new(job, None));
    }
    let last = state.store.last_metrics(&job.project_id, &job.id).await?;
    let last = last.map(|last| LastStep { step: last.step, elapsed_seconds: last.elapsed_seconds });
    Ok(JobObject::new(job, last.and_then(|last| estimated_finish(job, last))))
}

/// A running job goes on at the speed that it has had so far.
fn estimated_finish(job: &Job, last: LastStep) -> Option<OffsetDateTime> {
    let steps_left = job.run.as_ref()?.total_steps.saturating_sub(last.step) as f64;
    let seconds_left = steps_left * last.elapsed_seconds / last.step as f64;
    let left = time::Duration::checked_seconds_f64(seconds_left)?;
    OffsetDateTime::now_utc().checked_add(left)
}

/// `GET /v1/fine_tuning/jobs`
pub(crate) async fn list(
    state: web::Data<AppState>,
    caller: Authenticated,
    query: Query,
) -> Result<web::Json<Page<JobObject>>, Failure> {
    let metadata = metadata_filter(&query)?;
    let request = query.page(DEFAULT_LIST, MAX_LIST)?;
    let page = state.store.list_jobs(&caller.project_id, &metadata, &request).await?;
    let mut jobs = Vec::with_capacity(page.items.len());
    for job in &page.items {
        jobs.push(shown(&state, job).await?);
    }
    Ok(web::Json(Page::new(jobs, page.has_more, |job| &job.id)))
}

/// `metadata[key]=value` pairs that a job's notes must hold, or `metadata=null` for jobs without any.
fn metadata_filter(query: &Query) -> Result<MetadataFilter, ApiError> {
    let pairs: BTreeMap<String, String> = query
        .bracketed("metadata")
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    match query.text("metadata") {
        None => Ok(MetadataFilter::Holds(pairs)),
        Some("null") if pairs.is_empty() => Ok(MetadataFilter::Empty),
        Some(other) => {
            Err(invalid_value("metadata", other, "metadata[key]=value, or metadata=null alone"))
        }
    }
}

/// `GET /v1/fine_tuning/jobs/{id}`
pub(crate) async fn retrieve(
    request: HttpRequest,
    id: web::Path<String>,
) -> Result<HttpResponse, Failure> {
    let seen = authenticated_job(&request, &JobId::from(id.into_inner())).await?;
    Ok(HttpResponse::Ok().content_type(ContentType::json()).body(body(&seen)?))
}

/// `POST /v1/fine_tuning/jobs/{id}/cancel`
pub(crate) async fn cancel(
    state: web::Data<AppState>,
    caller: Authenticated,
    id: web::Path<String>,
) -> Result<web::Json<JobObject>, Failure> {
    let id = JobId::from(id.into_inner());
    let job = state.store.request_cancel(&caller.project_id, &id).await?;
    Ok(web::Json(shown(&state, &job).await?))
}

/// `POST /v1/fine_tuning/jobs/{id}/pause`
pub(crate) async fn pause(
    state: web::Data<AppState>,
    caller: Authenticated,
    id: web::Path<String>,
) -> Result<web::Json<JobObject>, Failure> {
    let id = JobId::from(id.into_inner());
    let job = state.store.pause_job(&caller.project_id, &id).await?;
    Ok(web::Json(shown(&state, &job).await?))
}

/// `POST /v1/fine_tuning/jobs/{id}/resume`
pub(crate) async fn resume(
    state: web::Data<AppState>,
    caller: Authenticated,
    id: web::Path<String>,
) -> Result<web::Json<JobObject>, Failure> {
    let id = JobId::from(id.into_inner());
    let job = state.store.resume_job(&caller.project_id, &id).await?;
    Ok(web::Json(shown(&state, &job).await?))
}

#[cfg(test)]
mod tests;
