//! Times answering: `bench_serving MODEL_DIR PRECISION PROMPT NEW_TOKENS [ADAPTER_DIR…]`.
//!
//! PRECISION is what a matrix is kept in (`fp32`, `bf16` or `auto`), PROMPT a JSON list of token ids. One stream is answered greedily by the base model; then 16
//! requests over the adapters, whose prompts share no beginning, one after the other and together.
//! The output is one line of JSON.

#[path = "support/process.rs"]
mod process;

use std::path::PathBuf;
use std::time::Instant;

use serde_json::json;
use tunesmith_core::hyperparameters::Precision;
use tunesmith_core::sampling::{FromSampler, SampleRequest, Sampling};
use tunesmith_engine::serve::{Batcher, ServedModel};
use tunesmith_engine::{Device, EngineError};

const REQUESTS: u32 = 16;
const TURNS: usize = 3;

/// Answers requests at once, each a prompt and an adapter.
struct Run {
    batcher: Batcher,
    new_tokens: u32,
    next_id: u64,
}

/// What came of a run.
struct Outcome {
    first_token_s: f64,
    all_s: f64,
    /// The tokens in the order they came.
    ids: Vec<u32>,
}

impl Run {
    fn answer(&mut self, requests: &[(Vec<u32>, Option<String>)]) -> Result<Outcome, EngineError> {
        let began = Instant::now();
        let (mut first, mut ids) = (None, Vec::new());
        let mut sink = |message| {
            if let FromSampler::Token { token, .. } = message {
                first.get_or_insert_with(|| began.elapsed().as_secs_f64());
                ids.push(token.id);
            }
        };
        for (prompt, adapter) in requests {
            self.next_id += 1;
            let request = SampleRequest {
                id: self.next_id,
                adapter: adapter.clone(),
                prompt: prompt.clone(),
                n: 1,
                sampling: Sampling::greedy(self.new_tokens),
                low_priority: false,
            };
            self.batcher.submit(request, &mut sink);
        }
        while !self.batcher.is_idle() {
            self.batcher.step(&mut sink)?;
        }
        let first_token_s = first.unwrap_or_default();
        Ok(Outcome { first_token_s, all_s: began.elapsed().as_secs_f64(), ids })
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model_dir, precision, prompt, new_tokens, adapters @ ..] = arguments.as_slice() else {
        return Err(
            "usage: bench_serving MODEL_DIR PRECISION PROMPT NEW_TOKENS [ADAPTER_DIR…]".into()
        );
    };
    let prompt: Vec<u32> = serde_json::from_str(prompt)?;
    let precision: Precision = serde_json::from_value(json!(precision))?;
    let model = ServedModel::load(&PathBuf::from(model_dir), &Device::cpu(), precision)?;
    let batcher = Batcher::new(model, REQUESTS as usize, 1 << 30);
    let mut run = Run { batcher, new_tokens: new_tokens.parse()?, next_id: 0 };

    let began = Instant::now();
    for (index, dir) in adapters.iter().enumerate() {
        run.batcher.load_adapter(index.to_string(), &PathBuf::from(dir))?;
    }
    let load_adapters_s = began.elapsed().as_secs_f64();

    // What each turn changes at the beginning keeps it from being found in the cache.
    let varied = |first: u32| -> Vec<u32> { [&[first], &prompt[1..]].concat() };
    process::reset_peak()?;
    let ids = run.answer(&[(prompt.clone(), None)])?.ids;
    let (mut firsts, mut speeds) = (Vec::new(), Vec::new());
    for turn in 0..TURNS {
        let one = run.answer(&[(varied(100 + turn as u32), None)])?;
        firsts.push(one.first_token_s);
        speeds.push((one.ids.len() - 1) as f64 / (one.all_s - one.first_token_s));
    }
    let requests = |first: u32| -> Vec<(Vec<u32>, Option<String>)> {
        let adapter = |i: u32| match adapters.len() {
            0 => None,
            count => Some((i as usize % count).to_string()),
        };
        (0..REQUESTS).map(|i| (varied(first + i), adapter(i))).collect()
    };
    let mut apart = 0.0;
    for request in requests(1000) {
        apart += run.answer(&[request])?.all_s;
    }
    let together = run.answer(&requests(2000))?.all_s;
    let report = json!({
        "ids": ids,
        "first_token_s": median(firsts),
        "decode_tokens_per_s": median(speeds),
        "load_adapters_s": load_adapters_s,
        "requests": REQUESTS,
        "adapters": adapters.len(),
        "one_after_the_other_s": apart,
        "together_s": together,
        "peak_mib": process::peak_mib()?,
    });
    println!("{report}");
    Ok(())
}
