//! Tiny models of each family against Hugging Face transformers and PEFT in f64: logits, and the
//! losses and gradient norms of full fine-tuning and of LoRA. `scripts/fixtures/families.py` makes
//! the models and the numbers.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::{Value, json};
use tunesmith_core::hyperparameters::AdapterConfig;
use tunesmith_core::weights::PeftConfig;
use tunesmith_engine::models::rope::Rope;
use tunesmith_engine::{AdamWParams, Batch, DropoutKey, ModelConfig, NamedTensor, TrainableModel};

use crate::device::test_device;
use crate::support::{ids, numbers, pack, read_safetensors, reference, reference_path};

const LOSS_TOLERANCE: f64 = 2e-5;
const LOGIT_TOLERANCE: f64 = 1e-4;
/// Relative.
const NORM_TOLERANCE: f64 = 1e-4;

struct Family {
    name: String,
    expected: Value,
    worst_loss: f64,
}

/// Compares all that there is of a family.
fn assert_equals_transformers(name: &str) {
    let mut family = Family {
        name: name.to_owned(),
        expected: reference(&format!("families/{name}/expected.json")),
        worst_loss: 0.0,
    };
    let mut model = family.load(&AdapterConfig::full());
    family.assert_names(&model, "model.safetensors");
    family.assert_logits(&model, &family.expected["logits"]);
    family.assert_cache_agrees(&model);
    family.assert_follows(&mut model, "full");

    let text = std::fs::read(family.path("adapter/adapter_config.json")).unwrap();
    let mut model = family.load(&PeftConfig::parse(&text).unwrap().adapter);
    let adapter = read_safetensors(&family.path("adapter/adapter_model.safetensors"));
    model.load_trainable_tensors(adapter.into_values().collect()).unwrap();
    family.assert_names(&model, "adapter/adapter_model.safetensors");
    family.assert_logits(&model, &family.expected["lora"]["logits"]);
    family.assert_cache_agrees(&model);
    family.assert_follows(&mut model, "lora");
    println!("{name}: greatest error of a loss {:.1e}", family.worst_loss);
}

impl Family {
    fn path(&self, file: &str) -> PathBuf {
        reference_path(&format!("families/{}/{file}", self.name))
    }

    fn load(&self, adapter: &AdapterConfig) -> TrainableModel {
        TrainableModel::load(&self.path(""), adapter, 0, &test_device()).unwrap()
    }

    fn batch(&self) -> Batch {
        let rows = self.expected["rows"].as_array().unwrap().iter();
        let rows: Vec<(Vec<u32>, Vec<f32>)> = rows
            .map(|row| {
                let weights = numbers(&row["weights"]).into_iter().map(|w| w as f32).collect();
                (ids(&row["ids"]), weights)
            })
            .collect();
        pack(&rows)
    }

    /// What trains has the names, shapes and values of a file: an export opens where the file does.
    fn assert_names(&self, model: &TrainableModel, file: &str) {
        let by_name = |tensors: Vec<NamedTensor>| -> BTreeMap<String, NamedTensor> {
            tensors.into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect()
        };
        let trained = by_name(model.trainable_tensors().unwrap());
        let expected = by_name(read_safetensors(&self.path(file)).into_values().collect());
        let names = |tensors: &BTreeMap<String, NamedTensor>| -> Vec<String> {
            tensors.keys().cloned().collect()
        };
        assert_eq!(names(&trained), names(&expected), "{}", self.name);
        assert!(trained == expected, "{}: values or shapes differ", self.name);
    }

    fn first_row(&self) -> Vec<u32> {
        ids(&self.expected["rows"][0]["ids"])
    }

    fn assert_logits(&self, model: &TrainableModel, expected: &Value) {
        for (position, expected) in expected.as_object().unwrap() {
            let logits = model.logits(&self.first_row(), &[position.parse().unwrap()]).unwrap();
            for (logit, expected) in logits[0].iter().zip(numbers(expected)) {
                let error = (f64::from(*logit) - expected).abs();
                assert!(error < LOGIT_TOLERANCE, "{} at {position}: {error:e}", self.name);
            }
        }
    }

    /// A sequence that grows gives the logits of the whole one, past the window too.
    fn assert_cache_agrees(&self, model: &TrainableModel) {
        let ids = self.first_row();
        let positions: Vec<usize> = (0..ids.len()).collect();
        let whole = model.logits(&ids, &positions).unwrap();
        let mut generation = model.generation();
        let parts = [0..4, 4..5, 5..6, 6..14, 14..15, 15..ids.len()];
        for part in parts {
            let last = part.end - 1;
            let logits = generation.advance(&ids[part]).unwrap();
            for (a, b) in logits.iter().zip(&whole[last]) {
                assert!((a - b).abs() < 1e-4, "{} at {last}: {a} {b}", self.name);
            }
        }
    }

    fn assert_follows(&mut self, model: &mut TrainableModel, what: &str) {
        let expected = self.expected[what].clone();
        let learning_rate = self.expected["learning_rate"].as_f64().unwrap();
        let params = AdamWParams { learning_rate, ..AdamWParams::default() };
        let batch = self.batch();
        let losses = numbers(&expected["losses"]);
        let norms = numbers(&expected["grad_norms"]);
        assert_eq!(losses.len(), norms.len() + 1);
        for (step, expected) in losses.iter().enumerate() {
            let key = DropoutKey { seed: 0, step: step as u64, micro_batch: 0 };
            let outcome = model.forward_backward(&batch, 1.0 / batch.total_weight(), key).unwrap();
            let error = (outcome.weighted_nll / outcome.weight - expected).abs();
            assert!(error < LOSS_TOLERANCE, "{} {what} {step}: loss off by {error:e}", self.name);
            self.worst_loss = self.worst_loss.max(error);
            let norm = model.optimizer_step(&params, None).unwrap();
            if let Some(expected) = norms.get(step) {
                let error = (norm / expected - 1.0).abs();
                assert!(error < NORM_TOLERANCE, "{} {what} {step}: norm {error:e}", self.name);
            }
        }
    }
}

#[test]
fn llama_with_biases_everywhere_and_llama3_frequencies_equals_transformers() {
    assert_equals_transformers("llama");
}

#[test]
fn llama_with_yarn_and_its_attention_factor_equals_transformers() {
    assert_equals_transformers("llama-yarn");
}

#[test]
fn mistral_with_a_window_in_all_layers_equals_transformers() {
    assert_equals_transformers("mistral");
}

#[test]
fn qwen2_with_biases_and_a_window_in_its_upper_layers_equals_transformers() {
    assert_equals_transformers("qwen2");
}

#[test]
fn qwen3_with_norms_of_its_heads_equals_transformers() {
    assert_equals_transformers("qwen3");
}

#[test]
fn gemma2_with_softcaps_and_norms_around_its_blocks_equals_transformers() {
    assert_equals_transformers("gemma2");
}

#[test]
fn gemma3_with_two_rotary_embeddings_and_norms_of_its_heads_equals_transformers() {
    assert_equals_transformers("gemma3");
}

#[test]
fn phi3_with_fused_projections_and_longrope_on_a_part_of_its_heads_equals_transformers() {
    assert_equals_transformers("phi3");
}

#[test]
fn frequencies_of_every_scaling_are_those_of_transformers() {
    let tables = reference("families/rope.json");
    for table in tables.as_array().unwrap() {
        let config = ModelConfig::parse(&table["config"].to_string()).unwrap();
        let rope: &Rope = match table["layer_type"].as_str() {
            Some("sliding_attention") => config.sliding_rope.as_ref().unwrap(),
            _ => &config.rope,
        };
        let frequencies = rope.frequencies();
        let expected = numbers(&table["inv_freq"]);
        assert_eq!(frequencies.len(), expected.len(), "{}", table["config"]);
        for (frequency, expected) in frequencies.iter().zip(expected) {
            assert!((frequency / expected - 1.0).abs() < 1e-6, "{}", table["config"]);
        }
        let expected = table["attention_factor"].as_f64().unwrap();
        assert!((rope.attention_factor() - expected).abs() < 1e-12, "{}", table["config"]);
    }
}

#[test]
fn missing_and_unused_weights_of_a_family_are_named() {
    let dir = reference_path("families/qwen2");
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(dir.join("model.safetensors"), copy.path().join("model.safetensors")).unwrap();
    let mut load_as = |model_type: &str, more: Value| {
        config["model_type"] = json!(model_type);
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        std::fs::write(copy.path().join("config.json"), config.to_string()).unwrap();
        TrainableModel::load(copy.path(), &AdapterConfig::full(), 0, &test_device())
            .unwrap_err()
            .to_string()
    };
    let unused = load_as("llama", json!({}));
    assert!(unused.contains("model.layers.0.self_attn.k_proj.bias"), "{unused}");
    let missing = load_as("llama", json!({"attention_bias": true}));
    assert!(missing.contains("model.layers.0.self_attn.o_proj.bias is missing"), "{missing}");
}
