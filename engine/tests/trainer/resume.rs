//! A run that stops, or is killed, and goes on ends with the bits of one that ran through.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tunesmith_core::hyperparameters::Precision;
use tunesmith_core::metrics::{RowLoss, StepMetrics};
use tunesmith_core::protocol::TrainRequest;
use tunesmith_engine::EngineError;
use tunesmith_engine::train::{Outcome, TrainOptions};

use crate::support::{Bench, Transcript, chat_rows, finish, read_safetensors, run};

/// The numbers of a step without its times.
pub(crate) fn timeless(steps: &[StepMetrics]) -> Vec<StepMetrics> {
    let timeless = |step: &StepMetrics| StepMetrics {
        tokens_per_second: 0.0,
        elapsed_seconds: 0.0,
        ..step.clone()
    };
    steps.iter().map(timeless).collect()
}

/// The bits of every tensor in a checkpoint's weights and optimiser state.
fn bits(checkpoint: &Path) -> BTreeMap<String, Vec<u32>> {
    let mut bits = BTreeMap::new();
    for part in ["weights", "state"] {
        for entry in fs::read_dir(checkpoint.join(part)).expect("directory") {
            let path = entry.expect("entry").path();
            if path.extension().is_some_and(|extension| extension == "safetensors") {
                for (name, (_, values)) in read_safetensors(&path) {
                    let values = values.iter().map(|value| value.to_bits()).collect();
                    bits.insert(format!("{part}/{name}"), values);
                }
            }
        }
    }
    bits
}

/// Ten steps, three an epoch, with a checkpoint every two: step 4 lies in the middle of epoch 2.
pub(crate) fn ten_steps(adapter: Value) -> Value {
    json!({
        "batch_size": 2, "gradient_accumulation_steps": 2, "n_epochs": 10, "max_steps": 10,
        "learning_rate": 5e-3, "checkpoint_steps": 2, "eval_steps": 3, "validation_split": 0.1,
        "weight_decay": 0.01, "adapter": adapter,
    })
}

pub(crate) fn resumed(bench: &Bench, name: &str, fields: &Value, from: &Path) -> TrainRequest {
    TrainRequest { resume_from: Some(from.to_owned()), ..bench.request(name, fields) }
}

pub(crate) fn check_equal(
    straight: &Transcript,
    first: &Transcript,
    second: &Transcript,
    step: u64,
) {
    assert_eq!(second.started().resumed_from_step, step);
    assert_eq!(second.started().initial_valid_loss, straight.started().initial_valid_loss);
    let done = first.steps.iter().filter(|metrics| metrics.step <= step).cloned();
    let together: Vec<StepMetrics> = done.chain(second.steps.iter().cloned()).collect();
    let times = together.clone();
    assert_eq!(timeless(&together), timeless(&straight.steps));
    let done = first.rows.iter().filter(|row| row.step <= step).cloned();
    let together: Vec<RowLoss> = done.chain(second.rows.iter().cloned()).collect();
    assert_eq!(together, straight.rows);
    assert_eq!(bits(second.checkpoint(10)), bits(straight.checkpoint(10)));
    let times: Vec<f64> = times.iter().map(|metrics| metrics.elapsed_seconds).collect();
    assert!(times.windows(2).all(|pair| pair[0] <= pair[1]), "{times:?}");
}

fn ten_straight_equal_four_and_six(adapter: Value) {
    ten_straight_equal_four_and_six_with(ten_steps(adapter));
}

fn ten_straight_equal_four_and_six_with(fields: Value) {
    let bench = Bench::new(13);
    let straight = finish(&bench.request("straight", &fields));
    assert_eq!(straight.steps.len(), 10);
    // Killed some time after step 4: its checkpoint is what is left.
    let (first, outcome) = run(&bench.request("first", &fields), &TrainOptions::default(), Some(5));
    assert_eq!(outcome.expect("stopped"), Outcome::Stopped);
    let second = finish(&resumed(&bench, "second", &fields, first.checkpoint(4)));
    check_equal(&straight, &first, &second, 4);
}

#[test]
fn lora_with_dropout_goes_on_bit_equal_in_the_middle_of_an_epoch() {
    let adapter = json!({"type": "lora", "r": 3, "dropout": 0.2, "target_modules": "all-linear"});
    ten_straight_equal_four_and_six(adapter);
}

#[test]
fn dora_with_dropout_and_a_faster_b_goes_on_bit_equal() {
    ten_straight_equal_four_and_six(
        json!({"r": 3, "dropout": 0.2, "use_dora": true, "loraplus_lr_ratio": 4}),
    );
    let mut fields = ten_steps(json!({"r": 3, "use_dora": true, "target_modules": ["v_proj"]}));
    fields["optimizer"] = json!("adafactor");
    ten_straight_equal_four_and_six_with(fields);
}

#[test]
fn an_adapter_that_started_with_pissa_goes_on_bit_equal() {
    ten_straight_equal_four_and_six(json!({"r": 3, "init_lora_weights": "pissa"}));
}

#[test]
fn an_adapter_of_the_last_layer_with_a_faster_b_goes_on_bit_equal() {
    let adapter = json!({"r": 3, "dropout": 0.2, "loraplus_lr_ratio": 4, "trainable_layers": 1});
    ten_straight_equal_four_and_six(adapter);
}

#[test]
fn fine_tuning_of_the_last_layer_goes_on_bit_equal() {
    ten_straight_equal_four_and_six(json!({"type": "full", "trainable_layers": 1}));
}

#[test]
fn an_adapter_over_quantised_weights_goes_on_bit_equal() {
    for quantization in ["int8", "nf4"] {
        ten_straight_equal_four_and_six(
            json!({"r": 3, "dropout": 0.2, "quantization": quantization}),
        );
    }
}

#[test]
fn full_fine_tuning_goes_on_bit_equal_in_the_middle_of_an_epoch() {
    ten_straight_equal_four_and_six(json!({"type": "full"}));
}

#[test]
fn every_optimiser_goes_on_bit_equal() {
    for optimizer in ["adafactor", "muon"] {
        let mut fields = ten_steps(json!({"type": "full"}));
        fields["optimizer"] = json!(optimizer);
        ten_straight_equal_four_and_six_with(fields);
    }
    let mut fields = ten_steps(json!({"r": 3}));
    fields["optimizer"] = json!("adafactor");
    ten_straight_equal_four_and_six_with(fields);
}

#[test]
fn noise_and_a_schedule_in_three_parts_go_on_bit_equal() {
    let mut fields = ten_steps(json!({"r": 3, "dropout": 0.1}));
    fields["neftune_noise_alpha"] = json!(5);
    fields["lr_scheduler"] = json!("wsd");
    fields["decay_ratio"] = json!(0.4);
    fields["warmup_ratio"] = json!(0.2);
    fields["min_lr_ratio"] = json!(0.1);
    ten_straight_equal_four_and_six_with(fields);
}

#[test]
fn lora_in_bf16_goes_on_bit_equal_in_the_middle_of_an_epoch() {
    let bench = Bench::new(13);
    let mut fields = ten_steps(json!({"r": 3}));
    fields["precision"] = json!("bf16");
    let straight = finish(&bench.request("straight", &fields));
    assert_eq!(straight.started().precision, Precision::Bf16);
    let (first, _) = run(&bench.request("first", &fields), &TrainOptions::default(), Some(5));
    let second = finish(&resumed(&bench, "second", &fields, first.checkpoint(4)));
    check_equal(&straight, &first, &second, 4);
}

#[test]
fn a_run_goes_on_in_the_precision_of_its_checkpoint_whatever_the_device_would_choose() {
    let bench = Bench::new(13);
    let mut fields = ten_steps(json!({"type": "full"}));
    fields["precision"] = json!("auto");
    let (first, _) = run(&bench.request("first", &fields), &TrainOptions::default(), Some(4));
    let chosen = first.started().precision;
    assert_ne!(chosen, Precision::Auto);
    let path = first.checkpoint(4).join("state/trainer.json");
    let mut trainer: Value =
        serde_json::from_slice(&fs::read(&path).expect("state")).expect("json");
    assert_eq!(trainer["precision"], json!(chosen));
    // As if another device had begun the run.
    let other = if chosen == Precision::Bf16 { Precision::Fp32 } else { Precision::Bf16 };
    trainer["precision"] = json!(other);
    fs::write(&path, trainer.to_string()).expect("state");
    let request = resumed(&bench, "second", &fields, first.checkpoint(4));
    let (second, _) = run(&request, &TrainOptions::default(), Some(6));
    assert_eq!(second.started().precision, other);
    let written = second.checkpoint(6).join("state/trainer.json");
    let trainer: Value = serde_json::from_slice(&fs::read(&written).expect("state")).expect("json");
    assert_eq!(trainer["precision"], json!(other));
}

#[test]
fn a_drained_run_goes_on_bit_equal_from_a_step_without_a_checkpoint_of_its_own() {
    let bench = Bench::new(13);
    let fields = ten_steps(json!({"r": 2, "dropout": 0.1}));
    let straight = finish(&bench.request("straight", &fields));
    let (first, outcome) = run(&bench.request("first", &fields), &TrainOptions::default(), Some(5));
    assert_eq!(outcome.expect("stopped"), Outcome::Stopped);
    let last = first.checkpoints.last().expect("a checkpoint");
    assert!(last.step == 5 && last.for_resume_only && last.metrics.is_none(), "{last:?}");
    let second = finish(&resumed(&bench, "second", &fields, &last.dir));
    check_equal(&straight, &first, &second, 5);
}

#[test]
fn a_stop_at_a_step_with_a_checkpoint_writes_no_second_one() {
    let bench = Bench::new(13);
    let (transcript, outcome) =
        run(&bench.request("out", &ten_steps(json!({"r": 2}))), &TrainOptions::default(), Some(4));
    assert_eq!(outcome.expect("stopped"), Outcome::Stopped);
    let steps: Vec<u64> = transcript.checkpoints.iter().map(|written| written.step).collect();
    assert_eq!(steps, [2, 4]);
    assert!(!transcript.checkpoints.iter().any(|written| written.for_resume_only));
}

#[test]
fn a_checkpoint_of_other_data_or_other_hyperparameters_is_refused() {
    let bench = Bench::new(13);
    let fields = ten_steps(json!({"r": 2}));
    let (first, _) = run(&bench.request("first", &fields), &TrainOptions::default(), Some(2));
    let from = first.checkpoint(2);

    let mut other = fields.clone();
    other["learning_rate"] = json!(4e-3);
    let request = resumed(&bench, "other", &other, from);
    let (_, outcome) = run(&request, &TrainOptions::default(), None);
    let error = outcome.expect_err("another learning rate");
    assert!(matches!(error, EngineError::Checkpoint(_)), "{error}");
    assert!(error.to_string().contains("trainer.json: the checkpoint belongs to other"), "{error}");

    fs::write(bench.dir.path().join("train.jsonl"), chat_rows(12)).expect("data");
    let request = resumed(&bench, "data", &fields, from);
    let (_, outcome) = run(&request, &TrainOptions::default(), None);
    assert!(matches!(outcome, Err(EngineError::Checkpoint(_))), "{outcome:?}");
}

#[test]
fn a_damaged_checkpoint_is_refused_by_its_file() {
    let bench = Bench::new(13);
    let fields = ten_steps(json!({"r": 2}));
    let (first, _) = run(&bench.request("first", &fields), &TrainOptions::default(), Some(2));
    let optimizer = first.checkpoint(2).join("state/optimizer.safetensors");
    let bytes = fs::read(&optimizer).expect("state");
    fs::write(&optimizer, &bytes[..bytes.len() / 2]).expect("tear");
    let request = resumed(&bench, "second", &fields, first.checkpoint(2));
    let (_, outcome) = run(&request, &TrainOptions::default(), None);
    let error = outcome.expect_err("a torn file").to_string();
    assert!(error.contains("optimizer.safetensors"), "{error}");
}
