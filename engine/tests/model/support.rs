//! The real model, the references, and tiny random models.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;
use tunesmith_core::hyperparameters::AdapterConfig;
use tunesmith_engine::batch::Segment;
use tunesmith_engine::{Batch, NamedTensor, TrainableModel};

use crate::device::test_device;

/// The directory of SmolLM2-135M-Instruct in f32. Fails when it is not there: a test that is
/// skipped in silence proves nothing.
pub(crate) fn smollm2() -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let dir = std::env::var_os("TUNESMITH_TEST_MODEL")
        .map_or_else(|| workspace.join("target/test-models/SmolLM2-135M-Instruct"), PathBuf::from);
    assert!(
        dir.join("model.safetensors").exists(),
        "no model at {}: `scripts/test-setup.sh` makes it, or set TUNESMITH_TEST_MODEL to a \
         Hugging Face directory of SmolLM2-135M-Instruct",
        dir.display()
    );
    dir
}

/// SmolLM2 with an adapter, on the device of the tests.
pub(crate) fn load_smollm2(adapter: &AdapterConfig) -> TrainableModel {
    TrainableModel::load(&smollm2(), adapter, 0, &test_device()).unwrap()
}

/// A file of `tests/reference`, whose README defines every number.
pub(crate) fn reference(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(reference_path(name)).unwrap()).unwrap()
}

pub(crate) fn reference_path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference").join(name)
}

/// A JSON array of numbers.
pub(crate) fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// A JSON array of token ids.
pub(crate) fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|x| u32::try_from(x.as_u64().unwrap()).unwrap()).collect()
}

/// Tensors of a safetensors file of f32 or bf16.
pub(crate) fn read_safetensors(path: &Path) -> HashMap<String, NamedTensor> {
    let bytes = std::fs::read(path).unwrap();
    SafeTensors::deserialize(&bytes)
        .unwrap()
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let data = match view.dtype() {
                Dtype::BF16 => view
                    .data()
                    .as_chunks()
                    .0
                    .iter()
                    .map(|&b| half::bf16::from_le_bytes(b).to_f32())
                    .collect(),
                Dtype::F32 => {
                    view.data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
                }
                other => panic!("{name} is {other:?}"),
            };
            (name.clone(), NamedTensor { name, shape: view.shape().to_vec(), data })
        })
        .collect()
}

/// Several sequences in one batch; each with the weight of every token as a target.
pub(crate) fn pack(rows: &[(Vec<u32>, Vec<f32>)]) -> Batch {
    let mut batch = Batch {
        ids: Vec::new(),
        weights: Vec::new(),
        segments: Vec::new(),
        rows: (0..rows.len()).collect(),
    };
    for (ids, weights) in rows {
        let start = batch.ids.len();
        batch.ids.extend(ids);
        batch.weights.extend(weights);
        batch.segments.push(Segment::whole(start..batch.ids.len()));
    }
    batch
}

/// A `config.json` of a small decoder whose heads are wider than its hidden size together, with
/// two query heads to a key head and a vocabulary that is no multiple of anything.
pub(crate) fn tiny_config() -> Value {
    json!({
        "model_type": "llama", "vocab_size": 101, "hidden_size": 24, "intermediate_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 10, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 512, "tie_word_embeddings": true, "hidden_act": "silu",
    })
}

/// The names and shapes that a config asks for.
pub(crate) fn tiny_shapes(config: &Value) -> Vec<(String, Vec<usize>)> {
    let size = |name: &str| usize::try_from(config[name].as_u64().unwrap()).unwrap();
    let (hidden, inner, vocabulary) =
        (size("hidden_size"), size("intermediate_size"), size("vocab_size"));
    let query = size("num_attention_heads") * size("head_dim");
    let key_value = size("num_key_value_heads") * size("head_dim");
    let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![vocabulary, hidden])];
    for layer in 0..size("num_hidden_layers") {
        let parts: [(&str, Vec<usize>); 9] = [
            ("input_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![query, hidden]),
            ("self_attn.k_proj", vec![key_value, hidden]),
            ("self_attn.v_proj", vec![key_value, hidden]),
            ("self_attn.o_proj", vec![hidden, query]),
            ("post_attention_layernorm", vec![hidden]),
            ("mlp.gate_proj", vec![inner, hidden]),
            ("mlp.up_proj", vec![inner, hidden]),
            ("mlp.down_proj", vec![hidden, inner]),
        ];
        shapes.extend(
            parts.map(|(part, shape)| (format!("model.layers.{layer}.{part}.weight"), shape)),
        );
    }
    shapes.push(("model.norm.weight".to_owned(), vec![hidden]));
    if !config["tie_word_embeddings"].as_bool().unwrap() {
        shapes.push(("lm_head.weight".to_owned(), vec![vocabulary, hidden]));
    }
    shapes
}

/// Random tensors for [`tiny_shapes`]: norms around 1, the others small around 0.
pub(crate) fn tiny_tensors(config: &Value) -> Vec<NamedTensor> {
    let mut generator = ChaCha8Rng::seed_from_u64(1);
    tiny_shapes(config)
        .into_iter()
        .map(|(name, shape)| {
            let centre = if shape.len() == 1 { 1.0 } else { 0.0 };
            let data = (0..shape.iter().product())
                .map(|_| centre + generator.random_range(-0.4f32..0.4))
                .collect();
            NamedTensor { name, shape, data }
        })
        .collect()
}

/// Writes a safetensors file of f32.
pub(crate) fn write_safetensors(path: &Path, tensors: &[NamedTensor]) {
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|tensor| tensor.data.iter().flat_map(|x| x.to_le_bytes()).collect())
        .collect();
    let views = tensors.iter().zip(&bytes).map(|(tensor, bytes)| {
        let view = TensorView::new(Dtype::F32, tensor.shape.clone(), bytes).unwrap();
        (tensor.name.clone(), view)
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// A model directory of a config and tensors.
pub(crate) fn model_dir(config: &Value, tensors: &[NamedTensor]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    write_safetensors(&dir.path().join("model.safetensors"), tensors);
    dir
}

/// The tiny model with random weights.
pub(crate) fn tiny_model(adapter: &AdapterConfig) -> TrainableModel {
    let config = tiny_config();
    let dir = model_dir(&config, &tiny_tensors(&config));
    TrainableModel::load(dir.path(), adapter, 7, &test_device()).unwrap()
}

/// `length` ids of the tiny model's vocabulary.
pub(crate) fn tiny_ids(length: usize, seed: u64) -> Vec<u32> {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    (0..length).map(|_| generator.random_range(0..101)).collect()
}

/// A LoRA adapter that is not at its start: B is random too, so that every path carries a signal.
pub(crate) fn stir_adapter(model: &mut TrainableModel) {
    let mut generator = ChaCha8Rng::seed_from_u64(5);
    let mut tensors = model.trainable_tensors().unwrap();
    for tensor in &mut tensors {
        for value in &mut tensor.data {
            *value = generator.random_range(-0.3..0.3);
        }
    }
    model.load_trainable_tensors(tensors).unwrap();
}
