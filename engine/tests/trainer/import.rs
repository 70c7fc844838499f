//! Base models from Hugging Face directories and GGUF files.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};
use tunesmith_core::dataset::{
    ChatTokenizer, Example, Message, Role, Row, TokenizeOptions, tokenize_row,
};
use tunesmith_core::hyperparameters::AdapterConfig;
use tunesmith_engine::TrainableModel;
use tunesmith_engine::import::import_source;

use crate::device::test_device;
use crate::support::{CONTEXT, MERGE, TEMPLATE, read_safetensors, write_model};

fn logits(dir: &Path) -> Vec<f32> {
    let model =
        TrainableModel::load(dir, &AdapterConfig::full(), 0, &test_device()).expect("a model");
    model.logits(&[1, 90, 80, 70, 2, 13], &[0, 1, 2, 3, 4, 5]).expect("logits").concat()
}

/// A file that `scripts/fixtures/gguf_variants.py` made.
fn variant(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/gguf/variants").join(name)
}

fn json_file(path: &Path) -> Json {
    serde_json::from_slice(&fs::read(path).expect("file")).expect("json")
}

#[test]
fn a_gguf_gives_the_weights_logits_and_tokenizer_of_its_hugging_face_original() {
    let dir = tempfile::tempdir().expect("temp dir");
    let imported = import_source(&variant("tiny.F32.gguf"), dir.path()).expect("imported");
    assert_eq!((imported.name.as_str(), imported.context_length), ("tiny", CONTEXT));
    assert_eq!(imported.config["tie_word_embeddings"], true);
    assert_eq!(imported.config["rms_norm_eps"], 1e-5);
    assert_eq!(
        read_safetensors(&dir.path().join("model.safetensors")),
        read_safetensors(&variant("model.safetensors"))
    );
    assert_eq!(logits(dir.path()), logits(&variant("")));

    let tokenizer = json_file(&dir.path().join("tokenizer.json"));
    assert_eq!(tokenizer["model"]["merges"], json!([MERGE]));
    assert_eq!(tokenizer["added_tokens"].as_array().map(Vec::len), Some(3));
    let config = json_file(&dir.path().join("tokenizer_config.json"));
    assert_eq!(config["eos_token"], "<|im_end|>");
    assert_eq!(config["pad_token"], "<|im_end|>");
    assert_eq!(config["chat_template"], TEMPLATE);
    assert_eq!(config["additional_special_tokens"], json!(["<|im_start|>", "<|im_end|>"]));
}

#[test]
fn a_separate_head_unties_the_embedding() {
    let dir = tempfile::tempdir().expect("temp dir");
    let imported = import_source(&variant("separate-head.gguf"), dir.path()).expect("imported");
    assert_eq!(imported.config["tie_word_embeddings"], false);
    let tensors = read_safetensors(&dir.path().join("model.safetensors"));
    assert!(tensors["lm_head.weight"].1.iter().all(|&value| value == 1.0));
}

#[test]
fn what_a_gguf_lacks_or_has_too_much_is_named() {
    for (name, word) in [
        ("tokenizer-bert", "byte-level"),
        ("architecture-mamba", "\"mamba\""),
        ("no-architecture", "general.architecture"),
        ("no-context-length", "llama.context_length"),
        ("head-count-in-words", "llama.attention.head_count"),
        ("no-scores", "tokenizer.ggml.scores"),
        ("pre-tokenizer-falcon", "\"falcon\""),
        ("wider-feed-forward", "blk.0.ffn_gate.weight"),
        ("no-keys", "blk.1.attn_k.weight"),
        ("query-bias", "blk.0.attn_q.bias"),
    ] {
        let dir = tempfile::tempdir().expect("temp dir");
        refused(dir.path(), &variant(&format!("{name}.gguf")), word);
    }

    let dir = tempfile::tempdir().expect("temp dir");
    let torn = dir.path().join("torn.gguf");
    fs::write(&torn, b"GGUF\x03\0\0\0").expect("write");
    refused(dir.path(), &torn, "torn.gguf");
}

#[test]
fn a_gguf_without_chat_template_is_a_base_model_for_plain_text() {
    let dir = tempfile::tempdir().expect("temp dir");
    let imported = import_source(&variant("no-chat-template.gguf"), dir.path()).expect("imported");
    assert!(!imported.has_chat_template);
    let tokenizer = ChatTokenizer::from_dir(dir.path()).expect("tokenizer");
    assert!(!tokenizer.has_chat_template());
    let example = Example::Text { text: "<s>".to_owned() };
    let options = TokenizeOptions { max_seq_length: 32, prompt_loss_weight: 0.1 };
    let row = tokenize_row(&tokenizer, &Row { line: 1, example }, &options, "training_file")
        .expect("tokens");
    assert!(row.ids.len() > 2 && !row.ids.contains(&1), "{:?}", row.ids);
}

fn refused(dir: &Path, source: &Path, word: &str) {
    let out = dir.join("out");
    let error = import_source(source, &out).expect_err(word).to_string();
    assert!(error.contains(word), "{word}: {error}");
    assert!(!out.join("model.safetensors").exists(), "{word}");
}

#[test]
fn a_directory_is_carried_over_whole_and_without_strangers() {
    let dir = tempfile::tempdir().expect("temp dir");
    let source = dir.path().join("Tiny-1B");
    write_model(&source);
    fs::write(source.join("train.log"), "x").expect("write");
    let out = dir.path().join("out");
    let imported = import_source(&source, &out).expect("imported");
    assert_eq!(imported.name, "Tiny-1B");
    assert_eq!(
        imported.files,
        [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json"
        ]
    );
    assert_eq!(logits(&out), logits(&source));
    for taken in [&out, &source] {
        let error = import_source(&source, taken).expect_err("not empty").to_string();
        assert!(error.contains("is not empty"), "{error}");
    }
    assert_eq!(logits(&out), logits(&source));
}

#[test]
fn a_directory_that_is_no_model_is_refused_by_what_is_wrong() {
    type Spoil = fn(&Path);
    let cases: [(&str, Spoil); 8] = [
        ("config.json", |dir| fs::remove_file(dir.join("config.json")).expect("file")),
        ("tokenizer", |dir| fs::remove_file(dir.join("tokenizer.json")).expect("file")),
        ("save_pretrained", |dir| {
            fs::rename(dir.join("tokenizer.json"), dir.join("tokenizer.model")).expect("file");
        }),
        ("model-00002-of-00002.safetensors", |dir| {
            let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors",
                "b": "model-00002-of-00002.safetensors"}}"#;
            fs::rename(dir.join("model.safetensors"), dir.join("model-00001-of-00002.safetensors"))
                .expect("file");
            fs::write(dir.join("model.safetensors.index.json"), index).expect("file");
        }),
        ("\"gemma\"", |dir| {
            let text = fs::read_to_string(dir.join("config.json")).expect("file");
            fs::write(dir.join("config.json"), text.replace("\"llama\"", "\"gemma\""))
                .expect("file");
        }),
        ("safetensors", |dir| fs::remove_file(dir.join("model.safetensors")).expect("file")),
        ("fetch it again", |dir| {
            let path = dir.join("model.safetensors");
            let bytes = fs::read(&path).expect("file");
            fs::write(&path, &bytes[..bytes.len() - 4]).expect("file");
        }),
        ("no file name", |dir| {
            let index = r#"{"weight_map": {"model.norm.weight": "../x.safetensors"}}"#;
            fs::remove_file(dir.join("model.safetensors")).expect("file");
            fs::write(dir.join("model.safetensors.index.json"), index).expect("file");
        }),
    ];
    for (word, spoil) in cases {
        let dir = tempfile::tempdir().expect("temp dir");
        let source = dir.path().join("source");
        write_model(&source);
        spoil(&source);
        refused(dir.path(), &source, word);
    }
}

#[test]
fn a_template_file_and_a_list_of_end_tokens_are_carried_over_and_read() {
    let dir = tempfile::tempdir().expect("temp dir");
    let source = dir.path().join("source");
    write_model(&source);
    let config_path = source.join("tokenizer_config.json");
    let mut config = json_file(&config_path);
    config.as_object_mut().expect("object").remove("chat_template");
    fs::write(&config_path, config.to_string()).expect("write");
    fs::write(source.join("chat_template.jinja"), TEMPLATE).expect("write");
    fs::write(source.join("generation_config.json"), r#"{"eos_token_id": [2, 1]}"#).expect("write");
    let out = dir.path().join("out");
    let imported = import_source(&source, &out).expect("imported");
    assert!(imported.has_chat_template);
    let tokenizer = ChatTokenizer::from_dir(&out).expect("tokenizer");
    assert_eq!(tokenizer.eos_ids(), [2, 1]);
    let messages = [Message::new(Role::User, "a")];
    assert!(!tokenizer.encode_chat(&messages, None, true).expect("ids").is_empty());
}
