//! tunesmith-core: the words that every other crate shares.
//!
//! Ids, the states of a job and the moves between them, the error table, hyperparameters with
//! their ranges, what a worker says to its trainer, the layout of weights, how much memory a run needs, and `dataset`, which
//! turns uploaded files into tokens with loss weights. Pure: no async, no sockets, no SQL, no burn.

pub mod dataset;
pub mod diagnosis;
pub mod errors;
pub mod export_check;
pub mod gguf;
pub mod graders;
pub mod hyperparameters;
pub mod ids;
pub mod job;
pub mod memory;
pub mod metrics;
pub mod protocol;
pub mod sampling;
pub mod serving;
pub mod spans;
pub mod state;
pub mod weights;
