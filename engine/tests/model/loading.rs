//! Reading model directories and checkpoints: formats, names, and what is refused.

use std::path::Path;

use serde_json::{Value, json};
use tunesmith_core::hyperparameters::AdapterConfig;
use tunesmith_engine::{EngineError, NamedTensor, TrainableModel};

use crate::device::test_device;
use crate::support::{
    model_dir, tiny_config, tiny_ids, tiny_model, tiny_shapes, tiny_tensors, write_safetensors,
};

fn load(dir: &Path) -> Result<TrainableModel, EngineError> {
    TrainableModel::load(dir, &AdapterConfig::full(), 0, &test_device())
}

fn load_error(dir: &Path) -> String {
    load(dir).unwrap_err().to_string()
}

fn logits(model: &TrainableModel) -> Vec<f32> {
    model.logits(&tiny_ids(7, 1), &[6]).unwrap().remove(0)
}

fn untied_config() -> Value {
    let mut config = tiny_config();
    config["tie_word_embeddings"] = json!(false);
    config
}

#[test]
fn full_model_gives_back_every_weight_under_its_own_name() {
    for config in [tiny_config(), untied_config()] {
        let tensors = tiny_tensors(&config);
        let dir = model_dir(&config, &tensors);
        assert_eq!(load(dir.path()).unwrap().trainable_tensors().unwrap(), tensors);
    }
}

#[test]
fn lora_tensors_have_the_names_and_shapes_of_peft() {
    let adapter = AdapterConfig {
        r: 3,
        target_modules: vec!["k_proj".to_owned(), "down_proj".to_owned()],
        ..AdapterConfig::default()
    };
    let tensors = tiny_model(&adapter).trainable_tensors().unwrap();
    let shapes: Vec<(&str, &[usize])> =
        tensors.iter().map(|t| (t.name.as_str(), t.shape.as_slice())).collect();
    let expected: [(&str, &[usize]); 8] = [
        ("base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight", &[3, 24]),
        ("base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight", &[20, 3]),
        ("base_model.model.model.layers.0.mlp.down_proj.lora_A.weight", &[3, 40]),
        ("base_model.model.model.layers.0.mlp.down_proj.lora_B.weight", &[24, 3]),
        ("base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight", &[3, 24]),
        ("base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight", &[20, 3]),
        ("base_model.model.model.layers.1.mlp.down_proj.lora_A.weight", &[3, 40]),
        ("base_model.model.model.layers.1.mlp.down_proj.lora_B.weight", &[24, 3]),
    ];
    assert_eq!(shapes, expected);
}

#[test]
fn untied_head_is_the_one_that_is_used() {
    let config = untied_config();
    let mut tensors = tiny_tensors(&config);
    let before = logits(&load(model_dir(&config, &tensors).path()).unwrap());
    let head = tensors.last_mut().unwrap();
    assert_eq!(head.name, "lm_head.weight");
    head.data.iter_mut().for_each(|value| *value *= 2.0);
    let after = logits(&load(model_dir(&config, &tensors).path()).unwrap());
    for (before, after) in before.iter().zip(&after) {
        assert!((after - 2.0 * before).abs() < 1e-5);
    }
}

#[test]
fn sharded_model_equals_the_single_file() {
    let config = tiny_config();
    let tensors = tiny_tensors(&config);
    let single = model_dir(&config, &tensors);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let (first, second) = tensors.split_at(8);
    let files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let mut weight_map = serde_json::Map::new();
    for (file, tensors) in files.iter().zip([first, second]) {
        write_safetensors(&dir.path().join(file), tensors);
        weight_map.extend(tensors.iter().map(|t| (t.name.clone(), json!(file))));
    }
    let index_path = dir.path().join("model.safetensors.index.json");
    std::fs::write(&index_path, json!({"weight_map": weight_map}).to_string()).unwrap();
    assert_eq!(logits(&load(dir.path()).unwrap()), logits(&load(single.path()).unwrap()));

    let (name, _) = weight_map.iter_mut().next().unwrap();
    let name = name.clone();
    weight_map[&name] = json!("../elsewhere.safetensors");
    std::fs::write(&index_path, json!({"weight_map": weight_map}).to_string()).unwrap();
    assert!(load_error(dir.path()).contains("no file name"));
}

#[test]
fn half_precision_weights_are_widened_exactly() {
    type Narrow = fn(f32) -> [u8; 2];
    type Widen = fn([u8; 2]) -> f32;
    let formats: [(safetensors::Dtype, Narrow, Widen); 2] = [
        (
            safetensors::Dtype::BF16,
            |x| half::bf16::from_f32(x).to_le_bytes(),
            |b| half::bf16::from_le_bytes(b).to_f32(),
        ),
        (
            safetensors::Dtype::F16,
            |x| half::f16::from_f32(x).to_le_bytes(),
            |b| half::f16::from_le_bytes(b).to_f32(),
        ),
    ];
    let config = tiny_config();
    let tensors = tiny_tensors(&config);
    for (dtype, narrow, widen) in formats {
        let dir = model_dir(&config, &tensors);
        let bytes: Vec<Vec<u8>> = tensors
            .iter()
            .map(|tensor| tensor.data.iter().flat_map(|&x| narrow(x)).collect())
            .collect();
        let views = tensors.iter().zip(&bytes).map(|(tensor, bytes)| {
            let view = safetensors::tensor::TensorView::new(dtype, tensor.shape.clone(), bytes);
            (tensor.name.clone(), view.unwrap())
        });
        let file = safetensors::serialize(views, None).unwrap();
        std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
        for (tensor, loaded) in
            tensors.iter().zip(load(dir.path()).unwrap().trainable_tensors().unwrap())
        {
            let expected: Vec<f32> = tensor.data.iter().map(|&x| widen(narrow(x))).collect();
            assert_eq!(loaded.data, expected, "{}", tensor.name);
        }
    }
}

#[test]
fn missing_weight_is_named() {
    let config = tiny_config();
    for i in 0..tiny_shapes(&config).len() {
        let mut tensors = tiny_tensors(&config);
        let missing = tensors.remove(i);
        let message = load_error(model_dir(&config, &tensors).path());
        assert!(message.contains(&missing.name) && message.contains("missing"), "{message}");
    }
}

#[test]
fn unused_weight_is_named() {
    let config = tiny_config();
    let mut tensors = tiny_tensors(&config);
    let name = "model.layers.1.self_attn.q_proj.bias".to_owned();
    tensors.push(NamedTensor { name: name.clone(), shape: vec![40], data: vec![0.0; 40] });
    let message = load_error(model_dir(&config, &tensors).path());
    assert!(message.contains(&name), "{message}");
}

#[test]
fn misshapen_weight_is_named_with_both_shapes() {
    let config = tiny_config();
    let mut tensors = tiny_tensors(&config);
    tensors[3].shape.swap(0, 1);
    let message = load_error(model_dir(&config, &tensors).path());
    assert!(message.contains("k_proj") && message.contains("[24, 20]"), "{message}");
}

#[test]
fn head_stored_beside_a_tied_embedding_must_equal_it() {
    let config = tiny_config();
    let mut tensors = tiny_tensors(&config);
    let head = NamedTensor { name: "lm_head.weight".to_owned(), ..tensors[0].clone() };
    tensors.push(head);
    assert!(load(model_dir(&config, &tensors).path()).is_ok());
    tensors.last_mut().unwrap().data[0] += 1.0;
    let message = load_error(model_dir(&config, &tensors).path());
    assert!(message.contains("lm_head.weight"), "{message}");
}

#[test]
fn rotary_frequencies_of_old_checkpoints_are_ignored() {
    let config = tiny_config();
    let mut tensors = tiny_tensors(&config);
    tensors.push(NamedTensor {
        name: "model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(),
        shape: vec![5],
        data: vec![0.0; 5],
    });
    assert!(load(model_dir(&config, &tensors).path()).is_ok());
}

#[test]
fn directory_without_weights_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), tiny_config().to_string()).unwrap();
    let message = load_error(dir.path());
    assert!(message.contains("model.safetensors"), "{message}");
    assert!(load_error(&dir.path().join("nowhere")).contains("config.json"));
}

#[test]
fn file_that_is_cut_off_is_refused() {
    let config = tiny_config();
    let dir = model_dir(&config, &tiny_tensors(&config));
    let path = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
    assert!(load(dir.path()).is_err());
    std::fs::write(&path, &bytes[..4]).unwrap();
    assert!(load(dir.path()).is_err());
}

#[test]
fn checkpoint_that_does_not_fit_is_refused_and_changes_nothing() {
    let adapter = AdapterConfig { r: 3, ..AdapterConfig::default() };
    let mut model = tiny_model(&adapter);
    let good = model.trainable_tensors().unwrap();
    let mut missing = good.clone();
    let removed = missing.pop().unwrap();
    let mut unknown = good.clone();
    unknown.push(NamedTensor { name: "other".to_owned(), shape: vec![1], data: vec![0.0] });
    let mut misshapen = good.clone();
    misshapen[0].shape.swap(0, 1);
    let mut twice = good.clone();
    twice.push(good[0].clone());
    let cases = [
        (missing, removed.name.as_str()),
        (unknown, "other"),
        (misshapen, good[0].name.as_str()),
        (twice, "twice"),
    ];
    for (tensors, word) in cases {
        let error = model.load_trainable_tensors(tensors).unwrap_err();
        assert!(matches!(error, EngineError::Checkpoint(_)));
        assert!(error.to_string().contains(word), "{error}");
        assert_eq!(model.trainable_tensors().unwrap(), good);
    }
}
