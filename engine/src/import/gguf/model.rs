//! The architecture in a GGUF's metadata → `config.json`.

use serde_json::{Value, json};

use super::file::GgufFile;
use super::metadata::Metadata;
use super::tokenizer::SpecialTokens;
use crate::error::EngineError;

/// Divisors of the rotary frequencies, which Hugging Face keeps as parameters of a formula.
pub(super) const ROPE_FREQUENCIES: &str = "rope_freqs.weight";
/// The two tables of Phi-3's long-context models, which Hugging Face keeps in the config.
pub(super) const LONG_FACTORS: &str = "rope_factors_long.weight";
pub(super) const SHORT_FACTORS: &str = "rope_factors_short.weight";

/// Gemma's local layers turn at this base; only new files say so.
const GEMMA_LOCAL_THETA: f64 = 10_000.0;

/// A family by the name that GGUF has for it, which also prefixes its metadata keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// Llama, and Mistral, which is the same computation.
    Llama,
    Qwen2,
    Qwen3,
    Gemma2,
    Gemma3,
    Phi3,
}

const FAMILIES: [(Family, &str); 6] = [
    (Family::Llama, "llama"),
    (Family::Qwen2, "qwen2"),
    (Family::Qwen3, "qwen3"),
    (Family::Gemma2, "gemma2"),
    (Family::Gemma3, "gemma3"),
    (Family::Phi3, "phi3"),
];

impl Family {
    fn read(metadata: &Metadata) -> Result<Self, EngineError> {
        let architecture = metadata.text("general.architecture")?;
        FAMILIES
            .iter()
            .find(|(_, name)| *name == architecture)
            .map(|(family, _)| *family)
            .ok_or_else(|| {
                metadata.error(format_args!(
                    "the architecture is {architecture:?} (general.architecture), which cannot be \
                     trained: use a model of one of {}",
                    FAMILIES.map(|(_, name)| name).join(", ")
                ))
            })
    }

    fn name(self) -> &'static str {
        FAMILIES.iter().find(|(family, _)| *family == self).map_or("", |(_, name)| name)
    }

    /// Gemma's norms multiply by 1 + w. GGUF stores the sum, Hugging Face stores w.
    pub(super) fn norms_are_stored_plus_one(self) -> bool {
        self.is_gemma()
    }

    pub(super) fn is_gemma(self) -> bool {
        matches!(self, Self::Gemma2 | Self::Gemma3)
    }
}

/// A model's shape.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Model {
    pub(super) family: Family,
    pub(super) layers: usize,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) heads: usize,
    pub(super) key_value_heads: usize,
    pub(super) head_dim: usize,
    pub(super) vocabulary: usize,
    pub(super) context_length: u64,
    /// Whether q, k, v and the attention's output have biases, where the family leaves it open.
    pub(super) attention_bias: bool,
    /// Whether the feed-forward block has biases; only a Llama may.
    pub(super) mlp_bias: bool,
    rotated: usize,
    norm_epsilon: f64,
    rope_theta: f64,
    rope_scaling: Value,
    /// What `config.json` has for this family alone.
    own: Value,
}

impl Model {
    /// Reads the shape, refusing another architecture by its name.
    pub(super) fn read(metadata: &Metadata, file: &GgufFile) -> Result<Self, EngineError> {
        let family = Family::read(metadata)?;
        let key = |name: &str| format!("{}.{name}", family.name());
        let size = |name: &str| metadata.number(&key(name)).map(|size| size as usize);
        let find_size = |name: &str| -> Result<Option<usize>, EngineError> {
            Ok(metadata.find_number(&key(name))?.map(|size| size as usize))
        };
        if find_size("expert_count")?.is_some_and(|experts| experts > 0) {
            return Err(metadata.error(format_args!(
                "a mixture of experts ({}) cannot be trained: use a dense model",
                key("expert_count")
            )));
        }
        let hidden = size("embedding_length")?;
        let heads = size("attention.head_count")?;
        let key_value_heads = find_size("attention.head_count_kv")?.unwrap_or(heads);
        if heads == 0 || key_value_heads == 0 || !heads.is_multiple_of(key_value_heads) {
            return Err(metadata.error(format_args!(
                "{heads} attention heads cannot share {key_value_heads} key-value heads"
            )));
        }
        let head_dim = find_size("attention.key_length")?.unwrap_or(hidden / heads);
        let value_width = find_size("attention.value_length")?.unwrap_or(head_dim);
        if value_width != head_dim {
            return Err(metadata.error(format_args!(
                "keys are {head_dim} wide and values {value_width} ({}): one width for both is \
                 what can be trained",
                key("attention.value_length")
            )));
        }
        let rotated = find_size("rope.dimension_count")?.unwrap_or(head_dim);
        if rotated > head_dim || (rotated != head_dim && family != Family::Phi3) {
            return Err(metadata.error(format_args!(
                "{} is {rotated} where a head has {head_dim} dimensions: partial rotation is not \
                 part of this architecture",
                key("rope.dimension_count")
            )));
        }
        let embedding = file.tensors.get("token_embd.weight").ok_or_else(|| {
            metadata.error("there is no tensor token_embd.weight, the token embedding")
        })?;
        let layers = size("block_count")?;
        let mut model = Self {
            family,
            layers,
            hidden,
            intermediate: size("feed_forward_length")?,
            heads,
            key_value_heads,
            head_dim,
            vocabulary: embedding.shape.first().copied().unwrap_or_default(),
            context_length: metadata.number(&key("context_length"))?,
            attention_bias: matches!(family, Family::Llama | Family::Qwen3)
                && ["attn_q", "attn_output"]
                    .iter()
                    .all(|part| file.tensors.contains_key(&format!("blk.0.{part}.bias"))),
            mlp_bias: family == Family::Llama && file.tensors.contains_key("blk.0.ffn_gate.bias"),
            rotated,
            norm_epsilon: metadata.real(&key("attention.layer_norm_rms_epsilon"))?,
            rope_theta: metadata.find_real(&key("rope.freq_base"))?.unwrap_or(10_000.0),
            rope_scaling: Value::Null,
            own: json!({}),
        };
        model.own = model.own_fields(metadata)?;
        model.rope_scaling = model.read_rope_scaling(metadata, file)?;
        Ok(model)
    }

    /// Metadata key of this family.
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.family.name())
    }

    /// `config.json`, as the family's config class in Hugging Face transformers reads it.
    pub(super) fn config_json(&self, special: &SpecialTokens, tied_head: bool) -> Value {
        let (class, model_type) = match self.family {
            Family::Llama => ("LlamaForCausalLM", "llama"),
            Family::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
            Family::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
            Family::Gemma2 => ("Gemma2ForCausalLM", "gemma2"),
            Family::Gemma3 => ("Gemma3ForCausalLM", "gemma3_text"),
            Family::Phi3 => ("Phi3ForCausalLM", "phi3"),
        };
        let mut config = json!({
            "architectures": [class],
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "bos_token_id": special.bos,
            "eos_token_id": special.eos,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.context_length,
            "model_type": model_type,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.key_value_heads,
            "pad_token_id": special.pad,
            "rms_norm_eps": self.norm_epsilon,
            "rope_scaling": self.rope_scaling,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": tied_head,
            "torch_dtype": "float32",
            "use_cache": true,
            "vocab_size": self.vocabulary,
        });
        for (name, value) in self.own.as_object().into_iter().flatten() {
            config[name] = value.clone();
        }
        config
    }

    fn own_fields(&self, metadata: &Metadata) -> Result<Value, EngineError> {
        let find_real = |name: &str| metadata.find_real(&self.key(name));
        Ok(match self.family {
            Family::Llama => json!({"mlp_bias": self.mlp_bias}),
            Family::Qwen2 | Family::Qwen3 => json!({"use_sliding_window": false}),
            Family::Gemma2 => json!({
                "attn_logit_softcapping": find_real("attn_logit_softcapping")?.unwrap_or(50.0),
                "final_logit_softcapping": find_real("final_logit_softcapping")?.unwrap_or(30.0),
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_activation": "gelu_pytorch_tanh",
                // Gemma 2 27B, the one with 46 layers, divides by its share of the width.
                "query_pre_attn_scalar": self.query_scalar(46),
                "sliding_window": metadata.find_number(&self.key("attention.sliding_window"))?
                    .unwrap_or(4096),
                "layer_types": self.layer_types(metadata, 2)?,
            }),
            Family::Gemma3 => {
                let window = metadata.number(&self.key("attention.sliding_window"))?;
                json!({
                    "attn_logit_softcapping": null,
                    "final_logit_softcapping": find_real("final_logit_softcapping")?,
                    "hidden_act": "gelu_pytorch_tanh",
                    "hidden_activation": "gelu_pytorch_tanh",
                    // As above, for Gemma 3 27B with its 62 layers.
                    "query_pre_attn_scalar": self.query_scalar(62),
                    "rope_local_base_freq": find_real("rope.freq_base_swa")?
                        .unwrap_or(GEMMA_LOCAL_THETA),
                    "sliding_window": window,
                    "layer_types": self.layer_types(metadata, 6)?,
                })
            }
            Family::Phi3 => {
                let original = self.key("rope.scaling.original_context_length");
                json!({
                    "embd_pdrop": 0.0,
                    "original_max_position_embeddings": metadata.find_number(&original)?
                        .unwrap_or(self.context_length),
                    "partial_rotary_factor": self.rotated as f64 / self.head_dim as f64,
                    "resid_pdrop": 0.0,
                    // 0 stands for none.
                    "sliding_window": metadata.find_number(&self.key("attention.sliding_window"))?
                        .filter(|&window| window > 0),
                })
            }
        })
    }

    /// What Gemma's scores are divided by the square root of. GGUF does not say: it is a head's
    /// width, but in the family's largest model, which is known by its number of layers.
    fn query_scalar(&self, layers_of_largest: usize) -> usize {
        if self.layers == layers_of_largest { self.hidden / self.heads } else { self.head_dim }
    }

    /// Every `period`-th layer sees the whole text, the others a window, unless the file says which.
    fn layer_types(
        &self,
        metadata: &Metadata,
        period: usize,
    ) -> Result<Vec<&'static str>, EngineError> {
        let key = self.key("attention.sliding_window_pattern");
        let windowed = metadata.pattern(&key, self.layers, period)?;
        let kind = |windowed| if windowed { "sliding_attention" } else { "full_attention" };
        Ok(windowed.into_iter().map(kind).collect())
    }

    /// `rope_scaling` for `config.json`.
    fn read_rope_scaling(
        &self,
        metadata: &Metadata,
        file: &GgufFile,
    ) -> Result<Value, EngineError> {
        let real = |name: &str| metadata.find_real(&self.key(name));
        let kind_key = self.key("rope.scaling.type");
        let kind = metadata.find_text(&kind_key)?.unwrap_or("none");
        let factor = match real("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => real("rope.scale_linear")?,
        };
        if let Some(table) = file.tensors.get(ROPE_FREQUENCIES) {
            if kind != "none" || self.family != Family::Llama {
                return Err(metadata.error(format_args!(
                    "there is a table {ROPE_FREQUENCIES} beside {kind_key} {kind:?}: import the \
                     model from its Hugging Face directory"
                )));
            }
            return super::rope::llama3_scaling(self, &file.read_whole(table)?).ok_or_else(|| {
                metadata.error(format_args!(
                    "{ROPE_FREQUENCIES} is not the table of Llama 3's rotary scaling: import the \
                     model from its Hugging Face directory"
                ))
            });
        }
        if let (Some(long), Some(short)) =
            (file.tensors.get(LONG_FACTORS), file.tensors.get(SHORT_FACTORS))
        {
            return Ok(json!({
                "rope_type": "longrope",
                "long_factor": file.read_whole(long)?,
                "short_factor": file.read_whole(short)?,
            }));
        }
        match (kind, factor) {
            ("none", _) => Ok(Value::Null),
            ("linear", Some(factor)) => Ok(json!({"rope_type": "linear", "factor": factor})),
            ("yarn", Some(factor)) if real("rope.scaling.yarn_ext_factor")?.is_none() => {
                let original = self.key("rope.scaling.original_context_length");
                let mut scaling = json!({
                    "rope_type": "yarn",
                    "factor": factor,
                    "original_max_position_embeddings": metadata.number(&original)?,
                });
                // llama.cpp multiplies the usual factor by it.
                if let Some(factor_of_it) = real("rope.scaling.attn_factor")? {
                    let usual = if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 };
                    scaling["attention_factor"] = json!(factor_of_it * usual);
                }
                for (name, field) in [
                    ("attn_factor", "attention_factor"),
                    ("beta_fast", "beta_fast"),
                    ("beta_slow", "beta_slow"),
                ] {
                    if let Some(value) = real(&format!("rope.scaling.yarn_{name}"))? {
                        scaling[field] = json!(value);
                    }
                }
                Ok(scaling)
            }
            _ => Err(metadata.error(format_args!(
                "rotary scaling {kind:?} ({kind_key}) cannot be carried over: import the model \
                 from its Hugging Face directory"
            ))),
        }
    }
}
