//! From gradients to new weights: global norm, AdamW, and the learning rate of each step.

pub mod adamw;
pub mod gradient_norm;
pub mod schedule;
