//! Times training steps on fixed token ids: `bench_step MODEL_DIR lora|full IDS WARMUP STEPS`.
//!
//! IDS is a file with a JSON list of rows, each a list of token ids; every token of a row but the
//! first is a target of weight 1. A step is forward, backward and AdamW without clipping; LoRA is
//! of rank 16 and alpha 32 on all seven projections. The output is one line of JSON.

#[path = "support/process.rs"]
mod process;

use std::path::Path;
use std::time::Instant;

use serde_json::json;
use tunesmith_core::hyperparameters::{AdapterConfig, Precision};
use tunesmith_engine::batch::Segment;
use tunesmith_engine::parallel::Replicas;
use tunesmith_engine::{AdamWParams, Batch, Device, DropoutKey, TrainableModel};

const LEARNING_RATE: f64 = 2e-4;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model_dir, mode, ids, warmup, steps] = arguments.as_slice() else {
        return Err("usage: bench_step MODEL_DIR lora|full IDS WARMUP STEPS".into());
    };
    let adapter = match mode.as_str() {
        "lora" => AdapterConfig { r: 16, alpha: 32.0, ..AdapterConfig::default() },
        "full" => AdapterConfig::full(),
        _ => return Err(format!("{mode} is neither lora nor full").into()),
    };
    let rows: Vec<Vec<u32>> = serde_json::from_reader(std::fs::File::open(ids)?)?;
    let batch = packed(&rows);
    let (warmup, steps): (usize, usize) = (warmup.parse()?, steps.parse()?);

    let began = Instant::now();
    // What a job gets that names no precision.
    let device = Device::cpu();
    let precision = device.precision(Precision::Auto);
    let directory = Path::new(model_dir);
    let model = TrainableModel::load_with_precision(directory, &adapter, 0, &device, precision)?;
    // Passes run as the trainer's do.
    let mut model = Replicas::new(model, &[device]);
    let load_seconds = began.elapsed().as_secs_f64();
    let params = AdamWParams { learning_rate: LEARNING_RATE, ..AdamWParams::default() };
    let scale = 1.0 / batch.total_weight();
    let mut losses = Vec::new();
    let mut step = |number: usize| -> Result<f64, Box<dyn std::error::Error>> {
        let began = Instant::now();
        let key = DropoutKey { step: number as u64, ..DropoutKey::default() };
        let outcomes = model
            .accumulate(&[0], |model, _| model.forward_backward(&batch, scale, key))
            .map_err(|(_, error)| error)?;
        model.update(|model| model.optimizer_step(&params, None))?;
        losses.push(outcomes[0].weighted_nll / outcomes[0].weight);
        Ok(began.elapsed().as_secs_f64())
    };
    for number in 0..warmup {
        step(number)?;
    }
    let warm_peak = process::peak_mib()?;
    process::reset_peak()?;
    let seconds = (warmup..warmup + steps).map(&mut step).collect::<Result<Vec<f64>, _>>()?;
    let steady_peak = process::peak_mib()?;
    let trainable: usize = model.trainable_tensors()?.iter().map(|tensor| tensor.data.len()).sum();
    println!(
        "{}",
        json!({
            "mode": mode, "precision": if precision == Precision::Bf16 { "bf16" } else { "f32" }, "threads": std::thread::available_parallelism()?,
            "tokens": batch.tokens(), "trainable": trainable, "load_seconds": load_seconds,
            "step_seconds": seconds, "first_loss": losses[0], "last_loss": losses.last(),
            "peak_mib": warm_peak.max(steady_peak), "steady_peak_mib": steady_peak,
        })
    );
    Ok(())
}

/// All rows in one batch.
fn packed(rows: &[Vec<u32>]) -> Batch {
    let mut batch = Batch::default();
    for (number, ids) in rows.iter().enumerate() {
        let start = batch.ids.len();
        batch.ids.extend(ids);
        batch.weights.resize(batch.ids.len(), 1.0);
        batch.segments.push(Segment::whole(start..batch.ids.len()));
        batch.rows.push(number);
    }
    batch
}
