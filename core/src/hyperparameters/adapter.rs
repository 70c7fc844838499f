//! What is trained: LoRA of a shape, or every weight.

use std::ops::Range;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which weights train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AdapterType {
    /// Low-rank matrices beside frozen weights (Hu et al. 2021).
    #[default]
    Lora,
    /// Every weight of the model.
    Full,
}

/// Where A and B start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum InitLoraWeights {
    /// A random, B zero.
    #[default]
    Default,
    /// From the weight's leading singular triplets, which the frozen weight gives up in exchange
    /// (PiSSA, Meng et al. 2024).
    Pissa,
}

/// How the frozen weights of the projections are kept while an adapter trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Quantization {
    /// As numbers.
    #[default]
    None,
    /// In blocks of 64 whole numbers of 8 bits with one scale: 8.5 bits a weight.
    Int8,
    /// In blocks of 64 codes of 16 normal quantiles with one scale (QLoRA, Dettmers et al. 2023):
    /// 4.5 bits a weight.
    Nf4,
}

impl Quantization {
    /// Bits that a weight takes, its share of the scale included; None for numbers.
    #[must_use]
    pub fn bits(self) -> Option<f64> {
        match self {
            Self::None => None,
            Self::Int8 => Some(8.5),
            Self::Nf4 => Some(4.5),
        }
    }
}

/// The seven projections of a decoder layer, by Hugging Face's names.
pub const TARGET_MODULES: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Modules of models that store several projections as one, such as Phi-3: their names in Hugging
/// Face's code and in PEFT's, and the positions in [`TARGET_MODULES`] of what they hold.
const FUSED_MODULES: [(&str, Range<usize>); 2] = [("qkv_proj", 0..3), ("gate_up_proj", 4..6)];

/// The positions in [`TARGET_MODULES`] of what the module `name` of a model holds: one for a
/// projection, several for one of the modules `qkv_proj` and `gate_up_proj`, none for another name.
#[must_use]
pub fn target_modules_of(name: &str) -> Range<usize> {
    let single = TARGET_MODULES.iter().position(|module| *module == name);
    let fused = || FUSED_MODULES.into_iter().find(|(module, _)| *module == name);
    single.map(|index| index..index + 1).or_else(|| Some(fused()?.1)).unwrap_or_default()
}

/// The module of [`target_modules_of`] that holds the projection `target` and others, if there is
/// one.
#[must_use]
pub fn fused_module_of(target: &str) -> Option<&'static str> {
    let index = TARGET_MODULES.iter().position(|module| *module == target)?;
    FUSED_MODULES.into_iter().find(|(_, held)| held.contains(&index)).map(|(module, _)| module)
}

/// What is trained, and how a LoRA adapter is shaped. Field names and meanings are PEFT's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
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
    /// Which projections get an adapter, in the order of a layer.
    pub target_modules: Vec<String>,
    /// Scale alpha / √r (rank-stabilised LoRA, Kalajdzievski 2023) in place of alpha / r.
    pub use_rslora: bool,
    /// Weight decomposition (DoRA, Liu et al. 2024): W + s·B·A gives the direction of each output's
    /// row, and a magnitude of its own, which trains, the length.
    pub use_dora: bool,
    /// Where A and B start. The adapter of a job with `pissa` has twice the rank, so that it goes on
    /// the original base model, as PEFT converts it.
    pub init_lora_weights: InitLoraWeights,
    /// Learning rate of B as a multiple of that of A (LoRA+, Hayou et al. 2024); 1 for plain LoRA.
    pub loraplus_lr_ratio: f64,
    /// Only the last so many decoder layers train: their adapters, or with full fine-tuning their
    /// weights and those of the final norm, while embedding and head are frozen. 0 for all.
    pub trainable_layers: usize,
    /// How the frozen weights of the projections are kept. The adapter learns beside the quantised
    /// weights, and goes on these or on the original ones.
    pub quantization: Quantization,
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
            use_dora: false,
            init_lora_weights: InitLoraWeights::Default,
            loraplus_lr_ratio: 1.0,
            trainable_layers: 0,
            quantization: Quantization::None,
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

    /// The shape of the adapter that the job gives: with PiSSA a plain LoRA of twice the rank and
    /// the same scale, whose A is A over A₀ and whose B is B beside −B₀.
    #[must_use]
    pub fn exported(&self) -> Self {
        match self.init_lora_weights {
            InitLoraWeights::Default => self.clone(),
            InitLoraWeights::Pissa => Self {
                r: 2 * self.r,
                alpha: self.alpha * if self.use_rslora { 2f64.sqrt() } else { 2.0 },
                init_lora_weights: InitLoraWeights::Default,
                ..self.clone()
            },
        }
    }

    /// The first decoder layer that trains, in a model of `layers` layers.
    #[must_use]
    pub fn first_trained_layer(&self, layers: usize) -> usize {
        if self.trainable_layers == 0 { 0 } else { layers.saturating_sub(self.trainable_layers) }
    }

    /// What is wrong with `trainable_layers` in a model of `layers` layers, as a rule.
    #[must_use]
    pub fn too_many_layers(&self, layers: usize) -> Option<String> {
        (self.trainable_layers > layers).then(|| {
            format!(
                "{layers} or less, as the base model has {layers} layers, or 0 to train all of them"
            )
        })
    }

    /// A setting that means nothing or cannot be computed beside the others: its name, and what it must be.
    pub(super) fn misplaced(&self) -> Option<(&'static str, &'static str)> {
        match self.kind {
            AdapterType::Full if self.use_dora => {
                Some(("use_dora", "left out beside \"type\": \"full\", which has no adapter"))
            }
            AdapterType::Full if self.init_lora_weights != InitLoraWeights::Default => Some((
                "init_lora_weights",
                "left out beside \"type\": \"full\", which has no adapter",
            )),
            AdapterType::Full if self.quantization != Quantization::None => Some((
                "quantization",
                "\"none\" beside \"type\": \"full\": quantized weights are frozen, and only an adapter \
                 beside them can train; set \"type\": \"lora\", or leave quantization out",
            )),
            AdapterType::Lora
                if self.init_lora_weights == InitLoraWeights::Pissa
                    && self.quantization != Quantization::None =>
            {
                Some((
                    "init_lora_weights",
                    "\"default\" beside quantization: with PiSSA the quantized weights would be what \
                     it leaves of the base model's, and no base model elsewhere has those to put the \
                     adapter on; leave one of the two out",
                ))
            }
            AdapterType::Lora
                if self.init_lora_weights == InitLoraWeights::Pissa && self.use_dora =>
            {
                Some((
                    "init_lora_weights",
                    "\"default\" beside use_dora: what PiSSA takes from the weights could not be \
                     given back exactly to the original base model",
                ))
            }
            AdapterType::Full if self.loraplus_lr_ratio != 1.0 => Some((
                "loraplus_lr_ratio",
                "left out beside \"type\": \"full\", which has no A and B",
            )),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fused_modules_hold_their_projections() {
        assert_eq!(TARGET_MODULES[target_modules_of("qkv_proj")], ["q_proj", "k_proj", "v_proj"]);
        assert_eq!(TARGET_MODULES[target_modules_of("gate_up_proj")], ["gate_proj", "up_proj"]);
        assert_eq!(TARGET_MODULES[target_modules_of("o_proj")], ["o_proj"]);
        assert!(target_modules_of("lm_head").is_empty());
        assert_eq!(fused_module_of("k_proj"), Some("qkv_proj"));
        assert_eq!(fused_module_of("o_proj"), None);
    }
}
