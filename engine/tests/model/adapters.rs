//! DoRA, LoRA+, PiSSA and frozen layers, against PEFT in f64 on a tiny random model.
//!
//! `scripts/fixtures/adapters.py` made the numbers.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::Value;
use tunesmith_core::hyperparameters::{AdapterConfig, InitLoraWeights};
use tunesmith_engine::{AdamWParams, Batch, DropoutKey, NamedTensor, TrainableModel, sample};

use crate::device::test_device;
use crate::support::{ids, model_dir, numbers, pack, read_safetensors, reference, reference_path};

/// On losses, absolute, over six steps at a high learning rate.
const LOSS_TOLERANCE: f64 = 2e-5;
/// On gradient norms, relative.
const NORM_TOLERANCE: f64 = 1e-4;

struct Case {
    adapter: AdapterConfig,
    losses: Vec<f64>,
    norms: Vec<f64>,
    final_loss: f64,
}

fn cases() -> Value {
    reference("adapters/cases.json")
}

fn case(name: &str) -> Case {
    let case = &cases()["cases"][name];
    Case {
        adapter: serde_json::from_value(case["settings"].clone()).unwrap(),
        losses: numbers(&case["losses"]),
        norms: numbers(&case["grad_norms"]),
        final_loss: case["final_loss"].as_f64().unwrap(),
    }
}

fn base_dir() -> PathBuf {
    reference_path("adapters/model")
}

/// The three rows in one batch.
fn batch() -> Batch {
    let rows: Vec<_> = cases()["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| (ids(row), vec![1.0; row.as_array().unwrap().len()]))
        .collect();
    pack(&rows)
}

/// The tiny model with the references' A.
fn model(adapter: &AdapterConfig) -> TrainableModel {
    let mut model = TrainableModel::load(&base_dir(), adapter, 0, &test_device()).unwrap();
    if adapter.init_lora_weights == InitLoraWeights::Pissa {
        return model;
    }
    let initial = read_safetensors(&reference_path("adapters/initial.safetensors"));
    let start = |tensor: NamedTensor| match initial.get(&tensor.name) {
        Some(a) => a.clone(),
        None => {
            assert!(!tensor.name.contains("lora_A"), "{}", tensor.name);
            tensor
        }
    };
    let tensors = model.trainable_tensors().unwrap().into_iter().map(start).collect();
    model.load_trainable_tensors(tensors).unwrap();
    model
}

fn loss(model: &TrainableModel) -> f64 {
    let outcome = model.evaluate(&batch()).unwrap();
    outcome.weighted_nll / outcome.weight
}

/// Trains as the references did, checking every loss and norm; the trained model.
fn assert_trajectory(name: &str) -> TrainableModel {
    let Case { adapter, losses, norms, final_loss } = case(name);
    let cases = cases();
    let params = AdamWParams {
        learning_rate: cases["learning_rate"].as_f64().unwrap(),
        weight_decay: cases["weight_decay"].as_f64().unwrap(),
        ..AdamWParams::default()
    };
    let (mut model, batch) = (model(&adapter), batch());
    let (mut worst_loss, mut worst_norm) = (0f64, 0f64);
    for (step, (expected_loss, expected_norm)) in losses.iter().zip(&norms).enumerate() {
        let key = DropoutKey { seed: 0, step: step as u64, micro_batch: 0 };
        let outcome = model.forward_backward(&batch, 1.0 / batch.total_weight(), key).unwrap();
        let norm = model.optimizer_step(&params, None).unwrap();
        worst_loss = worst_loss.max((outcome.weighted_nll / outcome.weight - expected_loss).abs());
        worst_norm = worst_norm.max((norm / expected_norm - 1.0).abs());
    }
    worst_loss = worst_loss.max((loss(&model) - final_loss).abs());
    println!("{name}: greatest error of a loss {worst_loss:.1e}, of a norm {worst_norm:.1e}");
    assert!(worst_loss < LOSS_TOLERANCE, "{name}: loss off by {worst_loss:e}");
    assert!(worst_norm < NORM_TOLERANCE, "{name}: norm off by {worst_norm:e}");
    model
}

/// What was trained has the names, shapes and values of what PEFT saved.
fn assert_saved_alike(name: &str, model: &TrainableModel) {
    let path = reference_path(&format!("adapters/final/{name}/adapter_model.safetensors"));
    let expected: BTreeMap<_, _> = read_safetensors(&path).into_iter().collect();
    let trained: BTreeMap<_, _> =
        model.exported_tensors().unwrap().into_iter().map(|t| (t.name.clone(), t)).collect();
    assert_eq!(trained.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, tensor) in trained {
        let expected = &expected[&name];
        assert_eq!(tensor.shape, expected.shape, "{name}");
        let greatest = expected.data.iter().fold(0f32, |m, x| m.max(x.abs()));
        for (x, y) in tensor.data.iter().zip(&expected.data) {
            assert!((x - y).abs() < 2e-3 * greatest, "{name}: {x} {y}");
        }
    }
}

#[test]
fn lora_on_the_tiny_model_follows_peft() {
    assert_saved_alike("lora", &assert_trajectory("lora"));
}

#[test]
fn dora_follows_peft_to_the_same_adapter() {
    for name in ["dora", "dora_rslora_qv"] {
        assert_saved_alike(name, &assert_trajectory(name));
    }
}

#[test]
fn loraplus_follows_peft_and_speeds_magnitudes_up_too() {
    for name in ["loraplus", "loraplus_dora"] {
        assert_saved_alike(name, &assert_trajectory(name));
    }
}

#[test]
fn pissa_starts_and_learns_as_in_peft() {
    for name in ["pissa", "pissa_rslora"] {
        assert_trajectory(name);
    }
}

#[test]
fn lora_of_the_last_layer_alone_follows_peft_to_the_same_adapter() {
    assert_saved_alike("lora_last_layer", &assert_trajectory("lora_last_layer"));
}

#[test]
fn adapter_that_peft_saved_gives_pefts_loss() {
    for name in ["lora", "dora", "dora_rslora_qv", "loraplus_dora", "lora_last_layer"] {
        let dir = reference_path(&format!("adapters/final/{name}"));
        let model = sample::load(&base_dir(), Some(&dir), &test_device()).unwrap();
        let (loss, expected) = (loss(&model), case(name).final_loss);
        assert!((loss - expected).abs() < LOSS_TOLERANCE, "{name}: {loss} {expected}");
    }
}

#[test]
fn dora_starts_as_the_base_model() {
    let base = TrainableModel::load(&base_dir(), &AdapterConfig::full(), 0, &test_device());
    let (base, dora) = (loss(&base.unwrap()), loss(&model(&case("dora").adapter)));
    assert!((base - dora).abs() < 1e-6, "{base} {dora}");
}

#[test]
fn row_of_zeros_has_no_direction_for_dora() {
    let config = std::fs::read(base_dir().join("config.json")).unwrap();
    let mut tensors: Vec<_> =
        read_safetensors(&base_dir().join("model.safetensors")).into_values().collect();
    let name = "model.layers.0.self_attn.k_proj.weight";
    tensors.iter_mut().find(|tensor| tensor.name == name).unwrap().data[24..48].fill(0.0);
    let dir = model_dir(&serde_json::from_slice(&config).unwrap(), &tensors);
    let adapter = AdapterConfig { use_dora: true, ..AdapterConfig::default() };
    let error = TrainableModel::load(dir.path(), &adapter, 0, &test_device()).unwrap_err();
    let message = error.to_string();
    assert!(message.contains(name) && message.contains("row 1"), "{message}");
    assert!(message.contains("target_modules"), "names the way out: {message}");
    let others = AdapterConfig { target_modules: vec!["q_proj".to_owned()], ..adapter };
    assert!(TrainableModel::load(dir.path(), &others, 0, &test_device()).is_ok());
}

#[test]
fn last_layers_and_final_norm_alone_follow_pytorch() {
    for (name, last) in [("last_layer", 1), ("last_two_layers", 2)] {
        let model = assert_trajectory(name);
        let trained: Vec<_> = model.trainable_tensors().unwrap();
        assert_eq!(trained.len(), 9 * last + 1, "nine tensors a layer and the norm");
        let is_open = |name: &str| {
            name == "model.norm.weight"
                || (3 - last..3).any(|layer| name.starts_with(&format!("model.layers.{layer}.")))
        };
        assert!(trained.iter().all(|tensor| is_open(&tensor.name)));
        // What is frozen is exported with the rest, as it was.
        let base = read_safetensors(&base_dir().join("model.safetensors"));
        let exported = model.exported_tensors().unwrap();
        assert_eq!(exported.len(), base.len());
        for tensor in exported {
            let unchanged = tensor == base[&tensor.name];
            assert_eq!(unchanged, !is_open(&tensor.name), "{}", tensor.name);
        }
    }
}

#[test]
fn more_trainable_layers_than_there_are_is_refused_with_their_number() {
    let adapter = AdapterConfig { trainable_layers: 4, ..AdapterConfig::full() };
    let error = TrainableModel::load(&base_dir(), &adapter, 0, &test_device()).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("is 4: use 3 or less"), "{message}");
    assert!(message.contains("has 3 layers"), "{message}");
}
