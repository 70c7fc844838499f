//! The error table: each code once, with its HTTP status and its type.
//!
//! An [`ApiError`] is what a client reads, as a reply or as the `error` of a failed job.

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

macro_rules! error_table {
    ($($(#[doc = $doc:literal])* $name:ident = $code:literal, $status:literal, $kind:literal;)*) => {
        /// Every error code of the service.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum ErrorCode {
            $($(#[doc = $doc])* $name,)*
        }

        impl ErrorCode {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The code on the wire.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $code,)* }
            }

            /// The HTTP status of a reply with this code.
            #[must_use]
            pub const fn http_status(self) -> u16 {
                match self { $(Self::$name => $status,)* }
            }

            /// The `type` on the wire: the family of the error.
            #[must_use]
            pub const fn kind(self) -> &'static str {
                match self { $(Self::$name => $kind,)* }
            }

            /// What it means, in a sentence.
            #[must_use]
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),*).trim_ascii(),)* }
            }
        }
    };
}

error_table! {
    /// No key, or one that is not known.
    InvalidApiKey = "invalid_api_key", 401, "invalid_request_error";
    /// A parameter is missing.
    MissingRequiredParameter = "missing_required_parameter", 400, "invalid_request_error";
    /// A parameter has a value outside its range, or of a wrong type.
    InvalidValue = "invalid_value", 400, "invalid_request_error";
    /// The body is not what its content type says.
    InvalidBody = "invalid_body", 400, "invalid_request_error";
    /// No base model of that name.
    ModelNotFound = "model_not_found", 400, "invalid_request_error";
    /// No tuned or base model of that name (in a path).
    NoSuchModel = "no_such_model", 404, "invalid_request_error";
    /// No such file.
    FileNotFound = "file_not_found", 404, "invalid_request_error";
    /// No such upload.
    UploadNotFound = "upload_not_found", 404, "invalid_request_error";
    /// No such job.
    FineTuneNotFound = "fine_tune_not_found", 404, "invalid_request_error";
    /// No such path.
    UnknownUrl = "unknown_url", 404, "invalid_request_error";
    /// The path is there, but not for this method.
    MethodNotAllowed = "method_not_allowed", 405, "invalid_request_error";
    /// The job is in a state that forbids what was asked.
    InvalidJobState = "invalid_job_state", 400, "invalid_request_error";
    /// The upload has been completed or cancelled, or its hour is over.
    InvalidUploadState = "invalid_upload_state", 400, "invalid_request_error";
    /// A file in use cannot go.
    FileInUse = "file_in_use", 400, "invalid_request_error";
    /// The same idempotency key came with another body.
    IdempotencyConflict = "idempotency_conflict", 400, "invalid_request_error";
    /// The same idempotency key has made an API key before, whose secret was shown then alone.
    SecretAlreadyShown = "secret_already_shown", 400, "invalid_request_error";
    /// The body passes the size that the service takes.
    PayloadTooLarge = "payload_too_large", 413, "invalid_request_error";
    /// The range lies outside the content.
    RangeNotSatisfiable = "range_not_satisfiable", 416, "invalid_request_error";
    /// The grader cannot be computed by this server.
    GraderNotAvailable = "grader_not_available", 400, "invalid_request_error";
    /// The key is known, but not for this.
    InsufficientPermissions = "insufficient_permissions", 403, "invalid_request_error";
    /// No such permission to use a checkpoint.
    PermissionNotFound = "permission_not_found", 404, "invalid_request_error";
    /// No such project of the organisation.
    ProjectNotFound = "project_not_found", 404, "invalid_request_error";
    /// No such API key.
    ApiKeyNotFound = "api_key_not_found", 404, "invalid_request_error";
    /// No such webhook endpoint.
    WebhookEndpointNotFound = "webhook_endpoint_not_found", 404, "invalid_request_error";
    /// A webhook endpoint did not answer its test.
    WebhookNotReached = "webhook_not_reached", 400, "invalid_request_error";
    /// No such batch.
    BatchNotFound = "batch_not_found", 404, "invalid_request_error";
    /// The batch has ended.
    InvalidBatchState = "invalid_batch_state", 400, "invalid_request_error";
    /// No sampler runs that could answer with the model.
    ModelNotServed = "model_not_served", 503, "server_error";
    /// The sampler failed while it answered.
    SamplerFailed = "sampler_failed", 500, "server_error";
    /// Prompt and answer together do not fit into the model's context.
    ContextLengthExceeded = "context_length_exceeded", 400, "invalid_request_error";
    /// A parameter asks for what this server does not do.
    UnsupportedParameter = "unsupported_parameter", 400, "invalid_request_error";
    /// The weights are not there in that form.
    WeightsNotAvailable = "weights_not_available", 400, "invalid_request_error";
    /// The export differs from the served model, or cannot be opened.
    ExportCheckFailed = "export_check_failed", 400, "invalid_request_error";
    /// The export is being compared with the served model, which takes longer than a request waits.
    ExportBeingChecked = "export_being_checked", 503, "server_error";
    /// The export cannot be compared with the served model for now, and that was asked for.
    ExportNotChecked = "export_not_checked", 503, "server_error";
    /// The project sends more requests than it may for now.
    RateLimitExceeded = "rate_limit_exceeded", 429, "requests";
    /// The project has as much as it may.
    InsufficientQuota = "insufficient_quota", 429, "insufficient_quota";
    /// A fault of ours.
    Internal = "internal_error", 500, "server_error";
    /// The database or the store cannot be reached for now.
    Unavailable = "service_unavailable", 503, "server_error";

    /// A job's training file has too few examples.
    InvalidNExamples = "invalid_n_examples", 400, "invalid_request_error";
    /// A row of a job's file breaks a rule.
    InvalidFileFormat = "invalid_file_format", 400, "invalid_request_error";
    /// A job's file is gone.
    InvalidTrainingFile = "invalid_training_file", 400, "invalid_request_error";
    /// The loss or a gradient was no longer a number.
    NonFiniteLoss = "non_finite_loss", 400, "invalid_request_error";
    /// The loss leapt far above what it was.
    LossSpike = "loss_spike", 400, "invalid_request_error";
    /// The job does not fit into the worker's memory.
    OutOfMemory = "out_of_memory", 400, "invalid_request_error";
    /// Workers were lost again and again without progress.
    WorkerLost = "worker_lost", 500, "server_error";
    /// The trainer stopped with an error that is a fault of ours.
    TrainerFailed = "trainer_failed", 500, "server_error";
}

impl ErrorCode {
    /// The code that `word` names.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| code.as_str() == word)
    }
}

impl Serialize for ErrorCode {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for ErrorCode {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let word = String::deserialize(deserializer)?;
        Self::parse(&word)
            .ok_or_else(|| serde::de::Error::custom(format!("unknown error code {word}")))
    }
}

impl JsonSchema for ErrorCode {
    fn schema_name() -> Cow<'static, str> {
        "ErrorCode".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let codes: Vec<&str> = Self::ALL.iter().map(|code| code.as_str()).collect();
        json_schema!({ "type": "string", "enum": codes })
    }
}

/// An error as a client reads it. The message names the place, the rule and the way out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Which error of the table.
    pub code: ErrorCode,
    /// For a person.
    pub message: String,
    /// The parameter at fault, by its path in the request.
    pub param: Option<String>,
}

impl ApiError {
    /// An error without a parameter.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), param: None }
    }

    /// The same, with the parameter at fault.
    #[must_use]
    pub fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_parses_back_and_no_code_stands_twice() {
        for (index, &code) in ErrorCode::ALL.iter().enumerate() {
            assert_eq!(ErrorCode::parse(code.as_str()), Some(code));
            assert!(!ErrorCode::ALL[..index].iter().any(|c| c.as_str() == code.as_str()));
            assert!((400..600).contains(&code.http_status()));
            assert!(code.meaning().ends_with('.'), "{}", code.meaning());
        }
    }
}
