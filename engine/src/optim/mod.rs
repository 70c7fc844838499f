//! From gradients to new weights: global norm, the optimisers, and the learning rate of each step.

mod adafactor;
pub mod adamw;
pub mod gradient_norm;
mod muon;
pub(crate) mod optimizer;
pub mod schedule;
