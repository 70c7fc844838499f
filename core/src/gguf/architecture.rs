//! `config.json` → the architecture's metadata, and Hugging Face's tensor names → GGUF's.

use serde_json::Value as Json;

use super::GgufError;
use super::header::Value;

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

const FAMILIES: [(&str, Family, &str); 7] = [
    ("llama", Family::Llama, "llama"),
    ("mistral", Family::Llama, "llama"),
    ("qwen2", Family::Qwen2, "qwen2"),
    ("qwen3", Family::Qwen3, "qwen3"),
    ("gemma2", Family::Gemma2, "gemma2"),
    ("gemma3_text", Family::Gemma3, "gemma3"),
    ("phi3", Family::Phi3, "phi3"),
];

/// What is done to a tensor's values on their way.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Change {
    None,
    /// The rows of each head of so many are permuted, for llama.cpp's rotary embedding.
    Permuted {
        head_dim: usize,
    },
    /// 1 is added, since Gemma's norms multiply by 1 + w and GGUF stores the sum, and the sum is
    /// multiplied.
    Norm {
        factor: f32,
    },
    /// All values are multiplied.
    Scaled {
        factor: f32,
    },
}

/// A model's shape, as its `config.json` and its tensors say.
pub(super) struct Architecture<'a> {
    pub(super) family: Family,
    name: &'static str,
    pub(super) config: &'a Json,
    heads: usize,
    key_value_heads: usize,
    pub(super) head_dim: usize,
    pub(super) layers: usize,
    pub(super) vocabulary: usize,
    pub(super) tied_head: bool,
}

impl<'a> Architecture<'a> {
    pub(super) fn read(config: &'a Json) -> Result<Self, GgufError> {
        let model_type = config["model_type"].as_str().unwrap_or_default();
        let Some(&(_, family, name)) = FAMILIES.iter().find(|(known, ..)| *known == model_type)
        else {
            return Err(GgufError::new(format!(
                "model_type {model_type:?} is not one of {}; download it with format=merged",
                FAMILIES.map(|(known, ..)| known).join(", ")
            )));
        };
        let size = |name| size(config, name);
        let heads = size("num_attention_heads")?;
        let optional = |name: &str| config[name].as_u64().map(|size| size as usize);
        let activation = if matches!(family, Family::Gemma2 | Family::Gemma3) {
            ("hidden_activation", "gelu_pytorch_tanh")
        } else {
            ("hidden_act", "silu")
        };
        if let (field, known) = activation
            && let Some(other) = config[field].as_str().filter(|other| *other != known)
        {
            return Err(GgufError::new(format!("{field} is {other:?}: a {name} computes {known}")));
        }
        Ok(Self {
            family,
            name,
            config,
            heads,
            key_value_heads: optional("num_key_value_heads").unwrap_or(heads),
            head_dim: match optional("head_dim") {
                Some(head_dim) => head_dim,
                None => size("hidden_size")? / heads.max(1),
            },
            layers: size("num_hidden_layers")?,
            vocabulary: size("vocab_size")?,
            tied_head: match config["tie_word_embeddings"].as_bool() {
                Some(tied) => tied,
                None => matches!(family, Family::Gemma2 | Family::Gemma3),
            },
        })
    }

    /// The metadata of the shape, `general.architecture` first.
    pub(super) fn metadata(&self) -> Result<Vec<(String, Value)>, GgufError> {
        let mut metadata = vec![("general.architecture".to_owned(), Value::from(self.name))];
        let mut put = |name: &str, value: Value| metadata.push((self.key(name), value));
        let size = |name| size(self.config, name);
        put("block_count", (self.layers as u32).into());
        put("context_length", (self.context_length()? as u32).into());
        put("embedding_length", (size("hidden_size")? as u32).into());
        put("feed_forward_length", (size("intermediate_size")? as u32).into());
        put("attention.head_count", (self.heads as u32).into());
        put("attention.head_count_kv", (self.key_value_heads as u32).into());
        put("attention.key_length", (self.head_dim as u32).into());
        put("attention.value_length", (self.head_dim as u32).into());
        put("attention.layer_norm_rms_epsilon", Value::F32(self.real("rms_norm_eps")?));
        put("vocab_size", (self.vocabulary as u32).into());
        self.own(&mut put)?;
        self.rope(&mut put)?;
        Ok(metadata)
    }

    /// GGUF's name of the family.
    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.name)
    }

    /// What one family alone has.
    fn own(&self, put: &mut impl FnMut(&str, Value)) -> Result<(), GgufError> {
        let window = self.config["sliding_window"].as_u64();
        match self.family {
            Family::Llama | Family::Qwen2 | Family::Qwen3 => {}
            Family::Gemma2 | Family::Gemma3 => {
                if let Some(pattern) = self.window_pattern()? {
                    put("attention.sliding_window_pattern", pattern);
                }
                for field in ["attn_logit_softcapping", "final_logit_softcapping"] {
                    match self.config[field].as_f64() {
                        Some(cap) => put(field, Value::F32(cap as f32)),
                        // Absent, it is the number that llama.cpp knows too.
                        None if self.family == Family::Gemma2
                            && self.config.get(field).is_some() =>
                        {
                            return Err(GgufError::new(format!(
                                "{field} is null, and llama.cpp computes no gemma2 without it; \
                                 download it with format=merged"
                            )));
                        }
                        None => {}
                    }
                }
                put("attention.sliding_window", (window.unwrap_or(4096) as u32).into());
            }
            Family::Phi3 => {
                put("attention.sliding_window", (window.unwrap_or(0) as u32).into());
                let original = self.config["original_max_position_embeddings"].as_u64();
                if let Some(original) = original {
                    put("rope.scaling.original_context_length", (original as u32).into());
                }
            }
        }
        Ok(())
    }

    /// Tokens of the longest text that the file's model may read. Where GGUF has no windows, that is
    /// what fits into the model's: so short a text each of its layers sees as a whole.
    fn context_length(&self) -> Result<usize, GgufError> {
        let context = size(self.config, "max_position_embeddings")?;
        Ok(self.unsaid_window().map_or(context, |window| context.min(window)))
    }

    /// The window of some layers, in a family for which GGUF has no key that says so.
    fn unsaid_window(&self) -> Option<usize> {
        let config = self.config;
        let has_windows = match self.family {
            Family::Llama => config["model_type"] == "mistral",
            Family::Qwen2 | Family::Qwen3 if config["use_sliding_window"] == true => {
                match config["layer_types"].as_array() {
                    Some(types) => types.iter().any(|kind| kind == "sliding_attention"),
                    None => config["max_window_layers"].as_u64().unwrap_or(28) < self.layers as u64,
                }
            }
            _ => false,
        };
        // Both families' window where the file does not say.
        let window = config.get("sliding_window").map_or(Some(4096), Json::as_u64);
        window.filter(|_| has_windows).map(|window| window as usize)
    }

    /// Which layers of a Gemma have a window, where they are not those that llama.cpp takes unless the
    /// file says: n for all but each n-th, 0 for all. Older llama.cpp reads no list.
    fn window_pattern(&self) -> Result<Option<Value>, GgufError> {
        let usual = if self.family == Family::Gemma2 { 2 } else { 6 };
        let of_period = |period: usize| -> Vec<bool> {
            let has_window = |layer: usize| period == 0 || !layer.is_multiple_of(period);
            (1..=self.layers).map(has_window).collect()
        };
        let windows: Vec<bool> = match self.config["layer_types"].as_array() {
            Some(types) => types.iter().map(|kind| kind == "sliding_attention").collect(),
            None => {
                let period = self.config["sliding_window_pattern"].as_u64();
                let period = period.filter(|_| self.family == Family::Gemma3);
                of_period(period.map_or(usual, |period| period as usize))
            }
        };
        // Such a file ends llama.cpp when it is opened.
        if !windows.contains(&true) {
            return Err(GgufError::new(format!(
                "no layer has a window by layer_types or sliding_window_pattern, and llama.cpp \
                 computes no such {}; download it with format=merged",
                self.name
            )));
        }
        let periods = [usual, 0].into_iter().chain(2..=self.layers);
        Ok(match periods.into_iter().find(|&period| of_period(period) == windows) {
            Some(period) if period == usual => None,
            Some(period) => Some((period as u32).into()),
            None => Some(Value::Flags(windows)),
        })
    }

    /// What queries are multiplied by beside what llama.cpp does to them: Gemma divides scores by the
    /// root of a number of its own, and llama.cpp by that of a head's width, or in the family's largest
    /// model, which it knows by its layers, of a head's share of the model's.
    fn query_factor(&self) -> f32 {
        let largest = match self.family {
            Family::Gemma2 => 46,
            Family::Gemma3 => 62,
            _ => return 1.0,
        };
        let known = if self.layers == largest {
            self.config["hidden_size"].as_u64().unwrap_or(0) as usize / self.heads.max(1)
        } else {
            self.head_dim
        };
        let scalar = self.config["query_pre_attn_scalar"].as_f64().unwrap_or(256.0);
        (known as f64 / scalar).sqrt() as f32
    }

    /// GGUF's name of a tensor, and what is done to its values; None for one that has no place in a
    /// file.
    pub(super) fn place(&self, name: &str) -> Option<(String, Change)> {
        let norm = match self.family {
            Family::Gemma2 | Family::Gemma3 => Change::Norm { factor: 1.0 },
            _ => Change::None,
        };
        match name {
            "model.embed_tokens.weight" => return Some(("token_embd.weight".into(), Change::None)),
            "model.norm.weight" => return Some(("output_norm.weight".into(), norm)),
            "lm_head.weight" => return Some(("output.weight".into(), Change::None)),
            _ => {}
        }
        let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let layer: usize = layer.parse().ok().filter(|&layer| layer < self.layers)?;
        let (part, kind) = part.rsplit_once('.').filter(|(_, kind)| {
            // llama.cpp has biases where these families have them.
            *kind == "weight"
                || *kind == "bias" && matches!(self.family, Family::Llama | Family::Qwen2)
        })?;
        let gemma = norm != Change::None;
        let permuted = match self.family {
            Family::Llama => Change::Permuted { head_dim: self.head_dim },
            _ => Change::None,
        };
        let factor = self.query_factor();
        let (part, change) = match part {
            "input_layernorm" => ("attn_norm", norm),
            "post_attention_layernorm" if gemma => ("post_attention_norm", norm),
            "post_attention_layernorm" => ("ffn_norm", norm),
            "pre_feedforward_layernorm" if gemma => ("ffn_norm", norm),
            "post_feedforward_layernorm" if gemma => ("post_ffw_norm", norm),
            "self_attn.q_proj" if self.family == Family::Gemma2 && factor != 1.0 => {
                ("attn_q", Change::Scaled { factor })
            }
            "self_attn.q_proj" => ("attn_q", permuted),
            "self_attn.k_proj" => ("attn_k", permuted),
            "self_attn.v_proj" => ("attn_v", Change::None),
            "self_attn.o_proj" => ("attn_output", Change::None),
            "self_attn.qkv_proj" if self.family == Family::Phi3 => ("attn_qkv", Change::None),
            // Not the weights: a norm stays in f32.
            "self_attn.q_norm" if gemma => ("attn_q_norm", Change::Norm { factor }),
            "self_attn.q_norm" => ("attn_q_norm", norm),
            "self_attn.k_norm" => ("attn_k_norm", norm),
            "mlp.gate_proj" => ("ffn_gate", Change::None),
            "mlp.up_proj" => ("ffn_up", Change::None),
            "mlp.gate_up_proj" if self.family == Family::Phi3 => ("ffn_up", Change::None),
            "mlp.down_proj" => ("ffn_down", Change::None),
            _ => return None,
        };
        Some((format!("blk.{layer}.{part}.{kind}"), change))
    }

    fn real(&self, name: &str) -> Result<f32, GgufError> {
        let number = self.config[name].as_f64();
        number.map(|x| x as f32).ok_or_else(|| GgufError::new(format!("config.json has no {name}")))
    }
}

pub(super) fn size(json: &Json, name: &str) -> Result<usize, GgufError> {
    let size = json[name].as_u64().filter(|&size| size <= u64::from(u32::MAX));
    size.map(|size| size as usize)
        .ok_or_else(|| GgufError::new(format!("config.json has no whole number {name}")))
}
