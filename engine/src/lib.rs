//! tunesmith-engine: the only crate with burn in it.
//!
//! `ops` holds the few operations a decoder is made of, `models` composes them, `adapters` adds
//! LoRA, `optim` updates the trainable tensors, `data` lays rows out as batches, `preference`
//! compares pairs of answers, `train` is the loop with its checkpoints, `parallel` shares a step
//! among devices, `import` and `export` read and write other people's formats, `generate`
//! continues one sequence, and `serve` answers many requests at once. No SQL, no HTTP.

// The tests beside the code share their device with those under `tests`, which name the crate.
#[cfg(test)]
extern crate self as tunesmith_engine;

mod adapters;
pub mod batch;
pub mod child;
pub mod data;
pub mod device;
pub mod error;
pub mod export;
pub mod generate;
pub mod import;
pub mod model;
mod model_directory;
pub mod models;
mod ops;
pub mod optim;
pub mod parallel;
pub mod parameter;
mod pool;
pub mod preference;
pub mod sample;
pub mod serve;
pub mod train;

pub use batch::{Batch, BatchOutcome};
pub use device::Device;
pub use error::EngineError;
pub use model::{OptimizerState, TrainableModel};
pub use models::config::ModelConfig;
pub use ops::dropout::DropoutKey;
pub use ops::measure;
pub use optim::adamw::AdamWParams;
pub use parameter::NamedTensor;
