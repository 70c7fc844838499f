//! Checkpoints as other programs open them: PEFT adapters, Hugging Face directories, merged.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tunesmith_core::dataset::{Message, Role};
use tunesmith_core::hyperparameters::{AdapterConfig, Quantization};
use tunesmith_engine::export::export_merged;
use tunesmith_engine::sample::{self, answer};
use tunesmith_engine::{NamedTensor, TrainableModel};

use crate::device::test_device;
use crate::support::{
    Bench, HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KEY_VALUE_HEADS, LAYERS, finish,
    read_safetensors, weights,
};

const IDS: [u32; 9] = [1, 90, 80, 70, 80, 90, 2, 13, 1];

fn logits(model: &TrainableModel) -> Vec<f32> {
    let positions: Vec<usize> = (0..IDS.len()).collect();
    model.logits(&IDS, &positions).expect("logits").concat()
}

fn load(dir: &Path, adapter: &AdapterConfig) -> TrainableModel {
    TrainableModel::load(dir, adapter, 0, &test_device()).expect("a model")
}

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).expect("file")).expect("json")
}

fn file_names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("directory");
    let name = |entry: std::io::Result<fs::DirEntry>| {
        entry.expect("entry").file_name().to_string_lossy().into_owned()
    };
    let mut names: Vec<String> = entries.map(name).collect();
    names.sort();
    names
}

/// A LoRA of rank 3 on `targets`, trained until it says something.
fn trained_lora(bench: &Bench, fields: Value) -> (std::path::PathBuf, AdapterConfig) {
    let request = bench.request(
        "out",
        &json!({"n_epochs": 2, "batch_size": 2, "learning_rate": 1e-2, "adapter": fields}),
    );
    let transcript = finish(&request);
    let last = transcript.checkpoints.last().expect("a checkpoint").dir.join("weights");
    (last, request.spec.hyperparameters.adapter)
}

#[test]
fn an_adapter_has_two_tensors_a_layer_and_target_in_pefts_names_and_shapes() {
    let bench = Bench::new(6);
    let (dir, _) = trained_lora(&bench, json!({"r": 3, "target_modules": "all-linear"}));
    let (queries, keys) = (HEADS * HEAD_DIM, KEY_VALUE_HEADS * HEAD_DIM);
    let mut expected = BTreeMap::new();
    for layer in 0..LAYERS {
        for (module, output, input) in [
            ("self_attn.q_proj", queries, HIDDEN),
            ("self_attn.k_proj", keys, HIDDEN),
            ("self_attn.v_proj", keys, HIDDEN),
            ("self_attn.o_proj", HIDDEN, queries),
            ("mlp.gate_proj", INTERMEDIATE, HIDDEN),
            ("mlp.up_proj", INTERMEDIATE, HIDDEN),
            ("mlp.down_proj", HIDDEN, INTERMEDIATE),
        ] {
            let name = format!("base_model.model.model.layers.{layer}.{module}");
            expected.insert(format!("{name}.lora_A.weight"), vec![3, input]);
            expected.insert(format!("{name}.lora_B.weight"), vec![output, 3]);
        }
    }
    let tensors = read_safetensors(&dir.join("adapter_model.safetensors"));
    let shapes: BTreeMap<String, Vec<usize>> =
        tensors.iter().map(|(name, (shape, _))| (name.clone(), shape.clone())).collect();
    assert_eq!(shapes, expected);
    assert!(tensors.values().all(|(_, values)| values.iter().any(|&value| value != 0.0)));
    assert_eq!(
        file_names(&dir),
        [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json"
        ]
    );
    let config = json_file(&dir.join("adapter_config.json"));
    assert_eq!((&config["peft_type"], &config["r"]), (&json!("LORA"), &json!(3)));
    let readme = fs::read_to_string(dir.join("README.md")).expect("README");
    assert!(readme.contains("ftjob-test") && readme.contains("PeftModel"), "{readme}");
}

#[test]
fn merged_weights_give_the_logits_of_base_and_adapter() {
    for fields in [
        json!({"r": 3, "target_modules": ["q_proj", "v_proj"]}),
        json!({"r": 4, "use_rslora": true, "target_modules": "all-linear"}),
        json!({"r": 3, "trainable_layers": 1, "target_modules": "all-linear"}),
        json!({"r": 4, "use_dora": true, "target_modules": "all-linear"}),
        json!({
            "r": 2, "use_dora": true, "use_rslora": true, "target_modules": ["k_proj", "down_proj"],
        }),
    ] {
        let bench = Bench::new(6);
        let (dir, adapter) = trained_lora(&bench, fields);
        let mut with_adapter = load(&bench.base(), &adapter);
        let untrained = logits(&with_adapter);
        let tensors = read_safetensors(&dir.join("adapter_model.safetensors"));
        let named = |(name, (shape, data))| NamedTensor { name, shape, data };
        let tensors = tensors.into_iter().map(named).collect();
        with_adapter.load_trainable_tensors(tensors).expect("the adapter fits");
        let with_adapter = logits(&with_adapter);

        let merged = bench.dir.path().join("merged");
        export_merged(&bench.base(), &dir, &merged).expect("merged");
        let merged = logits(&load(&merged, &AdapterConfig::full()));
        let distance = |a: &[f32], b: &[f32]| {
            a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0_f32, f32::max)
        };
        assert!(distance(&merged, &with_adapter) < 1e-5, "{}", distance(&merged, &with_adapter));
        assert!(distance(&untrained, &with_adapter) > 1e-2, "the adapter does nothing");
    }
}

#[test]
fn a_pissa_adapter_goes_on_the_original_base_model_with_twice_the_rank() {
    for use_rslora in [false, true] {
        let bench = Bench::new(6);
        let fields = json!({"r": 3, "init_lora_weights": "pissa", "use_rslora": use_rslora});
        let (dir, adapter) = trained_lora(&bench, fields);
        let config = json_file(&dir.join("adapter_config.json"));
        assert_eq!((&config["r"], &config["init_lora_weights"]), (&json!(6), &json!(true)));
        // As training has it, over weights that lack their principal part; 11 is the job's seed.
        let mut in_training =
            TrainableModel::load(&bench.base(), &adapter, 11, &test_device()).expect("a model");
        let untrained = logits(&in_training);
        let tensors = read_safetensors(&dir.join("adapter_model.safetensors"));
        let named = |(name, (shape, data))| NamedTensor { name, shape, data };
        let tensors = tensors.into_iter().map(named).collect();
        in_training.load_exported_tensors(tensors).expect("the adapter fits");
        let in_training = logits(&in_training);

        let on_the_original = sample::load(&bench.base(), Some(&dir), &test_device());
        let on_the_original = logits(&on_the_original.expect("a model"));
        let merged = bench.dir.path().join("merged");
        export_merged(&bench.base(), &dir, &merged).expect("merged");
        let merged = logits(&load(&merged, &AdapterConfig::full()));
        let distance = |a: &[f32], b: &[f32]| {
            a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0_f32, f32::max)
        };
        assert!(distance(&in_training, &on_the_original) < 1e-5);
        assert!(distance(&in_training, &merged) < 1e-5);
        assert!(distance(&in_training, &untrained) > 1e-2, "the adapter does nothing");
        let base = logits(&load(&bench.base(), &AdapterConfig::full()));
        assert!(distance(&base, &untrained) < 1e-5, "it starts as the base model");
    }
}

#[test]
fn an_adapter_over_quantised_weights_is_merged_into_the_original_ones_and_says_so() {
    let bench = Bench::new(6);
    let (dir, adapter) = trained_lora(&bench, json!({"r": 3, "quantization": "nf4"}));
    assert_eq!(adapter.quantization, Quantization::Nf4);
    let readme = fs::read_to_string(dir.join("README.md")).expect("README");
    assert!(readme.contains("4 bits (NF4)"), "{readme}");
    assert!(readme.contains("goes on the original base model"), "{readme}");
    assert!(readme.contains("load_in_4bit=True"), "{readme}");

    let merged = bench.dir.path().join("merged");
    export_merged(&bench.base(), &dir, &merged).expect("merged");
    let merged = logits(&load(&merged, &AdapterConfig::full()));
    let with_adapter = |adapter: &AdapterConfig| {
        let mut model = load(&bench.base(), adapter);
        let tensors = read_safetensors(&dir.join("adapter_model.safetensors"));
        let named = |(name, (shape, data))| NamedTensor { name, shape, data };
        model.load_trainable_tensors(tensors.into_iter().map(named).collect()).expect("it fits");
        logits(&model)
    };
    let distance =
        |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0_f32, f32::max);
    let original = AdapterConfig { quantization: Quantization::None, ..adapter.clone() };
    assert!(distance(&merged, &with_adapter(&original)) < 1e-5);
    assert!(distance(&merged, &with_adapter(&adapter)) > 1e-3, "training saw other weights");
}

#[test]
fn full_fine_tuning_exports_a_whole_model_with_its_tied_embedding_once() {
    let bench = Bench::new(6);
    let request = bench.request(
        "out",
        &json!({"n_epochs": 1, "learning_rate": 1e-3, "adapter": {"type": "full"}}),
    );
    let transcript = finish(&request);
    let dir = transcript.checkpoints.last().expect("a checkpoint").dir.join("weights");
    assert_eq!(
        file_names(&dir),
        [
            "README.md",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json"
        ]
    );
    let tensors = read_safetensors(&dir.join("model.safetensors"));
    let names: Vec<&String> = tensors.keys().collect();
    let mut base = weights();
    base.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!(names, base.iter().map(|tensor| &tensor.name).collect::<Vec<_>>());
    for tensor in &base {
        assert_eq!(tensors[&tensor.name].0, tensor.shape);
        assert_ne!(tensors[&tensor.name].1, tensor.data, "{} did not train", tensor.name);
    }
    // Whatever the base model's numbers are, these are written in f32, and the base is left alone.
    assert_eq!(json_file(&dir.join("config.json"))["torch_dtype"], "float32");
    assert_eq!(json_file(&bench.base().join("config.json"))["torch_dtype"], Value::Null);
    // It opens as a model of its own.
    logits(&load(&dir, &AdapterConfig::full()));
}

#[test]
fn an_answer_changes_with_the_adapter_and_leaves_out_the_end() {
    let bench = Bench::new(6);
    let messages = [Message::new(Role::User, "What is 1?")];
    let request = bench.request(
        "out",
        &json!({"n_epochs": 50, "batch_size": 6, "learning_rate": 2e-2, "prompt_loss_weight": 0}),
    );
    let transcript = finish(&request);
    let dir = transcript.checkpoints.last().expect("a checkpoint").dir.join("weights");
    let base = answer(&bench.base(), None, &messages, 20, &test_device()).expect("an answer");
    let tuned = answer(&bench.base(), Some(&dir), &messages, 20, &test_device()).expect("one");
    assert_ne!(base, tuned);
    assert!(tuned.starts_with("ha"), "{tuned}");
    assert!(!tuned.contains("<|im_end|>"), "{tuned}");
}
