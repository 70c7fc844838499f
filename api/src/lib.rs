//! tunesmith-api: the REST front-end.
//!
//! OpenAI's fine-tuning contract over actix-web, the page of a job, and the task that validates
//! uploaded files. [`ApiServer`] is all of it on one address.

mod adapter_file;
mod archive;
mod auth;
mod background;
mod batches;
mod body;
mod estimate;
mod exports;
mod failure;
mod fields;
mod file_reports;
mod form;
mod gguf;
mod head;
mod idempotency;
mod job_request;
mod limits;
mod live;
mod maintenance;
mod merged;
mod model_source;
mod observe;
mod page;
mod query;
mod range;
mod redirect;
mod routes;
mod server;
mod serving;
mod stored;
mod streaming;
mod telemetry;
mod tensor_file;
#[cfg(test)]
mod testing;
mod tokenizers;
#[cfg(feature = "otel")]
mod trace_context;
mod validator;
mod warnings;
mod webhooks;

pub use estimate::Prices;
pub use limits::ProjectLimits;
pub use routes::openapi_yaml;
pub use server::{ApiConfig, ApiServer, DEFAULT_MAX_FILE_BYTES};
pub use webhooks::IpNet;
