//! Logits of this engine, for comparing with other programs:
//! `logits MODEL_DIR ADAPTER_DIR|- < IDS`.
//!
//! IDS is a JSON list of token ids; the output is a JSON list of one list of logits a position.

use std::path::Path;

use tunesmith_engine::{Device, EngineError, sample};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [base_dir, adapter_dir] = arguments.as_slice() else {
        return Err("usage: logits MODEL_DIR ADAPTER_DIR|- < IDS".into());
    };
    let adapter_dir = (adapter_dir != "-").then(|| Path::new(adapter_dir));
    let ids: Vec<u32> = serde_json::from_reader(std::io::stdin().lock())?;
    let logits = logits(Path::new(base_dir), adapter_dir, &ids)?;
    serde_json::to_writer(std::io::stdout().lock(), &logits)?;
    Ok(())
}

fn logits(
    base_dir: &Path,
    adapter_dir: Option<&Path>,
    ids: &[u32],
) -> Result<Vec<Vec<f32>>, EngineError> {
    let model = sample::load(base_dir, adapter_dir, &Device::parse("cpu")?)?;
    model.logits(ids, &(0..ids.len()).collect::<Vec<_>>())
}
