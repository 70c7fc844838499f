//! Base models from Hugging Face directories and GGUF files.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{Value, write};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device as CandleDevice, Tensor};
use serde_json::Value as Json;
use tunesmith_core::dataset::{
    ChatTokenizer, Example, Message, Role, Row, TokenizeOptions, tokenize_row,
};
use tunesmith_core::hyperparameters::AdapterConfig;
use tunesmith_engine::import::import_source;
use tunesmith_engine::{NamedTensor, TrainableModel};

use crate::device::test_device;
use crate::support::{
    CONTEXT, HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KEY_VALUE_HEADS, LAYERS, MERGE, SPECIAL,
    TEMPLATE, read_safetensors, vocabulary, weights, write_model,
};

fn logits(dir: &Path) -> Vec<f32> {
    let model =
        TrainableModel::load(dir, &AdapterConfig::full(), 0, &test_device()).expect("a model");
    model.logits(&[1, 90, 80, 70, 2, 13], &[0, 1, 2, 3, 4, 5]).expect("logits").concat()
}

/// The tiny model's metadata as llama.cpp's converter writes it.
fn metadata() -> Vec<(&'static str, Value)> {
    let text = |text: &str| Value::String(text.to_owned());
    let number = |number: usize| Value::U32(number as u32);
    let vocabulary = vocabulary();
    let kind = |token: &String| Value::I32(if SPECIAL.contains(&token.as_str()) { 3 } else { 1 });
    let types = vocabulary.iter().map(kind).collect();
    let tokens = vocabulary.iter().map(|token| text(token)).collect();
    vec![
        ("general.architecture", text("llama")),
        ("llama.block_count", number(LAYERS)),
        ("llama.context_length", number(CONTEXT as usize)),
        ("llama.embedding_length", number(HIDDEN)),
        ("llama.feed_forward_length", number(INTERMEDIATE)),
        ("llama.attention.head_count", number(HEADS)),
        ("llama.attention.head_count_kv", number(KEY_VALUE_HEADS)),
        ("llama.rope.freq_base", Value::F32(10_000.0)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("llama.rope.dimension_count", number(HEAD_DIM)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("gpt-2")),
        ("tokenizer.ggml.tokens", Value::Array(tokens)),
        ("tokenizer.ggml.token_type", Value::Array(types)),
        ("tokenizer.ggml.merges", Value::Array(vec![text(MERGE)])),
        ("tokenizer.ggml.bos_token_id", number(1)),
        ("tokenizer.ggml.eos_token_id", number(2)),
        ("tokenizer.ggml.unknown_token_id", number(0)),
        ("tokenizer.chat_template", text(TEMPLATE)),
    ]
}

fn gguf_name(name: &str) -> String {
    let names = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    names.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}

/// The tiny model's weights as llama.cpp's converter writes them: q and k rows permuted.
fn tensors() -> Vec<(String, QTensor)> {
    let convert = |NamedTensor { name, shape, data }: NamedTensor| {
        let mut tensor = Tensor::from_vec(data, shape.clone(), &CandleDevice::Cpu).expect("tensor");
        let heads = [("q_proj", HEADS), ("k_proj", KEY_VALUE_HEADS)];
        if let Some((_, heads)) = heads.iter().find(|(module, _)| name.contains(module)) {
            tensor = tensor
                .reshape((*heads, 2, HEAD_DIM / 2, HIDDEN))
                .and_then(|tensor| tensor.transpose(1, 2))
                .and_then(|tensor| tensor.contiguous())
                .and_then(|tensor| tensor.reshape(shape))
                .expect("permuted");
        }
        (gguf_name(&name), QTensor::quantize(&tensor, GgmlDType::F32).expect("f32"))
    };
    weights().into_iter().map(convert).collect()
}

fn write_gguf(
    dir: &Path,
    metadata: &[(&'static str, Value)],
    tensors: &[(String, QTensor)],
) -> PathBuf {
    let path = dir.join("tiny.F32.gguf");
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    write(&mut fs::File::create(&path).expect("file"), &metadata, &tensors).expect("gguf");
    path
}

fn json_file(path: &Path) -> Json {
    serde_json::from_slice(&fs::read(path).expect("file")).expect("json")
}

#[test]
fn a_gguf_gives_the_weights_logits_and_tokenizer_of_its_hugging_face_original() {
    let dir = tempfile::tempdir().expect("temp dir");
    let original = dir.path().join("original");
    write_model(&original);
    let gguf = write_gguf(dir.path(), &metadata(), &tensors());
    let out = dir.path().join("out");
    let imported = import_source(&gguf, &out).expect("imported");
    assert_eq!((imported.name.as_str(), imported.context_length), ("tiny", CONTEXT));
    assert_eq!(imported.config["tie_word_embeddings"], true);
    assert_eq!(imported.config["rms_norm_eps"], 1e-5);
    assert_eq!(
        read_safetensors(&out.join("model.safetensors")),
        read_safetensors(&original.join("model.safetensors"))
    );
    assert_eq!(logits(&out), logits(&original));

    let tokenizer = json_file(&out.join("tokenizer.json"));
    assert_eq!(tokenizer["model"]["merges"], serde_json::json!([MERGE]));
    assert_eq!(tokenizer["added_tokens"].as_array().map(Vec::len), Some(3));
    let config = json_file(&out.join("tokenizer_config.json"));
    assert_eq!(config["eos_token"], "<|im_end|>");
    assert_eq!(config["pad_token"], "<|im_end|>");
    assert_eq!(config["chat_template"], TEMPLATE);
    assert_eq!(
        config["additional_special_tokens"],
        serde_json::json!(["<|im_start|>", "<|im_end|>"])
    );
}

#[test]
fn a_separate_head_unties_the_embedding() {
    let dir = tempfile::tempdir().expect("temp dir");
    let mut tensors = tensors();
    let head =
        Tensor::ones((vocabulary().len(), HIDDEN), candle_core::DType::F32, &CandleDevice::Cpu);
    let head = QTensor::quantize(&head.expect("ones"), GgmlDType::F32).expect("f32");
    tensors.push(("output.weight".to_owned(), head));
    let out = dir.path().join("out");
    let imported =
        import_source(&write_gguf(dir.path(), &metadata(), &tensors), &out).expect("imported");
    assert_eq!(imported.config["tie_word_embeddings"], false);
    let tensors = read_safetensors(&out.join("model.safetensors"));
    assert!(tensors["lm_head.weight"].1.iter().all(|&value| value == 1.0));
}

#[test]
fn what_a_gguf_lacks_or_has_too_much_is_named() {
    let text = |text: &str| Some(Value::String(text.to_owned()));
    let cases: [(&str, Option<Value>, &str); 8] = [
        ("tokenizer.ggml.model", text("bert"), "byte-level"),
        ("general.architecture", text("mamba"), "\"mamba\""),
        ("general.architecture", None, "general.architecture"),
        ("llama.context_length", None, "llama.context_length"),
        ("llama.attention.head_count", text("four"), "llama.attention.head_count"),
        ("tokenizer.ggml.model", text("llama"), "tokenizer.ggml.scores"),
        ("tokenizer.ggml.pre", text("falcon"), "\"falcon\""),
        ("llama.feed_forward_length", Some(Value::U32(41)), "blk.0.ffn_gate.weight"),
    ];
    for (key, value, word) in cases {
        let dir = tempfile::tempdir().expect("temp dir");
        let mut metadata = metadata();
        metadata.retain(|(name, _)| *name != key);
        metadata.extend(value.map(|value| (key, value)));
        refused(dir.path(), &write_gguf(dir.path(), &metadata, &tensors()), word);
    }

    let dir = tempfile::tempdir().expect("temp dir");
    let mut fewer = tensors();
    fewer.retain(|(name, _)| name != "blk.1.attn_k.weight");
    refused(dir.path(), &write_gguf(dir.path(), &metadata(), &fewer), "blk.1.attn_k.weight");
    let mut more = tensors();
    let bias = Tensor::zeros(HIDDEN, candle_core::DType::F32, &CandleDevice::Cpu).expect("zeros");
    more.push((
        "blk.0.attn_q.bias".to_owned(),
        QTensor::quantize(&bias, GgmlDType::F32).expect("f32"),
    ));
    refused(dir.path(), &write_gguf(dir.path(), &metadata(), &more), "blk.0.attn_q.bias");

    let torn = dir.path().join("torn.gguf");
    fs::write(&torn, b"GGUF\x03\0\0\0").expect("write");
    refused(dir.path(), &torn, "torn.gguf");
}

#[test]
fn a_gguf_without_chat_template_is_a_base_model_for_plain_text() {
    let dir = tempfile::tempdir().expect("temp dir");
    let mut metadata = metadata();
    metadata.retain(|(name, _)| *name != "tokenizer.chat_template");
    let out = dir.path().join("out");
    let imported =
        import_source(&write_gguf(dir.path(), &metadata, &tensors()), &out).expect("imported");
    assert!(!imported.has_chat_template);
    let tokenizer = ChatTokenizer::from_dir(&out).expect("tokenizer");
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
