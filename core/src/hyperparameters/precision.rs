//! In which numbers a run computes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The numbers that products with the base model's matrices multiply; sums are in f32 in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// The worker's device decides: bf16 where it multiplies bf16, else f32.
    #[default]
    Auto,
    /// Frozen matrices and the inputs of products in bf16; what trains stays f32.
    Bf16,
    /// Everything in f32.
    Fp32,
}

impl Precision {
    /// That of every run that was recorded before there was a choice.
    #[must_use]
    pub fn before_there_was_a_choice() -> Self {
        Self::Fp32
    }
}
