//! tunesmith-worker: takes a job, keeps its lease, runs the trainer, writes what comes of it.
//!
//! The trainer is a child process that speaks [`tunesmith_core::protocol`]: a CUDA abort or an
//! out-of-memory kill takes the child and never the worker. Every write is fenced by the lease of
//! `tunesmith_store`, so a worker that has lost a job can change nothing of it. Knows neither SQL
//! nor how training works.

mod checkpoints;
mod child;
mod config;
mod lease;
mod let_go;
mod messages;
mod model_cache;
mod prepare;
mod reporter;
mod results;
mod retry;
mod session;
mod trainer;
mod transfer;
mod work_dir;
mod worker;

pub use child::{ChildCommand, ChildError, Exit, FramedChild};
pub use config::WorkerConfig;
pub use model_cache::{CachedModel, DEFAULT_TUNED_CACHE_BYTES, ModelCache};
pub use transfer::{TransferError, fetch_dir};
pub use work_dir::WorkDir;
pub use worker::{Worker, WorkerError};
