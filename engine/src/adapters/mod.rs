//! What trains beside frozen weights.

pub(crate) mod lora;
