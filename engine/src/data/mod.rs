//! Rows → the batches of each step.

pub mod batching;
pub mod sampler;
