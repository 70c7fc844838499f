//! `config.json` → the architecture's metadata, and Hugging Face's tensor names → GGUF's.

use std::f64::consts::TAU;

use serde_json::Value as Json;

use super::GgufError;
use super::header::Value;

/// Divisors of the rotary frequencies of Llama 3, which Hugging Face keeps as parameters.
const ROPE_FREQUENCIES: &str = "rope_freqs.weight";
/// The two tables of Phi-3's long-context models.
const LONG_FACTORS: &str = "rope_factors_long.weight";
const SHORT_FACTORS: &str = "rope_factors_short.weight";

/// A family by the name that GGUF has for it, which also prefixes its metadata keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    None,
    /// The rows of each head of so many are permuted, for llama.cpp's rotary embedding.
    Permuted {
        head_dim: usize,
    },
    /// 1 is added: Gemma's norms multiply by 1 + w, and GGUF stores the sum.
    PlusOne,
}

/// A model's shape, as its `config.json` and its tensors say.
pub(super) struct Architecture<'a> {
    family: Family,
    name: &'static str,
    config: &'a Json,
    heads: usize,
    key_value_heads: usize,
    head_dim: usize,
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
        put("context_length", (size("max_position_embeddings")? as u32).into());
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
        let softcap = |field: &str| self.config[field].as_f64().map(|cap| Value::F32(cap as f32));
        match self.family {
            Family::Llama => {
                let context = size(self.config, "max_position_embeddings")? as u64;
                if window.is_some_and(|window| window < context) {
                    return Err(GgufError::new(format!(
                        "sliding_window is {}, and GGUF has no window for this model_type; \
                         download it with format=merged",
                        self.config["sliding_window"]
                    )));
                }
            }
            Family::Qwen2 | Family::Qwen3 => {
                if self.config["use_sliding_window"] == true {
                    return Err(GgufError::new(
                        "use_sliding_window is true, and GGUF has no window for this model_type; \
                         download it with format=merged",
                    ));
                }
            }
            Family::Gemma2 | Family::Gemma3 => {
                let (period, largest) =
                    if self.family == Family::Gemma2 { (2, 46) } else { (6, 62) };
                self.check_layer_types(period)?;
                // GGUF does not say: it is a head's width, but in the family's largest model.
                let scalar = self.config["query_pre_attn_scalar"].as_f64().unwrap_or(256.0);
                let known = if self.layers == largest {
                    size(self.config, "hidden_size")? / self.heads
                } else {
                    self.head_dim
                };
                if scalar != known as f64 {
                    return Err(GgufError::new(format!(
                        "query_pre_attn_scalar is {scalar}, where llama.cpp computes with {known}"
                    )));
                }
                for field in ["attn_logit_softcapping", "final_logit_softcapping"] {
                    if let Some(cap) = softcap(field) {
                        put(field, cap);
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

    /// llama.cpp lets every `period`-th layer see the whole text.
    fn check_layer_types(&self, period: usize) -> Result<(), GgufError> {
        let Some(types) = self.config["layer_types"].as_array() else {
            let pattern = self.config["sliding_window_pattern"].as_u64();
            return match pattern.filter(|&pattern| pattern != period as u64) {
                Some(other) => Err(GgufError::new(format!(
                    "sliding_window_pattern is {other}, where llama.cpp computes with {period}"
                ))),
                None => Ok(()),
            };
        };
        let expected = |layer: usize| {
            if layer.is_multiple_of(period) { "full_attention" } else { "sliding_attention" }
        };
        match types.iter().zip(1..).find(|(kind, layer)| **kind != expected(*layer)) {
            Some((kind, layer)) => Err(GgufError::new(format!(
                "layer_types has {kind} for layer {layer}, where llama.cpp computes {}",
                expected(layer)
            ))),
            None => Ok(()),
        }
    }

    /// Parameters of the rotary embedding of full attention, in the spelling of transformers 5 or
    /// of 4, and θ.
    fn rope_parameters(&self) -> (&Json, Option<f64>) {
        let parameters = &self.config["rope_parameters"];
        let parameters = match &parameters["full_attention"] {
            Json::Null => parameters,
            of_type => of_type,
        };
        let scaling = match &self.config["rope_scaling"] {
            Json::Null => parameters,
            scaling => scaling,
        };
        (scaling, parameters["rope_theta"].as_f64().or(self.config["rope_theta"].as_f64()))
    }

    fn rope(&self, put: &mut impl FnMut(&str, Value)) -> Result<(), GgufError> {
        let (scaling, theta) = self.rope_parameters();
        let theta = theta.ok_or_else(|| GgufError::new("config.json has no rope_theta"))?;
        put("rope.freq_base", Value::F32(theta as f32));
        put("rope.dimension_count", (self.rotated() as u32).into());
        if self.family == Family::Gemma3 {
            let local = self.config["rope_parameters"]["sliding_attention"]["rope_theta"].as_f64();
            let local = local.or(self.config["rope_local_base_freq"].as_f64()).unwrap_or(10_000.0);
            put("rope.freq_base_swa", Value::F32(local as f32));
        }
        let factor = scaling["factor"].as_f64();
        match (rope_type(scaling), factor) {
            ("default", _) | ("llama3", Some(_)) => {}
            ("linear", Some(factor)) => {
                put("rope.scaling.type", "linear".into());
                put("rope.scaling.factor", Value::F32(factor as f32));
            }
            ("yarn", Some(factor)) => {
                let own = ["attention_factor", "beta_fast", "beta_slow", "mscale", "truncate"];
                if let Some(field) = own.into_iter().find(|field| !scaling[*field].is_null()) {
                    return Err(GgufError::new(format!(
                        "rotary scaling has its own {field}, which GGUF cannot say"
                    )));
                }
                let original = size(scaling, "original_max_position_embeddings")?;
                put("rope.scaling.type", "yarn".into());
                put("rope.scaling.factor", Value::F32(factor as f32));
                put("rope.scaling.original_context_length", (original as u32).into());
            }
            ("longrope" | "su", _) if self.family == Family::Phi3 => {
                put("rope.scaling.attn_factor", Value::F32(self.long_attention_factor(scaling)?));
            }
            (other, _) => {
                return Err(GgufError::new(format!(
                    "rotary scaling {other:?} cannot be carried over; download it with \
                     format=merged"
                )));
            }
        }
        Ok(())
    }

    /// How many of a head's dimensions turn.
    fn rotated(&self) -> usize {
        let share = self.config["partial_rotary_factor"].as_f64();
        let share = share.or(self.rope_parameters().0["partial_rotary_factor"].as_f64());
        (self.head_dim as f64 * share.unwrap_or(1.0)) as usize
    }

    /// √(1 + ln(stretch) / ln(original context)), or what the file says (Ding et al. 2024).
    fn long_attention_factor(&self, scaling: &Json) -> Result<f32, GgufError> {
        if let Some(own) = scaling["attention_factor"].as_f64() {
            return Ok(own as f32);
        }
        let context = size(self.config, "max_position_embeddings")? as f64;
        let original = match scaling["original_max_position_embeddings"].as_f64() {
            Some(original) => original,
            None => size(self.config, "original_max_position_embeddings")? as f64,
        };
        let stretch = scaling["factor"].as_f64().unwrap_or(context / original);
        let factor = if stretch <= 1.0 { 1.0 } else { (1.0 + stretch.ln() / original.ln()).sqrt() };
        Ok(factor as f32)
    }

    /// Tensors that stand in `config.json` at Hugging Face: name and values.
    pub(super) fn tables(&self) -> Result<Vec<(&'static str, Vec<f32>)>, GgufError> {
        let (scaling, theta) = self.rope_parameters();
        let table = |field: &str| -> Result<Vec<f32>, GgufError> {
            let list = scaling[field].as_array().into_iter().flatten();
            let table: Vec<f32> = list.filter_map(Json::as_f64).map(|x| x as f32).collect();
            if table.len() == self.rotated() / 2 {
                return Ok(table);
            }
            Err(GgufError::new(format!(
                "{field} has {} numbers for {} pairs of dimensions",
                table.len(),
                self.rotated() / 2
            )))
        };
        match rope_type(scaling) {
            "llama3" => {
                let number = |field: &str| {
                    scaling[field].as_f64().ok_or_else(|| {
                        GgufError::new(format!("the rotary scaling \"llama3\" has no {field}"))
                    })
                };
                let (factor, original) =
                    (number("factor")?, number("original_max_position_embeddings")?);
                let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
                let theta = theta.unwrap_or(10_000.0);
                let divisors = (0..self.head_dim / 2).map(|pair| {
                    let frequency = theta.powf(-2.0 * pair as f64 / self.head_dim as f64);
                    let smooth = (original * frequency / TAU - low) / (high - low);
                    let smooth = smooth.clamp(0.0, 1.0);
                    (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
                });
                Ok(vec![(ROPE_FREQUENCIES, divisors.collect())])
            }
            "longrope" | "su" => Ok(vec![
                (LONG_FACTORS, table("long_factor")?),
                (SHORT_FACTORS, table("short_factor")?),
            ]),
            _ => Ok(Vec::new()),
        }
    }

    /// GGUF's name of a tensor, and what is done to its values; None for one that has no place in a
    /// file.
    pub(super) fn place(&self, name: &str) -> Option<(String, Change)> {
        let norm = match self.family {
            Family::Gemma2 | Family::Gemma3 => Change::PlusOne,
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
        let gemma = norm == Change::PlusOne;
        let permuted = match self.family {
            Family::Llama => Change::Permuted { head_dim: self.head_dim },
            _ => Change::None,
        };
        let (part, change) = match part {
            "input_layernorm" => ("attn_norm", norm),
            "post_attention_layernorm" if gemma => ("post_attention_norm", norm),
            "post_attention_layernorm" => ("ffn_norm", norm),
            "pre_feedforward_layernorm" if gemma => ("ffn_norm", norm),
            "post_feedforward_layernorm" if gemma => ("post_ffw_norm", norm),
            "self_attn.q_proj" => ("attn_q", permuted),
            "self_attn.k_proj" => ("attn_k", permuted),
            "self_attn.v_proj" => ("attn_v", Change::None),
            "self_attn.o_proj" => ("attn_output", Change::None),
            "self_attn.qkv_proj" if self.family == Family::Phi3 => ("attn_qkv", Change::None),
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

fn rope_type(scaling: &Json) -> &str {
    scaling["rope_type"].as_str().or(scaling["type"].as_str()).unwrap_or("default")
}

fn size(json: &Json, name: &str) -> Result<usize, GgufError> {
    let size = json[name].as_u64().filter(|&size| size <= u64::from(u32::MAX));
    size.map(|size| size as usize)
        .ok_or_else(|| GgufError::new(format!("config.json has no whole number {name}")))
}
