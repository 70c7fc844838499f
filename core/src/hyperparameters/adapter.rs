//! What is trained: LoRA of a shape, or every weight.

use serde::{Deserialize, Serialize};

/// Which weights train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterType {
    /// Low-rank matrices beside frozen weights (Hu et al. 2021).
    #[default]
    Lora,
    /// Every weight of the model.
    Full,
}

/// The seven projections of a decoder layer, by Hugging Face's names.
pub const TARGET_MODULES: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// What is trained, and how a LoRA adapter is shaped. Field names and meanings are PEFT's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdapterConfig {
    /// LoRA or full fine-tuning.
    #[serde(rename = "type")]
    pub kind: AdapterType,
    /// Rank of the two matrices.
    pub r: usize,
    /// Numerator of the scale alpha / r.
    pub alpha: f64,
    /// Probability that an input of A is zeroed in training.
    pub dropout: f64,
    /// Which projections get an adapter, in the order of [`TARGET_MODULES`].
    pub target_modules: Vec<String>,
    /// Scale alpha / √r (rank-stabilised LoRA, Kalajdzievski 2023) in place of alpha / r.
    pub use_rslora: bool,
}

impl Default for AdapterConfig {
    fn default() -> Self {
        Self {
            kind: AdapterType::Lora,
            r: 16,
            alpha: 32.0,
            dropout: 0.0,
            target_modules: TARGET_MODULES.map(str::to_owned).to_vec(),
            use_rslora: false,
        }
    }
}

impl AdapterConfig {
    /// Full fine-tuning: no adapter.
    #[must_use]
    pub fn full() -> Self {
        Self { kind: AdapterType::Full, ..Self::default() }
    }

    /// The factor on B·A: alpha / r, or alpha / √r for rsLoRA.
    #[must_use]
    pub fn scale(&self) -> f64 {
        let rank = self.r as f64;
        if self.use_rslora { self.alpha / rank.sqrt() } else { self.alpha / rank }
    }
}
