//! Heads and blocks as bytes. That llama.cpp's names are right is tested where its own converter's
//! files are at hand: in the engine, beside the importer that reads them back.

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
    let metadata = [("k".to_owned(), Value::Texts(vec!["é".to_owned()]))];
    let place = Place { name: "w", shape: &[3, 32], kind: TensorType::Q8_0, offset: 64 };
    let bytes = header(&metadata, &[place]);
    let mut expected = b"GGUF\x03\0\0\0".to_vec();
    for count in [1u64, 1] {
        expected.extend(count.to_le_bytes());
    }
    expected.extend([1, 0, 0, 0, 0, 0, 0, 0, b'k', 9, 0, 0, 0, 8, 0, 0, 0]);
    expected.extend([1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0xc3, 0xa9]);
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
        (json!({"sliding_window": 32}), "sliding_window is 32"),
        (json!({"rms_norm_eps": null}), "no rms_norm_eps"),
        (json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}), "\"dynamic\""),
        (
            json!({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16,
                "original_max_position_embeddings": 32}}),
            "beta_fast",
        ),
        (json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}), "original_max"),
        (
            json!({"model_type": "gemma2", "hidden_act": null, "query_pre_attn_scalar": 224,
                "layer_types": ["sliding_attention", "full_attention"]}),
            "query_pre_attn_scalar is 224",
        ),
        (
            json!({"model_type": "gemma2", "hidden_act": null, "query_pre_attn_scalar": 4,
                "layer_types": ["full_attention", "full_attention"]}),
            "layer_types has \"full_attention\" for layer 1",
        ),
    ];
    for (change, word) in words {
        let message = refusal(|config| {
            for (name, value) in change.as_object().expect("an object") {
                config[name] = value.clone();
            }
        });
        assert!(message.contains(word), "{message}");
    }
}
