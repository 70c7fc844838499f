//! The trainer from its request to its files, on tiny random models.

mod child;
mod export;
mod gguf;
mod import;
mod resume;
mod support;
mod training;
