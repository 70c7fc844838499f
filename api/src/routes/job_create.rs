//! `POST /v1/fine_tuning/jobs`

use crate::auth::Authenticated;
use crate::body::read_json;
use crate::failure::{Failure, invalid_value, no_such_file};
use crate::idempotency::idempotency;
use crate::job_request::JobRequest;
use crate::routes::jobs;
use crate::server::AppState;
use crate::warnings;
use actix_web::{HttpRequest, HttpResponse, web};
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::hyperparameters::AdapterType;
use tunesmith_core::ids::FileId;
use tunesmith_core::weights::WeightsPlace;
use tunesmith_store::base_models::BaseModel;
use tunesmith_store::events::{Level, NewEvent};
use tunesmith_store::files::Purpose;
use tunesmith_store::jobs::NewJob;
use tunesmith_store::models::Model;
use tunesmith_store::tenants::Caller;
use tunesmith_store::{Store, StoreError};

/// Makes a job, once, however often the client asks.
pub(crate) async fn create(
    request: HttpRequest,
    state: web::Data<AppState>,
    caller: Authenticated,
    payload: web::Payload,
) -> Result<HttpResponse, Failure> {
    let body = read_json(payload).await?;
    let mut asked = JobRequest::parse(&body.fields)?;
    let idempotency = idempotency(&request, body.sha256)?;
    let (base, tuned) = start_model(&state, &caller, &asked.model).await?;
    let start = match tuned {
        None => Start { base, is_tuned: false, weights: None },
        Some(tuned) => {
            let trained = asked.start_from(&tuned.adapter)?;
            Start::with(&state.store, base, tuned, trained).await?
        }
    };
    let training_file = job_file(&state, &caller, "training_file", &asked.training_file).await?;
    let validation_file = match &asked.validation_file {
        Some(id) => Some(job_file(&state, &caller, "validation_file", id).await?),
        None => None,
    };
    let warnings = asked.warnings();
    let new = NewJob {
        base_model: if start.is_tuned {
            start.base.origin_name().to_owned()
        } else {
            // An alias too.
            asked.model.clone()
        },
        model: asked.model,
        is_tuned: start.is_tuned,
        base_model_id: start.base.id,
        start: start.weights,
        training_file,
        validation_file,
        suffix: asked.suffix,
        seed: asked.seed,
        metadata: asked.metadata,
        method: asked.method,
        hyperparameters: asked.hyperparameters,
        most_unfinished: state.limits.unfinished_jobs,
        events: asked
            .hyperparameter_warnings
            .into_iter()
            .map(|warning| NewEvent::message(Level::Warn, warning))
            .collect(),
    };
    let created = state.store.create_job(&caller, &new, &idempotency).await?;
    let mut reply = HttpResponse::Ok();
    warnings::add(&mut reply, &warnings);
    Ok(reply.json(jobs::shown(&state, &created.job).await?))
}

/// What a job begins with.
struct Start {
    base: BaseModel,
    /// Whether the request names a tuned model.
    is_tuned: bool,
    /// Weights beside the base model.
    weights: Option<WeightsPlace>,
}

impl Start {
    /// A job that trains `trained` and begins with `tuned`, a tuned model of `base`.
    async fn with(
        store: &Store,
        base: BaseModel,
        tuned: Model,
        trained: AdapterType,
    ) -> Result<Self, StoreError> {
        Ok(match (tuned.adapter.kind, trained) {
            (AdapterType::Full, AdapterType::Lora) => {
                Self { base: store.tuned_base(&tuned).await?, is_tuned: true, weights: None }
            }
            _ => Self { base, is_tuned: true, weights: Some(tuned.place) },
        })
    }
}

/// What a job starts from: a base model, or the tuned model or checkpoint that the caller calls
/// `name`, beside its base model.
///
/// # Errors
/// `model_not_found`, also for a tuned model of another project.
pub(super) async fn start_model(
    state: &AppState,
    caller: &Caller,
    name: &str,
) -> Result<(BaseModel, Option<Model>), Failure> {
    let (project, base_name) = (&caller.project_id, state.base_model_name(name));
    let found = state.store.base_or_tuned_model(project, base_name, name).await;
    or_models_there_are(state, name, found).await
}

/// # Errors
/// `model_not_found`.
pub(super) async fn base_model(state: &AppState, name: &str) -> Result<BaseModel, Failure> {
    let found = state.store.base_model(state.base_model_name(name)).await;
    or_models_there_are(state, name, found).await
}

/// What was found as `name`, or `model_not_found` with the names there are.
async fn or_models_there_are<T>(
    state: &AppState,
    name: &str,
    found: Result<T, StoreError>,
) -> Result<T, Failure> {
    match found {
        Ok(found) => return Ok(found),
        Err(StoreError::NotFound { .. }) => {}
        Err(other) => return Err(other.into()),
    }
    let models = state.store.list_base_models().await?;
    let names: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
    let there_are = if names.is_empty() {
        "No base model is there yet; import one with `tunesmith models import`.".to_owned()
    } else {
        format!("Available models: {}, and the tuned models of your project.", names.join(", "))
    };
    Err(ApiError::new(
        ErrorCode::ModelNotFound,
        format!("Model {name} is not available for fine-tuning or does not exist. {there_are}"),
    )
    .with_param("model")
    .into())
}

/// The id of a file that a job may read.
pub(super) async fn job_file(
    state: &AppState,
    caller: &Caller,
    param: &str,
    id: &str,
) -> Result<FileId, Failure> {
    let id = FileId::from(id);
    match state.store.file(&caller.project_id, &id).await {
        Ok(file) if file.purpose == Purpose::FineTune => Ok(id),
        Ok(file) => {
            let given = format!("{id}, a file of purpose '{}'", file.purpose.as_str());
            let rule = format!("a file of purpose '{}'", Purpose::FineTune.as_str());
            Err(invalid_value(param, given, &rule).into())
        }
        Err(StoreError::NotFound { .. }) => Err(no_such_file(id.as_str()).with_param(param).into()),
        Err(other) => Err(other.into()),
    }
}

#[cfg(test)]
mod tests;
