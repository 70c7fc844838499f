//! LoRA beside quantised weights: it is LoRA beside the numbers that the blocks stand for, and on a
//! real model close to LoRA beside the original ones.

use std::path::Path;

use safetensors::SafeTensors;
use tempfile::TempDir;
use tunesmith_core::hyperparameters::{AdapterConfig, Precision, Quantization};
use tunesmith_engine::{AdamWParams, Batch, DropoutKey, TrainableModel};

use crate::device::test_device;
use crate::reference::examples;
use crate::reference_training::start_from_reference;
use crate::support::{
    model_dir, numbers, pack, read_safetensors, reference, reference_path, smollm2,
};

/// What quantisation makes of one value of a block with that greatest magnitude, by its definition.
fn quantised(quantization: Quantization, code: &[f32], value: f32, scale: f32) -> f32 {
    match quantization {
        Quantization::None => value,
        Quantization::Int8 => (value * (1.0 / scale) * 127.0).round() * (scale / 127.0),
        Quantization::Nf4 => {
            let distance = |code: &f32| (code - value / scale).abs();
            scale * code.iter().min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap()
        }
    }
}

fn tiny() -> std::path::PathBuf {
    reference_path("families/llama")
}

/// The tiny model in f32, its projections changed by `change` row by row.
fn tiny_with(change: impl Fn(&str, &mut [f32])) -> TempDir {
    let config = std::fs::read(tiny().join("config.json")).unwrap();
    let mut tensors: Vec<_> =
        read_safetensors(&tiny().join("model.safetensors")).into_values().collect();
    for tensor in tensors.iter_mut().filter(|tensor| tensor.name.ends_with("_proj.weight")) {
        let name = tensor.name.clone();
        tensor.data.chunks_mut(tensor.shape[1]).for_each(|row| change(&name, row));
    }
    model_dir(&serde_json::from_slice(&config).unwrap(), &tensors)
}

/// The tiny model with every projection replaced by what quantisation leaves of it.
fn quantised_tiny(quantization: Quantization) -> TempDir {
    let bytes = std::fs::read(reference_path("adapters/nf4.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let code = file.tensor("code").unwrap();
    let code: Vec<f32> =
        code.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    tiny_with(|_, row| {
        assert!(row.len() <= 64, "no row is wider than one block");
        let scale = row.iter().fold(0f32, |m, x| m.max(x.abs()));
        row.iter_mut().for_each(|value| *value = quantised(quantization, &code, *value, scale));
    })
}

fn load(dir: &Path, adapter: &AdapterConfig) -> TrainableModel {
    TrainableModel::load(dir, adapter, 5, &test_device()).unwrap()
}

/// Losses of ten updates, and the logits after them.
fn train(mut model: TrainableModel) -> (Vec<f64>, Vec<f32>) {
    let ids: Vec<u32> = (0..24).map(|i| (i * 7 + i * i) % 101).collect();
    let batch = Batch::single(&ids);
    let params = AdamWParams { learning_rate: 1e-2, ..AdamWParams::default() };
    let mut losses = Vec::new();
    for step in 0..10 {
        let key = DropoutKey { seed: 5, step, micro_batch: 0 };
        let outcome = model.forward_backward(&batch, 1.0 / batch.total_weight(), key).unwrap();
        losses.push(outcome.weighted_nll / outcome.weight);
        model.optimizer_step(&params, Some(1.0)).unwrap();
    }
    (losses, logits(&model))
}

fn logits(model: &TrainableModel) -> Vec<f32> {
    model.logits(&[4, 9, 60, 33, 2], &[0, 1, 2, 3, 4]).unwrap().concat()
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn training_over_blocks_equals_training_over_the_numbers_they_stand_for() {
    for (quantization, use_dora) in
        [(Quantization::Int8, false), (Quantization::Nf4, false), (Quantization::Nf4, true)]
    {
        let base = quantised_tiny(quantization);
        let plain = AdapterConfig { r: 3, dropout: 0.1, use_dora, ..AdapterConfig::default() };
        let blocks = AdapterConfig { quantization, ..plain.clone() };
        let (over_blocks, over_numbers) = (load(&tiny(), &blocks), load(base.path(), &plain));
        let start = distance(&logits(&over_blocks), &logits(&over_numbers));
        assert!(start < 1e-5, "{quantization:?}: {start:e}");
        let original = distance(&logits(&over_blocks), &logits(&load(&tiny(), &plain)));
        assert!(original > 1e-4, "{quantization:?}: nothing was quantised");

        let (losses, end) = train(over_blocks);
        let (expected, expected_end) = train(over_numbers);
        for (loss, expected) in losses.iter().zip(&expected) {
            assert!((loss - expected).abs() < 1e-4, "{quantization:?}: {loss} {expected}");
        }
        assert!(losses[9] < losses[0] - 0.1, "{losses:?}");
        assert!(distance(&end, &expected_end) < 1e-3);
    }
}

#[test]
fn weight_that_is_no_number_is_not_quantised() {
    let name = "model.layers.1.mlp.up_proj.weight";
    let dir = tiny_with(|tensor, row| {
        if tensor == name {
            row[7] = f32::NAN;
        }
    });
    let adapter = AdapterConfig { quantization: Quantization::Nf4, ..AdapterConfig::default() };
    let error = TrainableModel::load(dir.path(), &adapter, 0, &test_device()).unwrap_err();
    assert!(error.to_string().contains(name), "{error}");
}

/// Two steps of LoRA on SmolLM2 beside quantised weights: the greatest error of a loss and of a
/// gradient norm, both relative, beside float64 over what bitsandbytes' NF4 and whole numbers of 8
/// bits give back of the weights.
fn greatest_errors(quantization: Quantization, precision: Precision) -> (f64, f64) {
    let adapter = AdapterConfig { r: 8, alpha: 16.0, quantization, ..AdapterConfig::default() };
    let device = test_device();
    let model =
        TrainableModel::load_with_precision(&smollm2(), &adapter, 0, &device, precision).unwrap();
    let mut model = start_from_reference(model);
    let reference = reference("adapters/quantized_lora.json");
    let word = serde_json::to_value(quantization).unwrap();
    let reference = &reference[word.as_str().unwrap()];
    let expected = numbers(&reference["losses"]).into_iter().zip(numbers(&reference["grad_norms"]));
    let params = AdamWParams { learning_rate: 2e-4, ..AdamWParams::default() };
    let (mut worst_loss, mut worst_norm) = (0f64, 0f64);
    let examples = examples(0.0);
    for (step, (rows, (loss, norm))) in examples.chunks(4).zip(expected).enumerate() {
        let batch = pack(rows);
        let key = DropoutKey { seed: 0, step: step as u64, micro_batch: 0 };
        let outcome = model.forward_backward(&batch, 1.0 / batch.total_weight(), key).unwrap();
        let own_norm = model.optimizer_step(&params, None).unwrap();
        worst_loss = worst_loss.max((outcome.weighted_nll / outcome.weight / loss - 1.0).abs());
        worst_norm = worst_norm.max((own_norm / norm - 1.0).abs());
    }
    println!("{quantization:?} {precision:?}: {worst_loss:.1e} {worst_norm:.1e}");
    (worst_loss, worst_norm)
}

#[test]
fn lora_beside_quantised_weights_follows_f64_over_what_they_stand_for() {
    for quantization in [Quantization::Int8, Quantization::Nf4] {
        let (loss, norm) = greatest_errors(quantization, Precision::Fp32);
        // The bounds of LoRA beside the original weights. Those weights' losses are further off:
        // the first by 6e-3 (int8) and 1.4e-1 (nf4).
        assert!(loss < 1e-4 && norm < 1e-4, "{quantization:?}: {loss:e} {norm:e}");
    }
}

#[test]
fn lora_beside_4_bits_in_bf16_stays_within_a_hundredth_of_each_loss() {
    // The bound of LoRA in bf16 beside the original weights.
    let (loss, _) = greatest_errors(Quantization::Nf4, Precision::Bf16);
    assert!((1e-6..1e-2).contains(&loss), "{loss:e}");
}
