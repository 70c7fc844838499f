//! Times a whole training run, rows in the order of the file: `bench_chats < REQUEST`.
//!
//! REQUEST is the JSON of a `TrainRequest`, what a worker sends to its trainer. The output is one
//! line of JSON with the seconds, the tokens and the loss of each step.

#[path = "support/process.rs"]
mod process;

use std::time::Instant;

use serde_json::json;
use tunesmith_core::hyperparameters::Precision;
use tunesmith_core::protocol::{FromTrainer, TrainRequest};
use tunesmith_engine::data::sampler::RowOrder;
use tunesmith_engine::train::{StopFlag, TrainOptions, train_with};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let request: TrainRequest = serde_json::from_reader(std::io::stdin().lock())?;
    let options = TrainOptions { order: RowOrder::File, ..TrainOptions::default() };
    let began = Instant::now();
    let (mut startup, mut load_peak, mut last) = (0.0, 0.0, began);
    let mut precision = "f32";
    let (mut seconds, mut losses, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
    train_with(&request, &options, &StopFlag::default(), &mut |message| {
        match message {
            FromTrainer::Started(started) => {
                if started.precision == Precision::Bf16 {
                    precision = "bf16";
                }
                startup = began.elapsed().as_secs_f64();
                load_peak = process::peak_mib()?;
                process::reset_peak()?;
                last = Instant::now();
            }
            FromTrainer::Step(step) => {
                let now = Instant::now();
                seconds.push((now - last).as_secs_f64());
                last = now;
                losses.push(step.train_loss);
                tokens.push(step.tokens);
            }
            _ => {}
        }
        Ok(())
    })?;
    let steady_peak = process::peak_mib()?;
    println!(
        "{}",
        json!({
            "precision": precision, "threads": std::thread::available_parallelism()?,
            "startup_seconds": startup, "step_seconds": seconds, "losses": losses,
            "tokens": tokens.last(), "peak_mib": steady_peak.max(load_peak), "steady_peak_mib": steady_peak,
        })
    );
    Ok(())
}
