//! SmolLM2 in bf16: its losses step by step against those of f64 and PyTorch in f32, and that it
//! learns what bf16 cannot hold.

use tunesmith_core::hyperparameters::{AdapterConfig, Precision};
use tunesmith_engine::{AdamWParams, DropoutKey, TrainableModel};

use crate::device::test_device;
use crate::reference::examples;
use crate::reference_training::start_from_reference;
use crate::support::{numbers, pack, reference, smollm2};

/// On the mean of the errors of losses, each as a share of its loss.
const MEAN_TOLERANCE: f64 = 5e-3;

fn load(adapter: &AdapterConfig) -> TrainableModel {
    let device = test_device();
    TrainableModel::load_with_precision(&smollm2(), adapter, 0, &device, Precision::Bf16).unwrap()
}

/// Trains on the 32 examples in file order, 4 at a time. No loss may be off by more than
/// `tolerance` of itself.
fn assert_losses(
    name: &str,
    model: &mut TrainableModel,
    learning_rate: f64,
    losses: &[f64],
    tolerance: f64,
) {
    let params = AdamWParams { learning_rate, ..AdamWParams::default() };
    let examples = examples(0.0);
    let mut errors = Vec::new();
    for (step, (rows, expected)) in examples.chunks(4).cycle().zip(losses).enumerate() {
        let batch = pack(rows);
        let key = DropoutKey { seed: 0, step: step as u64, micro_batch: 0 };
        let outcome = model.forward_backward(&batch, 1.0 / batch.total_weight(), key).unwrap();
        model.optimizer_step(&params, None).unwrap();
        errors.push((outcome.weighted_nll / outcome.weight / expected - 1.0).abs());
    }
    let worst = errors.iter().fold(0f64, |worst, &error| worst.max(error));
    let mean = errors.iter().sum::<f64>() / errors.len() as f64;
    println!("{name} in bf16: relative error of a loss {worst:.1e} at most, {mean:.1e} on average");
    assert!(worst < tolerance && mean < MEAN_TOLERANCE, "{name}: losses off by {errors:?}");
    // Were products not rounded, the losses would be those of f32.
    assert!(worst > 1e-5, "{name}: losses off by {errors:?} only");
}

#[test]
fn lora_in_bf16_stays_within_a_hundredth_of_each_loss_of_f64_for_16_steps() {
    let losses = numbers(&reference("d_lora_trajectory.json")["losses_f64"]);
    assert_eq!(losses.len(), 16);
    let adapter = AdapterConfig { r: 8, alpha: 16.0, ..AdapterConfig::default() };
    let mut model = start_from_reference(load(&adapter));
    assert_losses("LoRA", &mut model, 2e-4, &losses, 1e-2);
}

#[test]
fn dora_in_bf16_stays_within_a_hundredth_of_each_loss_of_pytorch() {
    let losses = numbers(&reference("f_rslora_dora_4steps.json")["dora"]["losses"]);
    assert_eq!(losses.len(), 4);
    let adapter = AdapterConfig { r: 8, alpha: 16.0, use_dora: true, ..AdapterConfig::default() };
    let mut model = start_from_reference(load(&adapter));
    assert_losses("DoRA", &mut model, 2e-4, &losses, 1e-2);
}

/// A step of 2e-5 is below half the distance of most weights from the next bf16: it counts at once
/// in the f32 weights, and in their rounded copies only when several have come together.
#[test]
fn full_fine_tuning_in_bf16_stays_within_two_hundredths_of_each_loss_of_f64() {
    let reference = reference("e_full_5steps.json");
    for (name, learning_rate) in [("2e-05", 2e-5), ("0.0002", 2e-4)] {
        let losses = numbers(&reference[name]["losses_f64"]);
        let mut model = load(&AdapterConfig::full());
        assert_losses(&format!("full at {name}"), &mut model, learning_rate, &losses, 2e-2);
    }
}
