//! The architecture in a GGUF's metadata → `config.json`.

use candle_core::quantized::gguf_file::Content;
use serde_json::{Value, json};

use super::metadata::Metadata;
use super::tokenizer::SpecialTokens;
use crate::error::EngineError;

/// The one architecture of this engine; also the prefix of its metadata keys.
const ARCHITECTURE: &str = "llama";

/// The shape of a Llama model.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Llama {
    pub(super) layers: usize,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) heads: usize,
    pub(super) key_value_heads: usize,
    pub(super) head_dim: usize,
    pub(super) vocabulary: usize,
    pub(super) context_length: u64,
    pub(super) rope_theta: f64,
    norm_epsilon: f64,
}

impl Llama {
    /// Reads the shape, refusing another architecture by its name.
    pub(super) fn read(metadata: &Metadata, content: &Content) -> Result<Self, EngineError> {
        let architecture = metadata.text("general.architecture")?;
        if architecture != ARCHITECTURE {
            return Err(metadata.error(format_args!(
                "the architecture is {architecture:?}: {ARCHITECTURE:?} is the one that can be \
                 trained"
            )));
        }
        if metadata.find_number("llama.expert_count")?.is_some_and(|experts| experts > 0) {
            return Err(
                metadata.error("a mixture of experts (llama.expert_count) cannot be trained")
            );
        }
        let size = |key: &str| -> Result<usize, EngineError> {
            Ok(metadata.number(&format!("{ARCHITECTURE}.{key}"))? as usize)
        };
        let hidden = size("embedding_length")?;
        let heads = size("attention.head_count")?;
        let key_value_heads =
            metadata.find_number("llama.attention.head_count_kv")?.map_or(heads, |n| n as usize);
        if heads == 0 || key_value_heads == 0 || !heads.is_multiple_of(key_value_heads) {
            return Err(metadata.error(format_args!(
                "{heads} attention heads cannot share {key_value_heads} key-value heads"
            )));
        }
        let head_dim = match metadata.find_number("llama.attention.key_length")? {
            Some(length) => length as usize,
            None => hidden / heads,
        };
        let rotated = metadata.find_number("llama.rope.dimension_count")?;
        if rotated.is_some_and(|dimensions| dimensions as usize != head_dim) {
            return Err(metadata.error(format_args!(
                "llama.rope.dimension_count is {} where a head has {head_dim} dimensions: partial \
                 rotation is not part of the Llama architecture",
                rotated.unwrap_or_default()
            )));
        }
        let embedding = content.tensor_infos.get("token_embd.weight").ok_or_else(|| {
            metadata.error("there is no tensor token_embd.weight, the token embedding")
        })?;
        Ok(Self {
            layers: size("block_count")?,
            hidden,
            intermediate: size("feed_forward_length")?,
            heads,
            key_value_heads,
            head_dim,
            vocabulary: embedding.shape.dims().first().copied().unwrap_or_default(),
            context_length: metadata.number("llama.context_length")?,
            rope_theta: metadata.find_real("llama.rope.freq_base")?.unwrap_or(10_000.0),
            norm_epsilon: metadata
                .find_real("llama.attention.layer_norm_rms_epsilon")?
                .ok_or_else(|| {
                    metadata
                        .error("the GGUF metadata has no llama.attention.layer_norm_rms_epsilon")
                })?,
        })
    }

    /// `config.json`, as Hugging Face's `LlamaConfig` reads it.
    pub(super) fn config_json(
        &self,
        special: &SpecialTokens,
        tied_head: bool,
        rope_scaling: &Value,
    ) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": special.bos,
            "eos_token_id": special.eos,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.context_length,
            "mlp_bias": false,
            "model_type": ARCHITECTURE,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.key_value_heads,
            "pad_token_id": special.pad,
            "rms_norm_eps": self.norm_epsilon,
            "rope_scaling": rope_scaling,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": tied_head,
            "torch_dtype": "float32",
            "use_cache": true,
            "vocab_size": self.vocabulary,
        })
    }
}
