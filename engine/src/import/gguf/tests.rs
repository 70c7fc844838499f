//! GGUF files made by llama.cpp's converter, against the Hugging Face originals they were made of.
//!
//! `scripts/fixtures/gguf_families.py` makes both, and says which program each id comes from.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::{Value, json};
use tempfile::TempDir;
use tunesmith_core::dataset::ChatTokenizer;

use super::Conversion;

const FAMILIES: [&str; 7] = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"];

/// Those with a tokenizer of another kind than the families above.
const TOKENIZERS: [&str; 4] = ["smollm", "tekken", "gpt-4o", "dbrx"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/gguf").join(name)
}

fn converted(name: &str) -> (TempDir, Value) {
    let conversion = Conversion::read(&fixture(name).join(format!("{name}.gguf")))
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    let dir = tempfile::tempdir().expect("temp dir");
    conversion.write(dir.path()).expect("written");
    (dir, conversion.config)
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).expect("a file")).expect("JSON")
}

#[test]
fn tensors_of_every_family_are_those_of_the_original() {
    for name in FAMILIES {
        let (dir, _) = converted(name);
        let found = fs::read(dir.path().join("model.safetensors")).expect("written");
        let found = SafeTensors::deserialize(&found).expect("written");
        let original = fs::read(fixture(name).join("model.safetensors")).expect("original");
        let original = SafeTensors::deserialize(&original).expect("original");
        assert_eq!(found.len(), original.len(), "{name}");
        for (tensor, view) in original.tensors() {
            let values: Vec<f32> = view
                .data()
                .as_chunks()
                .0
                .iter()
                .map(|&bytes| half::bf16::from_le_bytes(bytes).to_f32())
                .collect();
            let found = found.tensor(&tensor).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(found.shape(), view.shape(), "{name}: {tensor}");
            let found: Vec<f32> = bytemuck::pod_collect_to_vec(found.data());
            assert_eq!(found, values, "{name}: {tensor}");
        }
    }
}

#[test]
fn config_of_every_family_says_what_the_original_says() {
    // GGUF calls Mistral a Llama, a model without a padding token pads with its end, and f32 is
    // what is written.
    let others = ["model_type", "architectures", "pad_token_id", "dtype", "sliding_window"];
    for name in FAMILIES {
        let (_, config) = converted(name);
        let original = json_of(&fixture(name).join("config.json"));
        for (field, value) in original.as_object().expect("an object") {
            if let Some(found) = config.get(field)
                && !others.contains(&field.as_str())
            {
                assert_eq!(found, value, "{name}: {field}");
            }
        }
        let model_type = if name == "mistral" { &json!("llama") } else { &original["model_type"] };
        assert_eq!(&config["model_type"], model_type, "{name}");
        assert_eq!(config["sliding_window"], original["sliding_window"], "{name}");

        let rope = &original["rope_parameters"];
        let global = rope.get("full_attention").unwrap_or(rope);
        assert_eq!(config["rope_theta"], global["rope_theta"], "{name}");
        if let Some(local) = rope.get("sliding_attention").filter(|_| name == "gemma3") {
            assert_eq!(config["rope_local_base_freq"], local["rope_theta"], "{name}");
        }
        for (field, value) in global.as_object().expect("an object") {
            let found = match field.as_str() {
                "rope_theta" => continue,
                "partial_rotary_factor" => &config[field],
                "rope_type" if value == "default" => {
                    assert_eq!(config["rope_scaling"], Value::Null, "{name}");
                    continue;
                }
                _ => &config["rope_scaling"][field],
            };
            let number = |value: &Value| value.as_f64().map(|number| number as f32);
            assert_eq!(number(found), number(value), "{name}: {field}");
            assert!(number(value).is_some() || found == value, "{name}: {field}");
        }
    }
}

#[test]
fn ids_of_awkward_texts_are_those_of_the_reference() {
    for name in FAMILIES.into_iter().chain(TOKENIZERS) {
        let (dir, _) = converted(name);
        let tokenizer = ChatTokenizer::from_dir(dir.path()).expect("tokenizer");
        for entry in json_of(&fixture(name).join("ids.json")).as_array().expect("a list") {
            let text = entry["text"].as_str().expect("text");
            let expected: Vec<u32> = serde_json::from_value(entry["ids"].clone()).expect("ids");
            let found = tokenizer.encode_plain(text).expect("ids");
            assert_eq!(found, expected, "{name}: {text:?}");
            // Not the text itself, where the tokenizer changes characters before it looks at them.
            let decoded = tokenizer.decode(&found).expect("text");
            assert_eq!(tokenizer.encode_plain(&decoded).expect("ids"), expected, "{name}");
        }
    }
}
