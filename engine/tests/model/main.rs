//! Whole models: SmolLM2-135M-Instruct and Gemma 3 270M against references of PyTorch, and tiny
//! random models for what must hold of any model.

mod adapters;
#[path = "../support/device.rs"]
mod device;
mod families;
mod gemma3;
mod invariants;
mod loading;
mod parallel;
mod portable;
mod precision;
mod preference;
mod quantization;
mod reference;
mod reference_training;
#[path = "../support/rerun.rs"]
mod rerun;
mod serving;
mod support;
mod threads;
