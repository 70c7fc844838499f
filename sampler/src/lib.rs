//! tunesmith-sampler: answers with models.
//!
//! A sampler takes prompts as token ids from front-ends ([`tunesmith_core::serving`]) and gives
//! tokens back. It keeps each model in a child process of its own
//! ([`tunesmith_core::sampling`]), which a crash or an out-of-memory kill can take without the
//! service, and is found by front-ends through the database. Knows neither text nor how a model
//! computes.

mod adapters;
mod check;
mod config;
mod fetch;
mod http;
mod model;
mod models;
mod sampler;

pub use config::{
    DEFAULT_CACHE_BYTES, DEFAULT_MAX_ADAPTERS, DEFAULT_MAX_BATCH, DEFAULT_MAX_MODELS,
    DEFAULT_MAX_ORDERS, SamplerConfig,
};
pub use sampler::{Sampler, SamplerError};
