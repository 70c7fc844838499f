//! Answering with one base model and many adapters of it.
//!
//! [`batcher`] computes the answers of all requests side by side, [`choice`] draws their tokens,
//! [`constraint`] says which tokens may be drawn where an answer must be JSON, [`prefixes`] keeps the
//! caches of prompts that may come again, [`check`] compares an export with what is served, and
//! [`child`] is the process that a sampler talks to.

mod batcher;
mod check;
mod child;
mod choice;
mod comparison;
mod constraint;
mod model;
mod prefixes;

pub use batcher::Batcher;
pub use child::run_sampler;
pub use model::ServedModel;
