use serde_json::{Map, Value};

use super::*;
use crate::models::rope::RopeScaling;

const SMOLLM2: &str = r#"{"model_type":"llama","vocab_size":49152,"hidden_size":576,
    "intermediate_size":1536,"num_hidden_layers":30,"num_attention_heads":9,
    "num_key_value_heads":3,"rms_norm_eps":1e-05,"rope_theta":100000.0,"rope_scaling":null,
    "max_position_embeddings":8192,"tie_word_embeddings":true,"hidden_act":"silu"}"#;

/// The text above with fields replaced or added.
fn with_all(fields: Value) -> Result<ModelConfig, EngineError> {
    let mut json: Map<String, Value> = serde_json::from_str(SMOLLM2).unwrap();
    json.extend(fields.as_object().unwrap().clone());
    ModelConfig::parse(&Value::Object(json).to_string())
}

fn with(field: &str, value: Value) -> Result<ModelConfig, EngineError> {
    with_all(serde_json::json!({field: value}))
}

#[test]
fn smollm2_is_read_with_its_head_dim_derived() {
    let config = ModelConfig::parse(SMOLLM2).unwrap();
    assert_eq!(config.head_dim, 64);
    assert_eq!(config.num_key_value_heads, 3);
    assert_eq!(config.rope.scaling, RopeScaling::None);
    assert_eq!(config.rope.theta, 100_000.0);
    assert!(config.tie_word_embeddings);
    assert_eq!(config.sliding_windows, [None; 30]);
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
    assert_eq!(with("rope_parameters", rope).unwrap().rope.theta, 500_000.0);
}

#[test]
fn mistral_slides_in_all_layers_unless_its_window_is_null() {
    let windows = |window: Value| {
        with_all(serde_json::json!({"model_type": "mistral", "sliding_window": window}))
            .unwrap()
            .sliding_windows
    };
    assert_eq!(windows(1024.into()), [Some(1024); 30]);
    assert_eq!(windows(Value::Null), [None; 30]);
    assert_eq!(with("model_type", "mistral".into()).unwrap().sliding_windows, [Some(4096); 30]);
}

#[test]
fn qwen2_slides_where_it_is_told_to_and_from_max_window_layers_on() {
    let windows = |fields: Value| {
        let mut all = serde_json::json!({
            "model_type": "qwen2", "num_hidden_layers": 3, "sliding_window": 8,
            "max_window_layers": 2,
        });
        all.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        with_all(all).map(|config| config.sliding_windows)
    };
    assert_eq!(windows(serde_json::json!({})).unwrap(), [None; 3]);
    let on = serde_json::json!({"use_sliding_window": true});
    assert_eq!(windows(on).unwrap(), [None, None, Some(8)]);
    let types = ["sliding_attention", "full_attention", "sliding_attention"];
    let typed = serde_json::json!({"use_sliding_window": true, "layer_types": types});
    assert_eq!(windows(typed).unwrap(), [Some(8), None, Some(8)]);
    let off = windows(serde_json::json!({"layer_types": types})).unwrap_err().to_string();
    assert!(off.contains("no sliding_window"), "{off}");
}

#[test]
fn qwen2_has_biases_of_its_own_and_llama_those_it_asks_for() {
    let biases =
        |config: ModelConfig| [config.qkv_bias, config.output_bias, config.feed_forward_bias];
    assert_eq!(biases(with("model_type", "qwen2".into()).unwrap()), [true, false, false]);
    assert_eq!(biases(with("attention_bias", true.into()).unwrap()), [true, true, false]);
    assert_eq!(biases(with("mlp_bias", true.into()).unwrap()), [false, false, true]);
}

#[test]
fn phi3_turns_a_part_of_a_head_by_longrope_within_its_original_context() {
    let phi3 = |more: Value| {
        let mut all = serde_json::json!({
            "model_type": "phi3", "max_position_embeddings": 131072,
            "partial_rotary_factor": 0.75, "original_max_position_embeddings": 2048,
            "rope_scaling": {"type": "su", "short_factor": vec![1.5; 24], "long_factor": []},
        });
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        with_all(all)
    };
    let config = phi3(serde_json::json!({})).unwrap();
    assert_eq!((config.rope.dim, config.rope.frequencies().len()), (48, 24));
    assert_eq!(config.max_position_embeddings, 2048);
    assert!(config.fused_projections);
    let odd = phi3(serde_json::json!({"partial_rotary_factor": 0.3})).unwrap_err();
    assert!(odd.to_string().contains("partial_rotary_factor"), "{odd}");
    let yarn = phi3(serde_json::json!({"rope_scaling": {"type": "yarn", "factor": 4.0}}));
    assert!(yarn.unwrap_err().to_string().contains("short_factor"));
}

/// A `gemma3_text` file of four layers with fields replaced or added.
fn gemma3(fields: Value) -> Result<ModelConfig, EngineError> {
    let mut json = serde_json::json!({
        "model_type": "gemma3_text", "vocab_size": 101, "hidden_size": 24,
        "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 10, "sliding_window": 5,
    });
    json.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    ModelConfig::parse(&json.to_string())
}

#[test]
fn gemma3_of_transformers_4_and_5_is_the_same() {
    let four = serde_json::json!({
        "sliding_window_pattern": 3, "rope_theta": 2e6, "rope_local_base_freq": 5e3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    });
    let (full, sliding) = ("full_attention", "sliding_attention");
    let five = serde_json::json!({
        "layer_types": [sliding, sliding, full, sliding],
        "rope_parameters": {
            full: {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
            sliding: {"rope_type": "default", "rope_theta": 5e3},
        },
    });
    let config = gemma3(four).unwrap();
    assert_eq!(config, gemma3(five).unwrap());
    assert_eq!(config.sliding_windows, [Some(5), Some(5), None, Some(5)]);
    assert_eq!(config.rope.scaling, RopeScaling::Linear { factor: 8.0 });
    let sliding = config.sliding_rope.unwrap();
    assert_eq!((sliding.theta, sliding.scaling), (5e3, RopeScaling::None));
}

#[test]
fn gemma3_has_the_defaults_of_its_family() {
    let config = gemma3(serde_json::json!({})).unwrap();
    assert!(config.tie_word_embeddings && config.head_norm && config.unit_offset_norm);
    assert_eq!(config.sliding_windows, [Some(5); 4], "each sixth is full");
    assert_eq!((config.rope.theta, config.sliding_rope.unwrap().theta), (1e6, 1e4));
    assert_eq!(config.attention_scale, 1.0 / 16.0);
    assert_eq!(config.activation, Activation::GeluTanh);
    assert_eq!((config.attn_logit_softcapping, config.final_logit_softcapping), (None, None));
    assert_eq!(config.pad_token_id, Some(0));
}

#[test]
fn gemma2_caps_unless_its_caps_are_null() {
    let gemma2 = |fields: Value| {
        let mut all = serde_json::json!({"model_type": "gemma2"});
        all.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let config = gemma3(all).unwrap();
        (config.attn_logit_softcapping, config.final_logit_softcapping)
    };
    assert_eq!(gemma2(serde_json::json!({})), (Some(50.0), Some(30.0)));
    let null = serde_json::json!({"attn_logit_softcapping": null});
    assert_eq!(gemma2(null), (None, Some(30.0)));
}

#[test]
fn gemma3_that_cannot_be_computed_is_refused_by_name() {
    for (field, value, word) in [
        ("model_type", Value::from("gemma3"), "gemma3_text"),
        ("attn_logit_softcapping", Value::from(50.0), "attn_logit_softcapping"),
        ("use_bidirectional_attention", Value::from(true), "use_bidirectional_attention"),
        ("sliding_window", Value::Null, "sliding_window"),
        ("hidden_activation", Value::from("gelu"), "hidden_activation"),
        ("rope_parameters", serde_json::json!({"rope_theta": 1e6}), "sliding_attention"),
    ] {
        let message = gemma3(serde_json::json!({field: value})).unwrap_err().to_string();
        assert!(message.contains(word), "{field}: {message}");
    }
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let cases = [
        ("model_type", Value::from("mamba"), "mamba"),
        ("hidden_act", Value::from("gelu"), "gelu"),
        ("attention_bias", Value::from("yes"), "attention_bias"),
        ("attention_dropout", Value::from(0.1), "attention_dropout"),
        ("num_key_value_heads", Value::from(2), "num_key_value_heads"),
        ("num_key_value_heads", Value::from(0), "num_key_value_heads"),
        ("head_dim", Value::from(63), "head_dim"),
        ("quantization_config", serde_json::json!({"bits": 4}), "quantization_config"),
        ("rope_scaling", serde_json::json!({"type": "dynamic", "factor": 4.0}), "dynamic"),
        ("partial_rotary_factor", Value::from(0.5), "partial_rotary_factor"),
        ("rope_parameters", serde_json::json!({"full_attention": {}}), "rope_parameters"),
    ];
    for (field, value, word) in cases {
        let message = with(field, value).unwrap_err().to_string();
        assert!(message.contains(word), "{field}: {message}");
    }
}

#[test]
fn layer_types_that_do_not_fit_are_refused() {
    for (types, word) in [
        (serde_json::json!(["full_attention"]), "1 entries"),
        (serde_json::json!(["full_attention", "chunked_attention"]), "chunked_attention"),
    ] {
        let message = with_all(serde_json::json!({
            "model_type": "qwen2", "num_hidden_layers": 2, "layer_types": types,
        }))
        .unwrap_err()
        .to_string();
        assert!(message.contains(word), "{message}");
    }
    let mistral = serde_json::json!({"model_type": "mistral", "layer_types": ["full_attention"]});
    assert!(with_all(mistral).unwrap_err().to_string().contains("layer_types"));
}
