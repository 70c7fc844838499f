//! Whole models: SmolLM2-135M-Instruct against references of PyTorch, and tiny random models for
//! what must hold of any model.

mod families;
mod invariants;
mod loading;
mod reference;
mod reference_training;
mod support;
