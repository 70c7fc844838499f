//! What trains beside frozen weights.

pub(crate) mod lora;
pub(crate) mod pissa;
