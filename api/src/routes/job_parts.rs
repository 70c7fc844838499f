//! What belongs to a job: its events, its checkpoints and its loss curve.

use crate::auth::Authenticated;
use crate::failure::{Failure, invalid_value};
use crate::page::Page;
use crate::query::Query;
use crate::server::AppState;
use actix_web::{Either, HttpRequest, HttpResponse, web};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;
use tunesmith_core::hyperparameters::Precision;
use tunesmith_core::ids::JobId;
use tunesmith_core::metrics::StepMetrics;
use tunesmith_store::checkpoints::Checkpoint;
use tunesmith_store::events::Event;
use tunesmith_store::watch::Topic;

/// OpenAI's defaults; the maximum is ours.
pub(super) const DEFAULT_EVENTS: u64 = 20;
pub(super) const DEFAULT_CHECKPOINTS: u64 = 10;
pub(super) const MAX_LIST: u64 = 1000;

/// An event on the wire.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct EventObject {
    id: String,
    object: &'static str,
    created_at: i64,
    level: &'static str,
    message: String,
    #[serde(rename = "type")]
    kind: &'static str,
    data: Option<Value>,
}

impl From<Event> for EventObject {
    fn from(event: Event) -> Self {
        Self {
            id: event.id.to_string(),
            object: "fine_tuning.job.event",
            created_at: event.created_at.unix_timestamp(),
            level: event.level.as_str(),
            message: event.message,
            kind: event.kind.as_str(),
            data: event.data,
        }
    }
}

/// A checkpoint on the wire.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct CheckpointObject {
    id: String,
    object: &'static str,
    created_at: i64,
    fine_tuned_model_checkpoint: String,
    fine_tuning_job_id: String,
    step_number: u64,
    metrics: CheckpointMetrics,
}

/// The measures that OpenAI's clients know; what was not measured is left out.
#[derive(Debug, Serialize, JsonSchema)]
struct CheckpointMetrics {
    step: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    train_loss: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    train_mean_token_accuracy: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    valid_loss: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    valid_mean_token_accuracy: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    full_valid_loss: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    full_valid_mean_token_accuracy: Option<f64>,
    /// Ours, of preference pairs; so are the next three.
    #[serde(skip_serializing_if = "Option::is_none")]
    train_reward_accuracy: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    train_reward_margin: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    valid_reward_accuracy: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    valid_reward_margin: Option<f64>,
}

impl From<Checkpoint> for CheckpointObject {
    fn from(checkpoint: Checkpoint) -> Self {
        let metrics = checkpoint.metrics.as_ref();
        Self {
            id: checkpoint.id.to_string(),
            object: "fine_tuning.job.checkpoint",
            created_at: checkpoint.created_at.unix_timestamp(),
            fine_tuned_model_checkpoint: checkpoint.name,
            fine_tuning_job_id: checkpoint.job_id.to_string(),
            step_number: checkpoint.step,
            metrics: CheckpointMetrics {
                step: checkpoint.step,
                train_loss: metrics.map(|m| m.train_loss),
                train_mean_token_accuracy: metrics.map(|m| m.train_mean_token_accuracy),
                valid_loss: metrics.and_then(|m| m.valid_loss),
                valid_mean_token_accuracy: metrics.and_then(|m| m.valid_mean_token_accuracy),
                full_valid_loss: metrics.and_then(|m| m.full_valid_loss),
                full_valid_mean_token_accuracy: metrics
                    .and_then(|m| m.full_valid_mean_token_accuracy),
                train_reward_accuracy: metrics.and_then(|m| m.train_reward_accuracy),
                train_reward_margin: metrics.and_then(|m| m.train_reward_margin),
                valid_reward_accuracy: metrics.and_then(|m| m.valid_reward_accuracy),
                valid_reward_margin: metrics.and_then(|m| m.valid_reward_margin),
            },
        }
    }
}

/// The loss curve on the wire, with the facts that a picture of it needs. Ours.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Curve {
    object: &'static str,
    data: Vec<StepMetrics>,
    /// The whole rest of the curve is always sent.
    has_more: bool,
    total_steps: Option<u64>,
    initial_valid_loss: Option<f64>,
    train_rows: Option<u64>,
    valid_rows: Option<u64>,
    truncated_rows: Option<u64>,
    device: Option<String>,
    precision: Option<Precision>,
}

/// `GET /v1/fine_tuning/jobs/{id}/events`: a page, newest first; with `stream=true` all of them,
/// oldest first, and then each as it comes.
pub(crate) async fn events(
    state: web::Data<AppState>,
    caller: Authenticated,
    id: web::Path<String>,
    query: Query,
    request: HttpRequest,
) -> Result<Either<web::Json<Page<EventObject>>, HttpResponse>, Failure> {
    let id = JobId::from(id.into_inner());
    if query.flag("stream")? {
        let last = last_event_id(&request).or(query.text("after"));
        let place = state.store.place_of_event(&caller.project_id, &id, last).await?;
        return Ok(Either::Right(state.live.reply(id, Topic::Events, place)));
    }
    let request = query.page(DEFAULT_EVENTS, MAX_LIST)?;
    let page = state.store.list_events(&caller.project_id, &id, &request).await?;
    let events = page.items.into_iter().map(EventObject::from).collect();
    Ok(Either::Left(web::Json(Page::new(events, page.has_more, |event| &event.id))))
}

/// `GET /v1/fine_tuning/jobs/{id}/checkpoints`
pub(crate) async fn checkpoints(
    state: web::Data<AppState>,
    caller: Authenticated,
    id: web::Path<String>,
    query: Query,
) -> Result<web::Json<Page<CheckpointObject>>, Failure> {
    let request = query.page(DEFAULT_CHECKPOINTS, MAX_LIST)?;
    let id = JobId::from(id.into_inner());
    let page = state.store.list_checkpoints(&caller.project_id, &id, &request).await?;
    let checkpoints = page.items.into_iter().map(CheckpointObject::from).collect();
    Ok(web::Json(Page::new(checkpoints, page.has_more, |checkpoint| &checkpoint.id)))
}

/// `GET /v1/fine_tuning/jobs/{id}/metrics`: the whole curve, or the steps after `after`; with
/// `stream=true` each step as it comes, too. A resumed run may send a step again: the last holds.
pub(crate) async fn metrics(
    state: web::Data<AppState>,
    caller: Authenticated,
    id: web::Path<String>,
    query: Query,
    request: HttpRequest,
) -> Result<Either<web::Json<Curve>, HttpResponse>, Failure> {
    if query.flag("stream")? {
        let job = state.store.job(&caller.project_id, &JobId::from(id.into_inner())).await?;
        let place = match last_event_id(&request) {
            None => 0,
            Some(text) => text.parse().map_err(|_| {
                invalid_value("Last-Event-ID", text, "the id of an event of this stream")
            })?,
        };
        return Ok(Either::Right(state.live.reply(job.id, Topic::Metrics, place)));
    }
    let after = query.integer("after", 0..=u64::from(u32::MAX), 0)?;
    let job = state.store.job(&caller.project_id, &JobId::from(id.into_inner())).await?;
    let data = state.store.metrics(&caller.project_id, &job.id, after).await?;
    let run = job.run.as_ref();
    Ok(Either::Left(web::Json(Curve {
        object: "list",
        data,
        has_more: false,
        total_steps: run.map(|run| run.total_steps),
        initial_valid_loss: run.and_then(|run| run.initial_valid_loss),
        train_rows: run.map(|run| run.train_rows),
        valid_rows: run.map(|run| run.valid_rows),
        truncated_rows: run.map(|run| run.truncated_rows),
        device: run.map(|run| run.device.clone()),
        precision: run.map(|run| run.precision),
    })))
}

/// Where a stream that broke off goes on.
fn last_event_id(request: &HttpRequest) -> Option<&str> {
    request.headers().get("last-event-id")?.to_str().ok().filter(|id| !id.is_empty())
}

#[cfg(test)]
mod tests;
