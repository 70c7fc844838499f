//! Times training steps of a LoRA adapter on every projection, one sequence of random ids a step:
//! `gpu_step MODEL_DIR DEVICES SEQUENCE STEPS WAY`.
//!
//! Prints one line of JSON: tokens a second (the median of the steps after two to warm up), the
//! process's peak memory in MiB, and the losses. DEVICES is a list such as `cuda:0,cuda:1`; each
//! takes a sequence of its own. WAY is `plain`, or `checkpointing` for computing each layer again in
//! the backward pass.

use std::path::Path;
use std::time::Instant;

use serde_json::json;
use tunesmith_core::hyperparameters::{AdapterConfig, Precision, TARGET_MODULES};
use tunesmith_engine::parallel::Replicas;
use tunesmith_engine::{AdamWParams, Batch, Device, DropoutKey, TrainableModel};

const WARM_UP: usize = 2;
const RANK: usize = 16;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model_dir, devices, sequence, steps, way] = arguments.as_slice() else {
        return Err("usage: gpu_step MODEL_DIR DEVICES SEQUENCE STEPS plain|checkpointing".into());
    };
    let (sequence, steps): (usize, usize) = (sequence.parse()?, steps.parse()?);
    let devices = Device::parse_list(devices)?;
    let adapter = AdapterConfig {
        r: RANK,
        alpha: 2.0 * RANK as f64,
        target_modules: TARGET_MODULES.iter().map(|&name| name.to_owned()).collect(),
        ..AdapterConfig::default()
    };
    let began = Instant::now();
    let mut model = TrainableModel::load_with_precision(
        Path::new(model_dir),
        &adapter,
        0,
        &devices[0],
        Precision::Auto,
    )?;
    model.set_gradient_checkpointing(way == "checkpointing");
    let vocabulary = model.config().vocab_size as u64;
    let mut model = Replicas::new(model, &devices);
    let load_seconds = began.elapsed().as_secs_f64();

    // Uniform ids; nothing here depends on which.
    let mut state = 1u64;
    let mut id = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        ((state >> 33) % vocabulary) as u32
    };
    let mut ids = || -> Vec<u32> { (0..sequence).map(|_| id()).collect() };
    let batches: Vec<Batch> = devices.iter().map(|_| Batch::single(&ids())).collect();
    let owners: Vec<usize> = (0..devices.len()).collect();
    let tokens = sequence * devices.len();
    let weight: f64 = batches.iter().map(Batch::total_weight).sum();
    let params = AdamWParams { learning_rate: 2e-4, ..AdamWParams::default() };

    let (mut seconds, mut losses) = (Vec::new(), Vec::new());
    for step in 0..WARM_UP + steps {
        let began = Instant::now();
        let outcomes = model
            .accumulate(&owners, |model, micro_batch| {
                let key =
                    DropoutKey { seed: 0, step: step as u64, micro_batch: micro_batch as u64 };
                model.forward_backward(&batches[micro_batch], 1.0 / weight, key)
            })
            .map_err(|(_, error)| error)?;
        model.update(|model| model.optimizer_step(&params, Some(1.0)))?;
        seconds.push(began.elapsed().as_secs_f64());
        losses.push(outcomes.iter().map(|outcome| outcome.weighted_nll).sum::<f64>() / weight);
    }
    let mut timed = seconds.split_off(WARM_UP);
    timed.sort_by(f64::total_cmp);
    let median = timed[timed.len() / 2];
    println!(
        "{}",
        json!({
            "tokens_per_second": tokens as f64 / median, "step_seconds": median,
            "steps": steps, "tokens": tokens, "load_seconds": load_seconds,
            "warm_up_seconds": seconds, "peak_rss_mib": peak_rss_mib(),
            "first_loss": losses[0], "last_loss": losses.last(),
        })
    );
    Ok(())
}

/// The most memory that this process ever held; null where the system does not tell.
fn peak_rss_mib() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib / 1024.0)
}
