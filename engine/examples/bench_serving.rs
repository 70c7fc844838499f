//! Speed of answering: `bench_serving MODEL_DIR [ADAPTER_DIR…]` prints as JSON the tokens per second
//! of one stream, the time to its first token, and for 16 requests over the adapters (the base model
//! where none is given) the seconds together and one after the other.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::json;
use tunesmith_core::hyperparameters::Precision;
use tunesmith_core::sampling::{FromSampler, SampleRequest, Sampling};
use tunesmith_engine::serve::{Batcher, ServedModel};
use tunesmith_engine::{Device, EngineError};

const PROMPT_TOKENS: u32 = 64;
const NEW_TOKENS: u32 = 64;
const REQUESTS: u64 = 16;

fn request(id: u64, adapter: Option<String>) -> SampleRequest {
    SampleRequest {
        id,
        adapter,
        // Prompts that share no beginning.
        prompt: (0..PROMPT_TOKENS).map(|i| 1000 + 131 * id as u32 + 7 * i).collect(),
        n: 1,
        sampling: Sampling {
            max_tokens: NEW_TOKENS,
            temperature: 0.0,
            top_p: 1.0,
            seed: 1,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            top_logprobs: 0,
            stop_ids: Vec::new(),
        },
        low_priority: false,
    }
}

/// Seconds until the first token and until the last.
fn run(batcher: &mut Batcher, requests: Vec<SampleRequest>) -> Result<(f64, f64), EngineError> {
    let start = Instant::now();
    let mut first = None;
    let mut sink = |message| {
        if matches!(message, FromSampler::Token { .. }) {
            first.get_or_insert_with(|| start.elapsed().as_secs_f64());
        }
    };
    for request in requests {
        batcher.submit(request, &mut sink);
    }
    while !batcher.is_idle() {
        batcher.step(&mut sink)?;
    }
    Ok((first.unwrap_or_default(), start.elapsed().as_secs_f64()))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1).map(PathBuf::from);
    let base = args.next().ok_or("usage: bench_serving MODEL_DIR [ADAPTER_DIR…]")?;
    let adapters: Vec<PathBuf> = args.collect();
    let model = ServedModel::load(&base, &Device::cpu(), Precision::Auto)?;
    let mut batcher = Batcher::new(model, REQUESTS as usize, 1 << 30);
    let names: Vec<Option<String>> = match adapters.is_empty() {
        true => vec![None],
        false => (0..adapters.len()).map(|i| Some(i.to_string())).collect(),
    };
    let loading = Instant::now();
    for (name, dir) in adapters.iter().enumerate() {
        batcher.load_adapter(name.to_string(), dir)?;
    }
    let load_adapters = loading.elapsed().as_secs_f64();
    run(&mut batcher, vec![request(100, None)])?;
    let (first, all) = run(&mut batcher, vec![request(101, None)])?;
    let of = |id: u64| names[id as usize % names.len()].clone();
    let mut apart = 0.0;
    for id in 0..REQUESTS {
        apart += run(&mut batcher, vec![request(200 + id, of(id))])?.1;
    }
    let requests = (0..REQUESTS).map(|id| request(300 + id, of(id))).collect();
    let (_, together) = run(&mut batcher, requests)?;
    let result = json!({
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "load_adapters_s": load_adapters,
        "first_token_s": first,
        "decode_tokens_per_s": f64::from(NEW_TOKENS - 1) / (all - first),
        "requests": REQUESTS,
        "adapters": adapters.len(),
        "one_after_another_s": apart,
        "together_s": together,
    });
    println!("{result}");
    Ok(())
}
