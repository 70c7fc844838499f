//! The trainer from its request to its files, on tiny random models.

mod child;
mod combinations;
mod constrained;
#[path = "../support/device.rs"]
mod device;
mod export;
mod gguf;
mod import;
mod kill;
mod parallel;
mod portable;
mod preference;
#[path = "../support/rerun.rs"]
mod rerun;
mod resume;
mod start;
mod support;
mod training;
mod verdicts;
