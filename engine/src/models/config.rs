//! `config.json` of a Hugging Face model directory, checked: what this engine cannot compute
//! exactly is refused by name, never approximated.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::rope::RopeScaling;
use crate::error::EngineError;

/// Architecture of a Llama-family decoder. Field names are Hugging Face's.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family; `llama` is the one there is.
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
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How the rotary frequencies are stretched for long contexts.
    pub rope_scaling: RopeScaling,
    /// Longest sequence the model was made for.
    pub max_position_embeddings: usize,
    /// Whether the output head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// The padding token, whose embedding takes no gradient from being an input, as in Hugging
    /// Face's models. Nothing is padded here, but it may also be a real token.
    pub pad_token_id: Option<u32>,
}

/// The file as it is written; absent fields have the defaults of `LlamaConfig`.
#[derive(Deserialize)]
struct ConfigFile {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(default = "default_rms_norm_eps")]
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<Map<String, Value>>,
    /// transformers 5 puts θ and the scaling here.
    rope_parameters: Option<Map<String, Value>>,
    #[serde(default = "default_max_position_embeddings")]
    max_position_embeddings: usize,
    #[serde(default)]
    tie_word_embeddings: bool,
    /// Negative for none in some old files.
    pad_token_id: Option<i64>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default = "default_hidden_act")]
    hidden_act: String,
    quantization_config: Option<Value>,
}

fn default_rms_norm_eps() -> f64 {
    1e-6
}

fn default_max_position_embeddings() -> usize {
    2048
}

fn default_hidden_act() -> String {
    "silu".to_owned()
}

impl ModelConfig {
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
        let refuse = |what: String| Err(EngineError::Model(format!("config.json: {what}")));

        // The family is looked at first: another family's file may lack fields that this one has,
        // and "no such family" is the message that helps.
        let json: Value = serde_json::from_str(text)
            .map_err(|error| EngineError::Model(format!("config.json: {error}")))?;
        match json.get("model_type").and_then(Value::as_str) {
            Some("llama") => {}
            Some(other) => {
                return refuse(format!("model_type {other:?} is not supported: use llama"));
            }
            None => return refuse("there is no model_type".to_owned()),
        }
        let file: ConfigFile = serde_json::from_value(json)
            .map_err(|error| EngineError::Model(format!("config.json: {error}")))?;

        if file.attention_bias || file.mlp_bias {
            return refuse("attention_bias and mlp_bias are not supported".to_owned());
        }
        if file.hidden_act != "silu" {
            return refuse(format!("hidden_act {:?} is not supported: use silu", file.hidden_act));
        }
        if file.quantization_config.is_some() {
            return refuse(
                "quantized weights (quantization_config) are not supported: \
                 use the f32, bf16 or f16 model"
                    .to_owned(),
            );
        }
        let heads = file.num_attention_heads;
        let key_value_heads = file.num_key_value_heads.unwrap_or(heads);
        let sizes = [
            ("vocab_size", file.vocab_size),
            ("hidden_size", file.hidden_size),
            ("intermediate_size", file.intermediate_size),
            ("num_hidden_layers", file.num_hidden_layers),
            ("num_attention_heads", heads),
            ("num_key_value_heads", key_value_heads),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return refuse(format!("{name} is 0"));
        }
        if !heads.is_multiple_of(key_value_heads) {
            return refuse(format!(
                "num_attention_heads {heads} is not a multiple of \
                 num_key_value_heads {key_value_heads}"
            ));
        }
        let head_dim = match file.head_dim {
            Some(head_dim) => head_dim,
            None if file.hidden_size.is_multiple_of(heads) => file.hidden_size / heads,
            None => {
                return refuse(format!(
                    "without head_dim, hidden_size {} must be a multiple of \
                     num_attention_heads {heads}",
                    file.hidden_size
                ));
            }
        };
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return refuse(format!("head_dim {head_dim} is not even, as rotary embedding needs"));
        }
        let rope = file.rope_parameters.as_ref().or(file.rope_scaling.as_ref());
        let rope_theta = file
            .rope_parameters
            .as_ref()
            .and_then(|rope| rope.get("rope_theta"))
            .and_then(Value::as_f64)
            .or(file.rope_theta)
            .unwrap_or(10_000.0);
        Ok(Self {
            model_type: file.model_type,
            vocab_size: file.vocab_size,
            hidden_size: file.hidden_size,
            intermediate_size: file.intermediate_size,
            num_hidden_layers: file.num_hidden_layers,
            num_attention_heads: heads,
            num_key_value_heads: key_value_heads,
            head_dim,
            rms_norm_eps: file.rms_norm_eps,
            rope_theta,
            rope_scaling: rope.map_or(Ok(RopeScaling::None), RopeScaling::parse)?,
            max_position_embeddings: file.max_position_embeddings,
            tie_word_embeddings: file.tie_word_embeddings,
            pad_token_id: file.pad_token_id.and_then(|id| u32::try_from(id).ok()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMOLLM2: &str = r#"{"model_type":"llama","vocab_size":49152,"hidden_size":576,
        "intermediate_size":1536,"num_hidden_layers":30,"num_attention_heads":9,
        "num_key_value_heads":3,"rms_norm_eps":1e-05,"rope_theta":100000.0,"rope_scaling":null,
        "max_position_embeddings":8192,"tie_word_embeddings":true,"hidden_act":"silu"}"#;

    /// The text above with one field replaced or added.
    fn with(field: &str, value: Value) -> Result<ModelConfig, EngineError> {
        let mut json: Map<String, Value> = serde_json::from_str(SMOLLM2).unwrap();
        json.insert(field.to_owned(), value);
        ModelConfig::parse(&Value::Object(json).to_string())
    }

    #[test]
    fn smollm2_is_read_with_its_head_dim_derived() {
        let config = ModelConfig::parse(SMOLLM2).unwrap();
        assert_eq!(config.head_dim, 64);
        assert_eq!(config.num_key_value_heads, 3);
        assert_eq!(config.rope_scaling, RopeScaling::None);
        assert!(config.tie_word_embeddings);
    }

    #[test]
    fn head_dim_times_heads_may_differ_from_hidden_size() {
        assert_eq!(with("head_dim", 128.into()).unwrap().head_dim, 128);
    }

    #[test]
    fn negative_padding_token_is_none() {
        assert_eq!(with("pad_token_id", 2.into()).unwrap().pad_token_id, Some(2));
        assert_eq!(with("pad_token_id", (-1).into()).unwrap().pad_token_id, None);
    }

    #[test]
    fn theta_of_transformers_5_is_read_from_rope_parameters() {
        let rope = serde_json::json!({"rope_type": "default", "rope_theta": 500_000.0});
        assert_eq!(with("rope_parameters", rope).unwrap().rope_theta, 500_000.0);
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let cases = [
            ("model_type", Value::from("mamba"), "mamba"),
            ("hidden_act", Value::from("gelu"), "gelu"),
            ("attention_bias", Value::from(true), "attention_bias"),
            ("num_key_value_heads", Value::from(2), "num_key_value_heads"),
            ("num_key_value_heads", Value::from(0), "num_key_value_heads"),
            ("head_dim", Value::from(63), "head_dim"),
            ("quantization_config", serde_json::json!({"bits": 4}), "quantization_config"),
            ("rope_scaling", serde_json::json!({"rope_type": "yarn", "factor": 4.0}), "yarn"),
        ];
        for (field, value, word) in cases {
            let message = with(field, value).unwrap_err().to_string();
            assert!(message.contains(word), "{field}: {message}");
        }
    }
}
