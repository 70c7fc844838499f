//! `config.json` of a Hugging Face model directory, checked: what this engine cannot compute
//! exactly is refused by name, never approximated.
//!
//! Both spellings of the rotary embedding are read, that of transformers 4 (`rope_theta` and
//! `rope_scaling`) and that of transformers 5 (`rope_parameters`).

use std::path::Path;

use serde_json::{Map, Value};
use tunesmith_core::memory::ModelSize;

use super::families::{Bias, Gemma};
use super::fields::{Fields, refuse};
use super::rope::Rope;
use crate::error::EngineError;

#[cfg(test)]
mod tests;

/// Architecture of a decoder. Field names are Hugging Face's where it has one.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub model_type: String,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the gated feed-forward block.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads, each shared by a group of query heads.
    pub num_key_value_heads: usize,
    /// Width of one head; `head_dim · num_attention_heads` need not be `hidden_size`.
    pub head_dim: usize,
    /// ε of the RMS norms.
    pub rms_norm_eps: f64,
    /// Whether the factor of a norm is 1 + w for its weight w.
    pub unit_offset_norm: bool,
    /// Whether the outputs of attention and of the feed-forward block are normalised too.
    pub post_norms: bool,
    /// Factor on the embeddings.
    pub embedding_scale: f64,
    /// The rotary embedding.
    pub rope: Rope,
    /// That of the layers with a window, where it is another.
    pub sliding_rope: Option<Rope>,
    /// For each layer how many tokens a query sees, its own included; None for all before it.
    pub sliding_windows: Vec<Option<usize>>,
    /// Longest sequence the model was made for, or whose rotation is computed.
    pub max_position_embeddings: usize,
    /// Whether the output head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// The padding token, whose embedding takes no gradient from being an input, as in Hugging
    /// Face's models. Nothing is padded here, but it may also be a real token.
    pub pad_token_id: Option<u32>,
    /// Whether the projections to queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// Whether the projection out of attention has a bias.
    pub output_bias: bool,
    /// Whether the projections of the feed-forward block have a bias.
    pub feed_forward_bias: bool,
    /// Whether queries and keys are normalised head by head before they are rotated.
    pub head_norm: bool,
    /// The gate of the feed-forward block.
    pub activation: Activation,
    /// Factor on the products of queries and keys.
    pub attention_scale: f64,
    /// c of c·tanh(s / c) over the scores of attention.
    pub attn_logit_softcapping: Option<f64>,
    /// The same over the logits.
    pub final_logit_softcapping: Option<f64>,
    /// Whether q, k and v are stored as one `qkv_proj`, gate and up as one `gate_up_proj`.
    pub fused_projections: bool,
}

/// The activation of a gate, by Hugging Face's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `silu`: x·σ(x).
    Silu,
    /// `gelu_pytorch_tanh`: the tanh form of GELU (Hendrycks and Gimpel 2016).
    GeluTanh,
}

impl ModelConfig {
    /// The sizes that memory depends on.
    #[must_use]
    pub fn size(&self) -> ModelSize {
        ModelSize {
            vocab_size: self.vocab_size as u64,
            hidden_size: self.hidden_size as u64,
            intermediate_size: self.intermediate_size as u64,
            num_hidden_layers: self.num_hidden_layers as u64,
            query_width: (self.num_attention_heads * self.head_dim) as u64,
            key_value_width: (self.num_key_value_heads * self.head_dim) as u64,
            tie_word_embeddings: self.tie_word_embeddings,
        }
    }

    /// Reads `config.json` in `dir`.
    ///
    /// # Errors
    /// [`EngineError::Io`] when the file cannot be read, else as [`ModelConfig::parse`].
    pub fn read(dir: &Path) -> Result<Self, EngineError> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(EngineError::io(&path))?;
        Self::parse(&text)
    }

    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// [`EngineError::Model`] naming what is missing, malformed or not supported.
    pub fn parse(text: &str) -> Result<Self, EngineError> {
        let fields: Map<String, Value> =
            serde_json::from_str(text).or_else(|error| refuse(error.to_string()))?;
        let fields = Fields(&fields);
        let family = fields.family()?;
        fields.refuse_unsupported(&family)?;

        let hidden_size = fields.size("hidden_size")?;
        let heads = fields.size("num_attention_heads")?;
        let num_key_value_heads = match fields.0.get("num_key_value_heads") {
            None => family.num_key_value_heads.unwrap_or(heads),
            Some(Value::Null) => heads,
            Some(_) => fields.size("num_key_value_heads")?,
        };
        if !heads.is_multiple_of(num_key_value_heads) {
            return refuse(format!(
                "num_attention_heads {heads} is not a multiple of \
                 num_key_value_heads {num_key_value_heads}"
            ));
        }
        let head_dim = fields.head_dim(&family, hidden_size, heads)?;
        let num_hidden_layers = fields.size("num_hidden_layers")?;
        let max_position_embeddings = fields
            .optional_size("max_position_embeddings")?
            .unwrap_or(family.max_position_embeddings);
        let bias = |bias: Bias| -> Result<bool, EngineError> {
            match bias {
                Bias::Never => Ok(false),
                Bias::Always => Ok(true),
                Bias::Field(name) => fields.flag(name, false),
            }
        };
        let attention_scale = match family.gemma {
            None => 1.0 / (head_dim as f64).sqrt(),
            Some(Gemma { query_pre_attn_scalar, .. }) => {
                let scalar = fields.number("query_pre_attn_scalar")?;
                1.0 / scalar.unwrap_or(query_pre_attn_scalar).sqrt()
            }
        };
        let softcap = |name: &str, default: fn(Gemma) -> Option<f64>| match family.gemma {
            None => Ok(None),
            Some(gemma) if !fields.0.contains_key(name) => Ok(default(gemma)),
            Some(_) => fields.number(name),
        };
        let (rope, sliding_rope) = fields.ropes(&family, head_dim, max_position_embeddings)?;
        let longest = rope.longest_sequence().unwrap_or(max_position_embeddings);
        let longest = longest.min(max_position_embeddings);
        Ok(Self {
            model_type: family.model_type.to_owned(),
            vocab_size: fields.size("vocab_size")?,
            hidden_size,
            intermediate_size: fields.size("intermediate_size")?,
            num_hidden_layers,
            num_attention_heads: heads,
            num_key_value_heads,
            head_dim,
            rms_norm_eps: fields.number("rms_norm_eps")?.unwrap_or(family.rms_norm_eps),
            unit_offset_norm: family.gemma.is_some(),
            post_norms: family.gemma.is_some(),
            embedding_scale: family.gemma.map_or(1.0, |_| (hidden_size as f64).sqrt()),
            rope,
            sliding_rope,
            sliding_windows: fields.sliding_windows(&family, num_hidden_layers)?,
            max_position_embeddings: longest,
            tie_word_embeddings: fields.flag("tie_word_embeddings", family.tie_word_embeddings)?,
            pad_token_id: match fields.0.get("pad_token_id") {
                None => family.pad_token_id,
                // Negative for none in some old files.
                Some(id) => id.as_u64().and_then(|id| u32::try_from(id).ok()),
            },
            qkv_bias: bias(family.qkv_bias)?,
            output_bias: bias(family.output_bias)?,
            feed_forward_bias: bias(family.feed_forward_bias)?,
            head_norm: family.head_norm,
            activation: fields.activation(&family)?,
            attention_scale,
            attn_logit_softcapping: softcap("attn_logit_softcapping", |gemma| {
                gemma.attn_logit_softcapping
            })?,
            final_logit_softcapping: softcap("final_logit_softcapping", |gemma| {
                gemma.final_logit_softcapping
            })?,
            fused_projections: family.fused_projections,
        })
    }
}
