//! Heads and blocks as bytes. That llama.cpp's names are right is tested where its own converter's
//! files are at hand: in the engine, beside the importer that reads them back.

use std::collections::HashMap;

use half::f16;
use serde_json::{Value as Json, json};

use super::architecture::{Architecture, Change};
use super::header::{Place, Value, header};
use super::storage::{StorageType, TensorFacts, TensorType};

fn llama() -> Json {
    json!({
        "model_type": "llama", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 12,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 64,
        "tie_word_embeddings": true, "hidden_act": "silu",
    })
}

/// `config` with the fields of `changes`.
fn changed(mut config: Json, changes: &Json) -> Json {
    for (name, value) in changes.as_object().expect("an object") {
        config[name] = value.clone();
    }
    config
}

fn refusal(change: impl Fn(&mut Json)) -> String {
    let mut config = llama();
    change(&mut config);
    let read = Architecture::read(&config).and_then(|architecture| {
        architecture.metadata()?;
        architecture.tables().map(drop)
    });
    read.expect_err("refused").to_string()
}

#[test]
fn head_lists_metadata_and_tensors_and_ends_at_a_multiple_of_32() {
    let metadata = [
        ("k".to_owned(), Value::Texts(vec!["é".to_owned()])),
        ("f".to_owned(), Value::Flags(vec![true, false])),
    ];
    let place = Place { name: "w", shape: &[3, 32], kind: TensorType::Q8_0, offset: 64 };
    let bytes = header(&metadata, &[place]);
    let mut expected = b"GGUF\x03\0\0\0".to_vec();
    for count in [1u64, 2] {
        expected.extend(count.to_le_bytes());
    }
    expected.extend([1, 0, 0, 0, 0, 0, 0, 0, b'k', 9, 0, 0, 0, 8, 0, 0, 0]);
    expected.extend([1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0xc3, 0xa9]);
    expected.extend([1, 0, 0, 0, 0, 0, 0, 0, b'f', 9, 0, 0, 0, 7, 0, 0, 0]);
    expected.extend([2, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    expected.extend([1, 0, 0, 0, 0, 0, 0, 0, b'w', 2, 0, 0, 0]);
    for size in [32u64, 3] {
        expected.extend(size.to_le_bytes());
    }
    expected.extend([8, 0, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes[..expected.len()], expected);
    assert_eq!(bytes.len(), expected.len().next_multiple_of(32));
}

#[test]
fn block_of_8_bits_holds_its_scale_and_rounded_quotients() {
    let mut values = [0.0f32; 64];
    values[..4].copy_from_slice(&[-127.0, 0.5, 1.25, -2.5]);
    let bytes = TensorType::Q8_0.encode(&values).expect("finite");
    assert_eq!(bytes.len(), 68);
    assert_eq!(bytes[..2], f16::ONE.to_le_bytes());
    // Halves go away from zero.
    assert_eq!(bytes[2..7], [-127i8 as u8, 1, 1, -3i8 as u8, 0]);
    assert_eq!(bytes[34..], [0; 34], "a block of zeros");
}

#[test]
fn values_beyond_half_precision_are_refused() {
    let mut values = [1.0f32; 32];
    values[5] = 1e5;
    assert_eq!(TensorType::F16.encode(&values), Err(1e5));
    assert!(TensorType::Q8_0.encode(&values).is_ok(), "only the scale is in half precision");
    values[5] = 1e7;
    assert_eq!(TensorType::Q8_0.encode(&values), Err(1e7));
    values[5] = f32::NAN;
    assert!(TensorType::Q8_0.encode(&values).is_err());
}

#[test]
fn blocks_of_values_within_half_precision_have_scales_within_it() {
    let greatest = f16::MAX.to_f32();
    let mut state = 7u32;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (f64::from(state) / f64::from(u32::MAX)) as f32
    };
    let mut all: Vec<Vec<f32>> = (0..200)
        .map(|case| {
            let shape = |x: f32| match case % 4 {
                0 => 2.0 * x - 1.0,
                1 => x.powi(8) - 0.5,
                2 => (2.0 * x - 1.0).signum(),
                _ => f32::from(u8::from(x > 0.99)) - f32::from(u8::from(x < 0.01)),
            };
            (0..256).map(|_| greatest * shape(random()).clamp(-1.0, 1.0)).collect()
        })
        .collect();
    all.extend([greatest, -greatest].map(|value| vec![value; 256]));
    for kind in [
        TensorType::F16,
        TensorType::Q8_0,
        TensorType::Q5_0,
        TensorType::Q5_1,
        TensorType::Q4_K,
        TensorType::Q5_K,
        TensorType::Q6_K,
    ] {
        for values in &all {
            assert!(kind.encode(values).is_ok(), "{kind:?} {values:?}");
        }
    }
}

#[test]
fn blocks_have_the_bytes_of_ggml() {
    let reference: Json = serde_json::from_str(include_str!("blocks.json")).expect("JSON");
    let values = reference["values"].as_array().expect("a list");
    let values: Vec<f32> = values.iter().map(|x| x.as_f64().expect("it") as f32).collect();
    for (name, kind) in [
        ("q8_0", TensorType::Q8_0),
        ("q5_0", TensorType::Q5_0),
        ("q5_1", TensorType::Q5_1),
        ("q4_K", TensorType::Q4_K),
        ("q5_K", TensorType::Q5_K),
        ("q6_K", TensorType::Q6_K),
    ] {
        let bytes = kind.encode(&values).expect("finite");
        assert_eq!(bytes.len(), kind.bytes(values.len()), "{name}");
        assert_eq!(hex::encode(bytes), reference["blocks"][name].as_str().expect("hex"), "{name}");
    }
}

#[test]
fn each_tensor_has_the_type_that_llama_quantize_gives_it() {
    use StorageType::{F16, Q4_K_M, Q8_0};
    let of = |storage: StorageType, name: &str, shape: &[usize], layer| {
        storage.of(TensorFacts { name, shape, layer, layers: 30, is_head: name == "output.weight" })
    };
    let norm = "blk.0.attn_norm.weight";
    assert_eq!(of(Q4_K_M, norm, &[512], Some(0)), TensorType::F32);
    assert_eq!(of(F16, "token_embd.weight", &[10, 24], None), TensorType::F16);
    assert_eq!(of(Q8_0, "token_embd.weight", &[10, 64], None), TensorType::Q8_0);
    assert_eq!(of(Q8_0, "token_embd.weight", &[10, 24], None), TensorType::F16);
    assert_eq!(of(Q4_K_M, "output.weight", &[10, 512], None), TensorType::Q6_K);
    assert_eq!(of(Q4_K_M, "output.weight", &[10, 576], None), TensorType::Q8_0);
    assert_eq!(of(Q4_K_M, "token_embd.weight", &[10, 512], None), TensorType::Q4_K);
    assert_eq!(of(Q4_K_M, "blk.0.attn_qkv.weight", &[10, 512], Some(0)), TensorType::Q5_K);
    // An eighth of 30 is 3, and the last layers begin at 26.
    let six_bits: Vec<usize> = (0..30)
        .filter(|&layer| {
            of(Q4_K_M, "blk.0.ffn_down.weight", &[10, 512], Some(layer)) == TensorType::Q6_K
        })
        .collect();
    assert_eq!(six_bits, [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]);
    assert_eq!(of(Q4_K_M, "blk.0.ffn_up.weight", &[10, 512], Some(0)), TensorType::Q4_K);
    assert_eq!(of(Q4_K_M, "blk.0.ffn_up.weight", &[10, 576], Some(0)), TensorType::Q5_0);
    assert_eq!(of(Q4_K_M, "blk.0.ffn_up.weight", &[10, 40], Some(0)), TensorType::F16);
}

#[test]
fn tensors_have_llama_cpps_names_and_q_and_k_its_order_of_rows() {
    let config = llama();
    let architecture = Architecture::read(&config).expect("a llama");
    let place = |name: &str| architecture.place(name);
    let permuted = Change::Permuted { head_dim: 4 };
    for (name, to, change) in [
        ("model.layers.1.self_attn.q_proj.weight", "blk.1.attn_q.weight", permuted),
        ("model.layers.1.self_attn.k_proj.bias", "blk.1.attn_k.bias", permuted),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight", Change::None),
        ("lm_head.weight", "output.weight", Change::None),
    ] {
        assert_eq!(place(name), Some((to.to_owned(), change)));
    }
    for unknown in ["model.layers.2.mlp.up_proj.weight", "model.layers.0.mlp.router.weight"] {
        assert_eq!(place(unknown), None);
    }
}

#[test]
fn what_a_file_cannot_say_is_refused_by_name() {
    let words = [
        (json!({"model_type": "bloom"}), "model_type \"bloom\""),
        (json!({"hidden_act": "gelu"}), "hidden_act is \"gelu\""),
        (json!({"rms_norm_eps": null}), "no rms_norm_eps"),
        (json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}), "\"dynamic\""),
        (json!({"rope_scaling": {"rope_type": "yarn", "beta_fast": 16}}), "beta_fast 16"),
        (json!({"rope_scaling": {"rope_type": "yarn", "beta_slow": 2}}), "beta_slow 2"),
        (json!({"rope_scaling": {"rope_type": "yarn", "truncate": false}}), "truncate false"),
        (json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}), "original_max"),
        // Only a Llama's file has its table.
        (
            json!({"model_type": "qwen2", "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32}}),
            "\"llama3\"",
        ),
        (
            gemma("gemma2", json!({"layer_types": ["full_attention", "full_attention"]})),
            "layer_types",
        ),
        (gemma("gemma3_text", json!({"sliding_window_pattern": 1})), "sliding_window_pattern"),
        (
            gemma("gemma2", json!({"attn_logit_softcapping": null})),
            "attn_logit_softcapping is null",
        ),
        (gemma("gemma2", json!({"final_logit_softcapping": null})), "final_logit_softcapping is"),
        (
            gemma(
                "gemma3_text",
                json!({"rope_parameters": {
                "full_attention": {"rope_theta": 1e6},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}}),
            ),
            "layers with a window too (\"linear\")",
        ),
        (
            gemma(
                "gemma3_text",
                json!({"rope_scaling": {"rope_type": "yarn", "factor": 2.0,
                "original_max_position_embeddings": 32, "attention_factor": 1.5}}),
            ),
            "attention_factor of its own, 1.5",
        ),
    ];
    for (change, word) in words {
        let message = refusal(|config| *config = changed(config.take(), &change));
        assert!(message.contains(word), "{message}");
    }
}

/// Changes that make a Gemma of the small model.
fn gemma(family: &str, changes: Json) -> Json {
    let all = json!({"model_type": family, "hidden_act": null, "sliding_window": 8,
        "query_pre_attn_scalar": 4});
    changed(all, &changes)
}

/// The metadata of the small model with `changes`.
fn described(changes: &Json) -> HashMap<String, Value> {
    let config = changed(llama(), changes);
    let architecture = Architecture::read(&config).expect("read");
    architecture.metadata().expect("described").into_iter().collect()
}

#[test]
fn where_gguf_has_no_windows_a_text_may_be_no_longer_than_the_models() {
    let (sliding, full) = ("sliding_attention", "full_attention");
    let qwen = |changes: Json| {
        let all = json!({"model_type": "qwen2", "use_sliding_window": true, "sliding_window": 16});
        changed(all, &changes)
    };
    for (changes, architecture, context) in [
        (json!({"model_type": "mistral", "sliding_window": 32}), "llama", 32),
        (json!({"model_type": "mistral", "sliding_window": 4096}), "llama", 64),
        (json!({"model_type": "mistral", "sliding_window": null}), "llama", 64),
        (json!({"model_type": "mistral", "max_position_embeddings": 8192}), "llama", 4096),
        // No Llama has windows, whatever its file says.
        (json!({"sliding_window": 32}), "llama", 64),
        (qwen(json!({"use_sliding_window": false})), "qwen2", 64),
        (qwen(json!({"max_window_layers": 2})), "qwen2", 64),
        (qwen(json!({"max_window_layers": 1})), "qwen2", 16),
        (qwen(json!({"layer_types": [full, full]})), "qwen2", 64),
        (qwen(json!({"layer_types": [full, sliding]})), "qwen2", 16),
        (qwen(json!({"model_type": "qwen3", "layer_types": [sliding, full]})), "qwen3", 16),
        // These files say what their windows are.
        (json!({"model_type": "phi3", "sliding_window": 16}), "phi3", 64),
        (gemma("gemma2", json!({})), "gemma2", 64),
    ] {
        let key = format!("{architecture}.context_length");
        assert_eq!(described(&changes)[&key], Value::U32(context), "{changes}");
    }
}

#[test]
fn yarn_is_told_with_what_is_not_in_the_config_and_with_its_factor_where_it_is_unusual() {
    let key = |name: &str| format!("llama.rope.scaling.{name}");
    for (extra, factor, original, attention) in [
        (json!({"factor": 4.0, "original_max_position_embeddings": 16}), 4.0, 16, None),
        (json!({"original_max_position_embeddings": 16}), 4.0, 16, None),
        (json!({"factor": 2.0}), 2.0, 64, None),
        (
            json!({"factor": 4.0, "beta_fast": 32, "beta_slow": 1.0, "truncate": true}),
            4.0,
            64,
            None,
        ),
        (json!({"factor": 4.0, "attention_factor": 1.5}), 4.0, 64, Some(1.5)),
        (json!({"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}), 4.0, 64, Some(1.0)),
        (
            json!({"factor": 4.0, "mscale": 0.5, "mscale_all_dim": 2.0}),
            4.0,
            64,
            Some((0.05 * 4f64.ln() + 1.0) / (0.2 * 4f64.ln() + 1.0)),
        ),
        (json!({"factor": 4.0, "mscale": 0.5, "mscale_all_dim": 0.0}), 4.0, 64, None),
        (json!({"factor": 1.0, "attention_factor": 1.5}), 1.0, 64, Some(1.5)),
    ] {
        let mut scaling = extra.clone();
        scaling["rope_type"] = json!("yarn");
        let found = described(&json!({ "rope_scaling": scaling }));
        assert_eq!(found[&key("type")], Value::from("yarn"), "{extra}");
        assert_eq!(found[&key("factor")], Value::F32(factor), "{extra}");
        assert_eq!(found[&key("original_context_length")], Value::U32(original), "{extra}");
        let usual = if factor > 1.0 { 0.1 * f64::from(factor).ln() + 1.0 } else { 1.0 };
        let attention = attention.map(|own: f64| Value::F32((own / usual) as f32));
        assert_eq!(found.get(&key("attn_factor")), attention.as_ref(), "{extra}");
    }
}

#[test]
fn a_gemma_says_which_layers_have_windows_where_llama_cpp_would_take_others() {
    let types = |windows: &str| -> Vec<&str> {
        windows
            .chars()
            .map(|c| if c == 'w' { "sliding_attention" } else { "full_attention" })
            .collect()
    };
    let period = |period| Some(Value::U32(period));
    let list = |windows: Vec<bool>| Some(Value::Flags(windows));
    for (family, changes, expected) in [
        ("gemma2", json!({}), None),
        ("gemma2", json!({"layer_types": types("wfwf")}), None),
        ("gemma2", json!({"layer_types": types("wwww")}), period(0)),
        ("gemma2", json!({"layer_types": types("wwfw")}), period(3)),
        ("gemma2", json!({"layer_types": types("fwfw")}), list(vec![false, true, false, true])),
        // Transformers reads that field of a Gemma 3 alone.
        ("gemma2", json!({"sliding_window_pattern": 3}), None),
        ("gemma3_text", json!({"layer_types": types("wwww")}), None),
        ("gemma3_text", json!({"layer_types": types("wfwf")}), period(2)),
        ("gemma3_text", json!({"layer_types": types("wwwf")}), period(4)),
        (
            "gemma3_text",
            json!({"layer_types": types("wwff")}),
            list(vec![true, true, false, false]),
        ),
        ("gemma3_text", json!({"sliding_window_pattern": 3}), period(3)),
        ("gemma3_text", json!({"sliding_window_pattern": 3, "layer_types": types("wwww")}), None),
    ] {
        let mut changes = gemma(family, changes);
        changes["num_hidden_layers"] = json!(4);
        let family = family.trim_end_matches("_text");
        let found =
            described(&changes).remove(&format!("{family}.attention.sliding_window_pattern"));
        assert_eq!(found, expected, "{changes}");
    }
}

#[test]
fn queries_of_a_gemma_are_scaled_where_its_scores_are_divided_by_an_unusual_number() {
    for (family, changes, part, expected) in [
        ("gemma2", json!({}), "self_attn.q_proj", Change::None),
        (
            "gemma2",
            json!({"query_pre_attn_scalar": 16}),
            "self_attn.q_proj",
            Change::Scaled { factor: 0.5 },
        ),
        ("gemma2", json!({"query_pre_attn_scalar": 16}), "self_attn.k_proj", Change::None),
        ("gemma3_text", json!({}), "self_attn.q_norm", Change::Norm { factor: 1.0 }),
        (
            "gemma3_text",
            json!({"query_pre_attn_scalar": 16}),
            "self_attn.q_norm",
            Change::Norm { factor: 0.5 },
        ),
        (
            "gemma3_text",
            json!({"query_pre_attn_scalar": 16}),
            "self_attn.k_norm",
            Change::Norm { factor: 1.0 },
        ),
        ("gemma3_text", json!({"query_pre_attn_scalar": 16}), "self_attn.q_proj", Change::None),
        // The largest of each family divides by another number: 12 / 2 here.
        (
            "gemma2",
            json!({"query_pre_attn_scalar": 6, "num_hidden_layers": 46, "hidden_size": 12, "head_dim": 4}),
            "self_attn.q_proj",
            Change::None,
        ),
        (
            "gemma3_text",
            json!({"query_pre_attn_scalar": 6, "num_hidden_layers": 62, "hidden_size": 12, "head_dim": 4}),
            "self_attn.q_norm",
            Change::Norm { factor: 1.0 },
        ),
    ] {
        let config = changed(llama(), &gemma(family, changes.clone()));
        let architecture = Architecture::read(&config).expect("read");
        let place = architecture.place(&format!("model.layers.0.{part}.weight"));
        assert_eq!(place.map(|(_, change)| change), Some(expected), "{family} {changes} {part}");
    }
}
