//! Runs on two devices.

use serde_json::{Value, json};
use tunesmith_core::protocol::TrainRequest;

use crate::device::test_device_name;
use crate::support::{Bench, Transcript, finish, read_safetensors};

/// Two devices of the kind that the tests compute on: the same CPU twice, or two GPUs.
fn two_devices() -> String {
    match test_device_name() {
        name if name.starts_with("cuda") => "cuda:0,cuda:1".to_owned(),
        name => format!("{name},{name}"),
    }
}

fn run(bench: &Bench, name: &str, fields: &Value, devices: &str) -> Transcript {
    let request = bench.request(name, fields);
    finish(&TrainRequest { device: devices.to_owned(), ..request })
}

fn assert_equal_to_one_device(fields: &Value) {
    let bench = Bench::new(13);
    let one = run(&bench, "one", fields, &test_device_name());
    let two = run(&bench, "two", fields, &two_devices());
    assert_eq!(two.started().device, two_devices());
    assert_eq!(one.steps.len(), two.steps.len());
    for (one, two) in one.steps.iter().zip(&two.steps) {
        let close = |a: f64, b: f64, tolerance: f64| (a - b).abs() <= tolerance * a.abs().max(1.0);
        assert!(close(one.train_loss, two.train_loss, 1e-6), "{one:?} {two:?}");
        assert!(close(one.grad_norm, two.grad_norm, 1e-5), "{one:?} {two:?}");
        assert_eq!((one.tokens, one.learning_rate), (two.tokens, two.learning_rate));
    }
    // Two equal runs on two devices are equal bit for bit.
    let again = run(&bench, "again", fields, &two_devices());
    assert_eq!(again.train_losses(), two.train_losses());
    let last = one.steps.len() as u64;
    let weights = |transcript: &Transcript| {
        let dir = transcript.checkpoint(last).join("weights");
        let lora = dir.join("adapter_model.safetensors");
        read_safetensors(&if lora.exists() { lora } else { dir.join("model.safetensors") })
    };
    assert_eq!(weights(&again), weights(&two));
}

#[test]
fn a_lora_run_on_two_devices_equals_one_on_one_device() {
    assert_equal_to_one_device(&json!({
        "batch_size": 4, "n_epochs": 2, "learning_rate": 1e-3, "prompt_loss_weight": 0.1,
        "adapter": {"type": "lora", "r": 3},
    }));
}

#[test]
fn a_run_of_all_weights_with_accumulation_on_two_devices_equals_one_on_one_device() {
    assert_equal_to_one_device(&json!({
        "batch_size": 1, "gradient_accumulation_steps": 3, "n_epochs": 2, "learning_rate": 1e-4,
        "adapter": {"type": "full"},
    }));
}
