//! Hyperparameters two by two: whatever a request may combine trains.

use serde_json::{Value, json};
use tunesmith_core::hyperparameters::{Hyperparameters, Method};

use crate::preference;
use crate::support::{Bench, finish};

/// Each changes what the engine does in one way; where a request may not combine two, it says so.
fn options(method: Method) -> Vec<Value> {
    let mut options = vec![
        json!({"neftune_noise_alpha": 5}),
        json!({"packing": false}),
        json!({"gradient_accumulation_steps": 2}),
        json!({"prompt_loss_weight": 0.5}),
        json!({"max_seq_length": 40}),
        json!({"precision": "bf16"}),
        json!({"optimizer": "adafactor"}),
        json!({"optimizer": "muon"}),
        json!({"load_best_model_at_end": true, "eval_steps": 1}),
        json!({"on_divergence": "rollback"}),
        json!({"adapter": {"type": "full"}}),
        json!({"adapter": {"type": "full", "trainable_layers": 1}}),
        json!({"adapter": {"dropout": 0.1}}),
        json!({"adapter": {"use_dora": true}}),
        json!({"adapter": {"init_lora_weights": "pissa"}}),
        json!({"adapter": {"trainable_layers": 1}}),
        json!({"adapter": {"target_modules": ["q_proj", "down_proj"]}}),
        json!({"adapter": {"quantization": "int8"}}),
        json!({"adapter": {"quantization": "nf4"}}),
    ];
    if method == Method::Dpo {
        options.extend(["orpo", "simpo"].map(|loss| json!({"preference_loss": loss})));
    }
    options
}

/// Both, one inside of the other.
fn merged(mut one: Value, two: &Value) -> Value {
    for (name, value) in two.as_object().expect("an object") {
        one[name] = match &one[name] {
            inner @ Value::Object(_) => merged(inner.clone(), value),
            _ => value.clone(),
        };
    }
    one
}

fn every_pair_trains(method: Method) {
    let bench = Bench::new(8);
    let common = json!({
        "n_epochs": 1, "batch_size": 4, "max_steps": 2, "validation_split": 0.25, "precision": "fp32",
        "learning_rate": 1e-3,
    });
    let options = options(method);
    let mut trained = 0;
    for (i, one) in options.iter().enumerate() {
        for two in &options[i..] {
            let asked = merged(one.clone(), two);
            let fields = merged(common.clone(), &asked);
            let parsed = Hyperparameters::parse_for(method, fields.as_object().unwrap(), "");
            if parsed.is_err() {
                continue;
            }
            let request = match method {
                Method::Supervised => bench.request("out", &fields),
                Method::Dpo => preference::request(&bench, "out", 8, &fields),
            };
            eprintln!("{asked}");
            let transcript = finish(&request);
            assert!(!transcript.steps.is_empty(), "{asked}");
            assert!(transcript.train_losses().iter().all(|loss| loss.is_finite()), "{asked}");
            trained += 1;
            std::fs::remove_dir_all(&request.output_dir).expect("the run's files");
        }
    }
    assert!(trained > options.len() * options.len() / 3, "{trained} combinations");
}

#[test]
fn every_pair_of_options_trains_on_examples() {
    every_pair_trains(Method::Supervised);
}

#[test]
fn every_pair_of_options_trains_on_pairs() {
    every_pair_trains(Method::Dpo);
}
