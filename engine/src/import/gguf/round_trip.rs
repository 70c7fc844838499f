//! Models that are written as GGUF and read back, against what llama.cpp's converter writes of them.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use half::f16;
use safetensors::SafeTensors;
use serde_json::{Value as Json, json};
use tempfile::TempDir;
use tunesmith_core::gguf::{ModelFiles, Plan, Source, StorageType};
use tunesmith_core::hyperparameters::AdapterConfig;

use super::Conversion;
use super::file::{GgufFile, Value};
use crate::{Device, TrainableModel};

const MODELS: [&str; 11] = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm", "tekken", "gpt-4o",
    "dbrx",
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/reference/gguf/{name}/{name}.gguf"))
}

/// The GGUF at `path` as a Hugging Face directory.
fn imported(path: &Path) -> TempDir {
    let conversion =
        Conversion::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let dir = tempfile::tempdir().expect("temp dir");
    conversion.write(dir.path()).expect("written");
    dir
}

/// Writes the Hugging Face directory `dir` as a GGUF into it.
fn export(dir: &Path, storage: StorageType) -> PathBuf {
    let read = |name: &str| fs::read(dir.join(name)).expect("a file");
    let weights = read("model.safetensors");
    let weights = SafeTensors::deserialize(&weights).expect("safetensors");
    let shapes = weights.tensors();
    let shapes = shapes.iter().map(|(name, view)| (name.as_str(), view.shape()));
    let files = ModelFiles {
        config: &read("config.json"),
        tokenizer: &read("tokenizer.json"),
        tokenizer_config: &read("tokenizer_config.json"),
        chat_template: None,
        generation_config: Some(&read("generation_config.json")),
    };
    let plan = Plan::new("tiny", &files, shapes, storage).expect("a plan");
    let bytes = plan.bytes();
    let mut content = plan.head;
    for tensor in plan.tensors {
        let values: Vec<f32> = match &tensor.source {
            Source::Values(values) => values.clone(),
            Source::Weight(name) => {
                bytemuck::pod_collect_to_vec(weights.tensor(name).expect("a tensor").data())
            }
        };
        for rows in tensor.pieces() {
            let (from, to) = (rows.start * tensor.columns(), rows.end * tensor.columns());
            content.extend(tensor.encode(values[from..to].to_vec()).expect("finite"));
        }
        content.resize(content.len() + tensor.padding(), 0);
    }
    assert_eq!(content.len() as u64, bytes);
    let path = dir.join(&plan.file_name);
    fs::write(&path, content).expect("written");
    path
}

fn metadata(path: &Path) -> HashMap<String, Value> {
    GgufFile::open(path).expect("a file").1
}

#[test]
fn model_of_every_kind_comes_back_as_it_was_but_for_half_precision() {
    for name in MODELS {
        let dir = imported(&fixture(name));
        let back = imported(&export(dir.path(), StorageType::F16));
        for file in ["config.json", "tokenizer.json", "generation_config.json"] {
            let json = |dir: &TempDir| -> Json {
                serde_json::from_slice(&fs::read(dir.path().join(file)).expect("a file"))
                    .expect("JSON")
            };
            assert_eq!(json(&back), json(&dir), "{name}: {file}");
        }
        let weights = |dir: &TempDir| fs::read(dir.path().join("model.safetensors")).expect("it");
        let (found, expected) = (weights(&back), weights(&dir));
        let found = SafeTensors::deserialize(&found).expect("safetensors");
        let expected = SafeTensors::deserialize(&expected).expect("safetensors");
        assert_eq!(found.len(), expected.len(), "{name}");
        for (tensor, view) in expected.tensors() {
            let values: Vec<f32> = bytemuck::pod_collect_to_vec(view.data());
            let is_matrix = view.shape().len() == 2;
            let rounded =
                |value: f32| if is_matrix { f16::from_f32(value).to_f32() } else { value };
            let values: Vec<f32> = values.into_iter().map(rounded).collect();
            let found: Vec<f32> =
                bytemuck::pod_collect_to_vec(found.tensor(&tensor).expect("a tensor").data());
            assert_eq!(found, values, "{name}: {tensor}");
        }
    }
}

#[test]
fn metadata_is_what_llama_cpps_converter_writes() {
    for name in MODELS {
        let converter = metadata(&fixture(name));
        let ours = metadata(&export(imported(&fixture(name)).path(), StorageType::F16));
        let mut differences = Vec::new();
        for (key, expected) in &converter {
            // What the model is called, and scores, of which only the order counts.
            if key.starts_with("general.") || key == "tokenizer.ggml.scores" {
                continue;
            }
            if ours.get(key) != Some(expected) {
                let short = |value: Option<&Value>| {
                    format!("{value:?}").chars().take(200).collect::<String>()
                };
                differences.push(format!(
                    "{key}: {} {}",
                    short(ours.get(key)),
                    short(Some(expected))
                ));
            }
        }
        assert!(differences.is_empty(), "{name}: {differences:#?}");
        assert_eq!(ours["general.architecture"], converter["general.architecture"], "{name}");
    }
}

/// Logits of a Hugging Face directory.
fn logits(dir: &Path) -> Vec<f32> {
    let model =
        TrainableModel::load(dir, &AdapterConfig::full(), 0, &Device::cpu()).expect("a model");
    let ids: Vec<u32> = (0..20).map(|i| (i * 37 + 5) % 300).collect();
    model.logits(&ids, &(0..ids.len()).collect::<Vec<_>>()).expect("logits").concat()
}

fn change(config: &mut Json, changes: &Json) {
    for (name, value) in changes.as_object().expect("an object") {
        config[name] = value.clone();
    }
}

#[test]
fn unusual_windows_scalings_and_divisors_come_back_and_compute_the_same() {
    let types = |windows: &str| -> Vec<&str> {
        let kind = |c| if c == 'w' { "sliding_attention" } else { "full_attention" };
        windows.chars().map(kind).collect()
    };
    let yarn = |factor: f64| {
        json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128,
            "attention_factor": factor})
    };
    // Of a model, what is changed in its config, and what of that comes back as something else.
    for (name, changes, otherwise) in [
        // Both divide by the width of a head when they come back: their weights are others.
        (
            "gemma2",
            json!({"query_pre_attn_scalar": 24, "layer_types": types("fw")}),
            json!({"query_pre_attn_scalar": 8}),
        ),
        (
            "gemma3",
            json!({"query_pre_attn_scalar": 24, "layer_types": types("wfwfwfw")}),
            json!({"query_pre_attn_scalar": 8}),
        ),
        ("gemma2", json!({"layer_types": types("ww")}), json!({})),
        ("gemma3", json!({"layer_types": types("wwffwfw")}), json!({})),
        ("qwen2", json!({"rope_scaling": yarn(1.5)}), json!({})),
        // No more than the window, which so short a file does not need.
        (
            "mistral",
            json!({"model_type": "mistral", "sliding_window": 20}),
            json!({"model_type": "llama", "max_position_embeddings": 20, "sliding_window": null}),
        ),
    ] {
        let dir = imported(&fixture(name));
        let usual = logits(dir.path());
        let path = dir.path().join("config.json");
        let config = |dir: &TempDir| -> Json {
            let bytes = fs::read(dir.path().join("config.json")).expect("read");
            serde_json::from_slice(&bytes).expect("JSON")
        };
        let mut expected = config(&dir);
        change(&mut expected, &changes);
        fs::write(&path, expected.to_string()).expect("written");
        let changed = logits(dir.path());
        let back = imported(&export(dir.path(), StorageType::F16));

        change(&mut expected, &otherwise);
        let mut found = config(&back);
        for name in expected.as_object().expect("an object").keys() {
            // A quotient in 32 bits, where it is there.
            let own = &expected["rope_scaling"]["attention_factor"];
            if name == "rope_scaling" && own.is_number() {
                let back = found[name]["attention_factor"].take();
                let distance = back.as_f64().expect("a number") - own.as_f64().expect("a number");
                assert!(distance.abs() < 1e-6, "{back} of {own}");
                found[name]["attention_factor"] = own.clone();
            }
            assert_eq!(found[name], expected[name], "{name} of {changes}");
        }
        let back = logits(back.path());
        let distance =
            |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        let greatest = changed.iter().fold(0f32, |greatest, value| greatest.max(value.abs()));
        assert!(distance(&back, &changed) < 0.01 * greatest, "{name} {changes}");
        if name != "mistral" {
            assert!(distance(&usual, &changed) > 0.02 * greatest, "{name} {changes} counts");
        }
    }
}
