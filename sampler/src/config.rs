//! What a sampler is told at its start.

use std::path::PathBuf;
use std::time::Duration;
use tunesmith_core::hyperparameters::Precision;
use tunesmith_worker::{ChildCommand, DEFAULT_TUNED_CACHE_BYTES};

/// [`SamplerConfig::max_models`] unless it is told.
pub const DEFAULT_MAX_MODELS: usize = 1;
/// [`SamplerConfig::max_adapters`] unless it is told.
pub const DEFAULT_MAX_ADAPTERS: usize = 32;
/// [`SamplerConfig::max_batch`] unless it is told.
pub const DEFAULT_MAX_BATCH: usize = 16;
/// [`SamplerConfig::cache_bytes`] unless it is told.
pub const DEFAULT_CACHE_BYTES: u64 = 1 << 30;
/// [`SamplerConfig::max_orders`] unless it is told.
pub const DEFAULT_MAX_ORDERS: usize = 256;

/// How a sampler works. Made with [`SamplerConfig::new`], then changed field by field.
#[derive(Debug, Clone)]
pub struct SamplerConfig {
    /// `host:port` for orders of front-ends; port 0 takes a free one.
    pub listen: String,
    /// How front-ends reach it, as `http://host:port`; where it listens, unless it is told.
    pub url: Option<String>,
    /// Base models are kept here, under `models/{id}`; workers and samplers may share it.
    pub cache_dir: PathBuf,
    /// Bytes of it that models which were tuned in full take at most as base models of adapters, but
    /// for those in use.
    pub tuned_cache_bytes: u64,
    /// Weights of tuned models on their way into memory. Nothing in it outlives the process by
    /// more than the start of the next one.
    pub work_dir: PathBuf,
    /// The device of its children: `auto`, `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// The numbers that products multiply.
    pub precision: Precision,
    /// The program that answers.
    pub child: ChildCommand,
    /// Models in memory at a time, each in a child of its own. The one that was asked last stays
    /// longest.
    pub max_models: usize,
    /// Adapters that a child holds at a time. The one that was asked last stays longest.
    pub max_adapters: usize,
    /// Answers that a child computes side by side.
    pub max_batch: usize,
    /// Memory of a child for the keys and values of running answers and of prompts that may come
    /// again.
    pub cache_bytes: u64,
    /// Orders that it takes at a time, those that wait included. One more is refused.
    pub max_orders: usize,
    /// How long orders that are under way may still take when it is told to stop.
    pub stop_grace: Duration,
}

impl SamplerConfig {
    /// The usual bounds, with the given places and child.
    #[must_use]
    pub fn new(
        listen: impl Into<String>,
        cache_dir: impl Into<PathBuf>,
        work_dir: impl Into<PathBuf>,
        device: impl Into<String>,
        child: ChildCommand,
    ) -> Self {
        Self {
            listen: listen.into(),
            url: None,
            cache_dir: cache_dir.into(),
            tuned_cache_bytes: DEFAULT_TUNED_CACHE_BYTES,
            work_dir: work_dir.into(),
            device: device.into(),
            precision: Precision::Auto,
            child,
            max_models: DEFAULT_MAX_MODELS,
            max_adapters: DEFAULT_MAX_ADAPTERS,
            max_batch: DEFAULT_MAX_BATCH,
            cache_bytes: DEFAULT_CACHE_BYTES,
            max_orders: DEFAULT_MAX_ORDERS,
            stop_grace: Duration::from_secs(30),
        }
    }
}
