//! Answering with one base model and many adapters of it.
//!
//! [`batcher`] computes the answers of all requests side by side, [`choice`] draws their tokens,
//! [`prefixes`] keeps the caches of prompts that may come again, and [`child`] is the process that
//! a sampler talks to.

mod batcher;
mod child;
mod choice;
mod model;
mod prefixes;

pub use batcher::Batcher;
pub use child::run_sampler;
pub use model::ServedModel;
