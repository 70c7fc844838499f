//! What sets the families of decoders apart: one row each, in Hugging Face's words.
//!
//! A row says what a family's `config.json` may leave out, as its configuration class has it, and
//! what its modelling code does without being told by a field.

use super::config::Activation;

/// A family, by the `model_type` of its `config.json`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Family {
    pub(super) model_type: &'static str,
    pub(super) rms_norm_eps: f64,
    pub(super) max_position_embeddings: usize,
    pub(super) tie_word_embeddings: bool,
    pub(super) pad_token_id: Option<u32>,
    /// None for as many as query heads.
    pub(super) num_key_value_heads: Option<usize>,
    /// None for `hidden_size / num_attention_heads`.
    pub(super) head_dim: Option<usize>,
    /// The field of the activation, and its default.
    pub(super) activation: (&'static str, Activation),
    pub(super) qkv_bias: Bias,
    pub(super) output_bias: Bias,
    pub(super) feed_forward_bias: Bias,
    /// Whether queries and keys are normalised head by head.
    pub(super) head_norm: bool,
    pub(super) windows: Windows,
    pub(super) sliding_window: Option<usize>,
    /// Whether layers of a window have a rotary embedding of their own.
    pub(super) sliding_rope: bool,
    /// Whether q, k and v are stored as one `qkv_proj`, gate and up as one `gate_up_proj`.
    pub(super) fused_projections: bool,
    /// Whether only a part of a head may turn, and `su` and `yarn` are older names of `longrope`,
    /// whose original context is a field of the config.
    pub(super) phi3_rope: bool,
    pub(super) gemma: Option<Gemma>,
}

/// What Gemma's models do beyond others: norms with a factor of 1 + w, also behind attention and
/// feed-forward block, embeddings times the root of their width, and scores scaled by a field.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Gemma {
    pub(super) query_pre_attn_scalar: f64,
    /// None for a family that ignores the field.
    pub(super) attn_logit_softcapping: Option<f64>,
    pub(super) final_logit_softcapping: Option<f64>,
}

/// Whether projections have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bias {
    Never,
    Always,
    /// As a field says, which is false when absent.
    Field(&'static str),
}

/// Which layers attend within `sliding_window` only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Windows {
    /// None, whatever the file says.
    Never,
    /// All, where there is a window.
    AllLayers,
    /// With `use_sliding_window`, those of `layer_types`, or from `max_window_layers` on.
    UpperLayers {
        /// Default of `max_window_layers`.
        max_window_layers: usize,
    },
    /// Those of `layer_types`, or all but each one whose number divides by a pattern.
    Pattern {
        /// Default of `sliding_window_pattern`.
        sliding_window_pattern: usize,
        /// Whether the file may have that field.
        is_field: bool,
    },
}

/// Llama 2 and 3.x (Touvron et al. 2023), and all that is saved as one.
const LLAMA: Family = Family {
    model_type: "llama",
    rms_norm_eps: 1e-6,
    max_position_embeddings: 2048,
    tie_word_embeddings: false,
    pad_token_id: None,
    num_key_value_heads: None,
    head_dim: None,
    activation: ("hidden_act", Activation::Silu),
    qkv_bias: Bias::Field("attention_bias"),
    output_bias: Bias::Field("attention_bias"),
    feed_forward_bias: Bias::Field("mlp_bias"),
    head_norm: false,
    windows: Windows::Never,
    sliding_window: None,
    sliding_rope: false,
    fused_projections: false,
    phi3_rope: false,
    gemma: None,
};

/// Mistral 7B (Jiang et al. 2023) and its successors of the same `model_type`.
const MISTRAL: Family = Family {
    model_type: "mistral",
    max_position_embeddings: 131_072,
    num_key_value_heads: Some(8),
    qkv_bias: Bias::Never,
    output_bias: Bias::Never,
    feed_forward_bias: Bias::Never,
    windows: Windows::AllLayers,
    sliding_window: Some(4096),
    ..LLAMA
};

/// Qwen2 and Qwen2.5 (Yang et al. 2024).
const QWEN2: Family = Family {
    model_type: "qwen2",
    max_position_embeddings: 32_768,
    num_key_value_heads: Some(32),
    qkv_bias: Bias::Always,
    output_bias: Bias::Never,
    feed_forward_bias: Bias::Never,
    windows: Windows::UpperLayers { max_window_layers: 28 },
    sliding_window: Some(4096),
    ..LLAMA
};

/// Qwen3 (Yang et al. 2025).
const QWEN3: Family = Family {
    model_type: "qwen3",
    head_dim: Some(128),
    qkv_bias: Bias::Field("attention_bias"),
    output_bias: Bias::Field("attention_bias"),
    head_norm: true,
    ..QWEN2
};

/// Gemma 2 (Gemma Team 2024).
const GEMMA2: Family = Family {
    model_type: "gemma2",
    max_position_embeddings: 8192,
    tie_word_embeddings: true,
    pad_token_id: Some(0),
    num_key_value_heads: Some(4),
    head_dim: Some(256),
    activation: ("hidden_activation", Activation::GeluTanh),
    feed_forward_bias: Bias::Never,
    windows: Windows::Pattern { sliding_window_pattern: 2, is_field: false },
    sliding_window: Some(4096),
    gemma: Some(Gemma {
        query_pre_attn_scalar: 256.0,
        attn_logit_softcapping: Some(50.0),
        final_logit_softcapping: Some(30.0),
    }),
    ..LLAMA
};

/// The text model of Gemma 3 (Gemma Team 2025).
const GEMMA3: Family = Family {
    model_type: "gemma3_text",
    max_position_embeddings: 131_072,
    head_norm: true,
    windows: Windows::Pattern { sliding_window_pattern: 6, is_field: true },
    sliding_rope: true,
    gemma: Some(Gemma {
        query_pre_attn_scalar: 256.0,
        attn_logit_softcapping: None,
        final_logit_softcapping: None,
    }),
    ..GEMMA2
};

/// Phi-3 and Phi-4 (Abdin et al. 2024).
const PHI3: Family = Family {
    model_type: "phi3",
    rms_norm_eps: 1e-5,
    max_position_embeddings: 4096,
    pad_token_id: Some(32_000),
    qkv_bias: Bias::Never,
    output_bias: Bias::Never,
    feed_forward_bias: Bias::Never,
    windows: Windows::AllLayers,
    fused_projections: true,
    phi3_rope: true,
    ..LLAMA
};

const FAMILIES: [Family; 7] = [LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3];

/// The family of a `model_type`.
pub(super) fn find(model_type: &str) -> Option<Family> {
    FAMILIES.into_iter().find(|family| family.model_type == model_type)
}

/// Every `model_type` there is, for messages.
pub(super) fn names() -> String {
    FAMILIES.map(|family| family.model_type).join(", ")
}
