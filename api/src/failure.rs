//! What a handler returns in place of a reply: an error of the table, in OpenAI's shape.

use crate::limits::over_quota;
use actix_web::http::StatusCode;
use actix_web::{HttpResponse, ResponseError};
use serde_json::{Value, json};
use std::fmt;
use std::time::Duration;
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_store::StoreError;

/// What a client reads of a fault of ours; the cause goes to the log only.
const INTERNAL_MESSAGE: &str = "The server had an error while processing your request. Try again; \
    if it stays, give whoever runs this server the x-request-id of this reply.";
const UNAVAILABLE_MESSAGE: &str =
    "The server cannot reach its database or its object store for now. Try again in a moment.";

/// An error reply: what the client reads, and for a fault of ours the cause that the log keeps.
#[derive(Debug)]
pub(crate) struct Failure {
    error: ApiError,
    cause: Option<Box<dyn std::error::Error + Send + Sync>>,
    retry_after: Option<Duration>,
}

impl Failure {
    /// A refusal that ends by itself after this time.
    pub(crate) fn retry_after(error: ApiError, wait: Duration) -> Self {
        Self { retry_after: Some(wait), ..Self::from(error) }
    }

    /// A fault of ours. `cause` reaches the log, never the client.
    pub(crate) fn internal(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self {
            error: ApiError::new(ErrorCode::Internal, INTERNAL_MESSAGE),
            cause: Some(cause.into()),
            retry_after: None,
        }
    }

    /// Which error of the table.
    pub(crate) fn code(&self) -> ErrorCode {
        self.error.code
    }

    /// What a client reads. The cause of a fault of ours is logged here.
    pub(crate) fn into_error(self) -> ApiError {
        if self.cause.is_some() {
            tracing::error!(error = %self, "a request of a batch failed");
        }
        self.error
    }

    /// The error, where it is the client's; a fault of ours stays a failure.
    pub(crate) fn client_error(self) -> Result<ApiError, Self> {
        if self.cause.is_none() { Ok(self.error) } else { Err(self) }
    }

    /// The database or the object store does not answer.
    pub(crate) fn unavailable(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self {
            error: ApiError::new(ErrorCode::Unavailable, UNAVAILABLE_MESSAGE),
            cause: Some(cause.into()),
            retry_after: None,
        }
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self { error, cause: None, retry_after: None }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let reply = match &error {
            StoreError::NotFound { kind: "file", id } => no_such_file(id),
            StoreError::NotFound { kind: "job", id } => no_such_job(id),
            StoreError::NotFound { kind: "model", id } => no_such_model(id),
            StoreError::NotFound { kind: "permission", id } => ApiError::new(
                ErrorCode::PermissionNotFound,
                format!("No such permission to use this checkpoint: {id}"),
            )
            .with_param("permission_id"),
            StoreError::NotFound { kind: "project", id } => ApiError::new(
                ErrorCode::ProjectNotFound,
                format!("No such project in this organisation: {id}"),
            )
            .with_param("project_id"),
            StoreError::NotFound { kind: "api key", id } => {
                ApiError::new(ErrorCode::ApiKeyNotFound, format!("No such API key: {id}"))
                    .with_param("key_id")
            }
            StoreError::NotFound { kind: "webhook endpoint", id } => ApiError::new(
                ErrorCode::WebhookEndpointNotFound,
                format!("No such webhook endpoint: {id}"),
            )
            .with_param("webhook_endpoint_id"),
            StoreError::AlreadyExists { kind: "project", name } => {
                invalid_value("name", name, "a name that no other project of the organisation has")
            }
            StoreError::UnknownCursor { after } => {
                invalid_value("after", after, "the id of an entry of this list")
            }
            StoreError::TooManyJobs { limit } => {
                over_quota("unfinished jobs", *limit, "Wait for one to end, or cancel one.")
            }
            StoreError::IdempotencyConflict => ApiError::new(
                ErrorCode::IdempotencyConflict,
                "This Idempotency-Key was used for another request. Send the first request's \
                 body again, or choose a new key.",
            ),
            StoreError::SecretShown { key } => ApiError::new(
                ErrorCode::SecretAlreadyShown,
                format!(
                    "This request has made {key} before. Its secret was shown then and is not kept. If \
                     it is lost, delete {key} and make another key with a new Idempotency-Key."
                ),
            ),
            StoreError::FileInUse { file, job } => ApiError::new(
                ErrorCode::FileInUse,
                format!(
                    "File {file} is used by job {job}, which has not ended. Cancel the job or \
                     wait for its end, then delete the file."
                ),
            )
            .with_param("id"),
            StoreError::FileInBatch { file, batch } => ApiError::new(
                ErrorCode::FileInUse,
                format!(
                    "File {file} is used by batch {batch}, which has not ended. Cancel the batch \
                     or wait for its end, then delete the file."
                ),
            )
            .with_param("id"),
            StoreError::BatchEnded { batch, status } => ApiError::new(
                ErrorCode::InvalidBatchState,
                format!("Batch {batch} is {status}, and this cannot be done to it any more."),
            )
            .with_param("batch_id"),
            StoreError::NotFound { kind: "batch", id } => {
                ApiError::new(ErrorCode::BatchNotFound, format!("No such Batch object: {id}"))
                    .with_param("batch_id")
            }
            StoreError::InvalidState { job, status } => ApiError::new(
                ErrorCode::InvalidJobState,
                format!("Job {job} is {status}, and this cannot be done to it any more."),
            )
            .with_param("fine_tune_id"),
            StoreError::NotFound { kind: "upload", id } => {
                ApiError::new(ErrorCode::UploadNotFound, format!("No such Upload object: {id}"))
                    .with_param("upload_id")
            }
            StoreError::UploadEnded { upload, status } => ApiError::new(
                ErrorCode::InvalidUploadState,
                format!(
                    "Upload {upload} is {status}, and this cannot be done to it any more. Begin \
                     a new one."
                ),
            )
            .with_param("upload_id"),
            StoreError::UploadParts { upload, reason } => ApiError::new(
                ErrorCode::InvalidValue,
                format!(
                    "Upload {upload} cannot go on like this: {reason}. What has arrived stays; \
                     send what is missing, then name the parts in their order."
                ),
            )
            .with_param("part_ids"),
            StoreError::TooLarge { cap } => ApiError::new(
                ErrorCode::PayloadTooLarge,
                format!("The file is over the {cap} bytes that this server accepts."),
            )
            .with_param("file"),
            StoreError::BrokenStream(cause) => broken_body(&**cause),
            StoreError::ImportGivenUp => return Self::unavailable(error),
            _ if error.is_transient() => return Self::unavailable(error),
            _ => return Self::internal(error),
        };
        reply.into()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(cause) = &self.cause else { return self.error.fmt(f) };
        write!(f, "{cause}")?;
        let mut source = cause.source();
        while let Some(inner) = source {
            write!(f, ": {inner}")?;
            source = inner.source();
        }
        Ok(())
    }
}

impl ResponseError for Failure {
    fn status_code(&self) -> StatusCode {
        // The table's test keeps every status within 400..600.
        StatusCode::from_u16(self.error.code.http_status())
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    fn error_response(&self) -> HttpResponse {
        let mut reply = HttpResponse::build(self.status_code());
        if is_permanent_conflict(self.error.code) {
            reply.insert_header(("x-should-retry", "false"));
        }
        if let Some(wait) = self.retry_after {
            // Whole seconds by RFC 9110; the SDKs also read milliseconds.
            reply.insert_header(("retry-after", wait.as_secs_f64().ceil().to_string()));
            reply.insert_header(("retry-after-ms", wait.as_millis().max(1).to_string()));
        }
        reply.json(wire(&self.error))
    }
}

/// Conflicts that no retry can heal; the SDKs obey `x-should-retry`.
fn is_permanent_conflict(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::InvalidJobState
            | ErrorCode::InvalidUploadState
            | ErrorCode::InvalidBatchState
            | ErrorCode::FileInUse
            | ErrorCode::IdempotencyConflict
            | ErrorCode::SecretAlreadyShown
            | ErrorCode::InsufficientQuota
    )
}

/// The body of an error reply: all four keys, whatever their value.
pub(crate) fn wire(error: &ApiError) -> Value {
    json!({
        "error": {
            "message": error.message,
            "type": error.code.kind(),
            "param": error.param,
            "code": error.code,
        }
    })
}

/// `400 invalid_value` in the wording of core's hyperparameters.
pub(crate) fn invalid_value(name: &str, value: impl fmt::Display, rule: &str) -> ApiError {
    ApiError::new(
        ErrorCode::InvalidValue,
        format!("Invalid value for '{name}': {value}. It must be {rule}."),
    )
    .with_param(name)
}

/// The reply to a body that breaks off or is badly framed.
pub(crate) fn broken_body(cause: impl fmt::Display) -> ApiError {
    ApiError::new(
        ErrorCode::InvalidBody,
        format!("The request's body broke off or is badly framed ({cause}). Send it again."),
    )
}

/// OpenAI's reply to an id that is no file, or not one of the caller's.
pub(crate) fn no_such_file(id: &str) -> ApiError {
    ApiError::new(ErrorCode::FileNotFound, format!("No such File object: {id}")).with_param("id")
}

fn no_such_job(id: &str) -> ApiError {
    ApiError::new(ErrorCode::FineTuneNotFound, format!("Could not find fine tune: {id}"))
        .with_param("fine_tune_id")
}

pub(crate) fn no_such_model(name: &str) -> ApiError {
    ApiError::new(ErrorCode::NoSuchModel, format!("The model '{name}' does not exist"))
        .with_param("model")
}

/// The reply to a request that a served model would answer.
pub(crate) fn model_not_served(model: &str) -> ApiError {
    ApiError::new(
        ErrorCode::ModelNotServed,
        format!(
            "The model '{model}' is not served: no sampler is running. `tunesmith up` starts one \
             unless it is told not to; `tunesmith sampler` starts one beside an API that runs by \
             itself."
        ),
    )
    .with_param("model")
}

/// `400 missing_required_parameter`.
pub(crate) fn missing(name: &str) -> ApiError {
    ApiError::new(
        ErrorCode::MissingRequiredParameter,
        format!("Missing required parameter: '{name}'."),
    )
    .with_param(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use actix_web::body::to_bytes;

    #[actix_web::test]
    async fn an_error_reply_has_all_four_keys_even_without_a_parameter() {
        let reply = Failure::from(ApiError::new(ErrorCode::InvalidApiKey, "no")).error_response();
        assert_eq!(reply.status(), 401);
        let body = to_bytes(reply.into_body()).await.expect("body");
        assert_eq!(
            serde_json::from_slice::<Value>(&body).expect("json"),
            json!({"error": {
                "message": "no", "type": "invalid_request_error", "param": null,
                "code": "invalid_api_key",
            }})
        );
    }

    #[actix_web::test]
    async fn a_fault_of_ours_keeps_its_cause_from_the_client() {
        let failure = Failure::internal("password=hunter2");
        assert_eq!(failure.to_string(), "password=hunter2");
        let body = to_bytes(failure.error_response().into_body()).await.expect("body");
        assert!(!String::from_utf8_lossy(&body).contains("hunter2"));
    }

    #[test]
    fn a_conflict_that_no_retry_heals_says_so() {
        let reply = Failure::from(ApiError::new(ErrorCode::InvalidJobState, "no")).error_response();
        assert_eq!(reply.headers().get("x-should-retry").expect("header"), "false");
        let reply = Failure::from(ApiError::new(ErrorCode::Unavailable, "no")).error_response();
        assert!(reply.headers().get("x-should-retry").is_none());
    }
}
