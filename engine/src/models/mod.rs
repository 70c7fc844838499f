//! Decoder architectures, read from and named as Hugging Face has them.

pub mod config;
pub(crate) mod decoder;
mod families;
mod fields;
pub(crate) mod load;
pub(crate) mod recompute;
pub mod rope;
pub(crate) mod weights;
