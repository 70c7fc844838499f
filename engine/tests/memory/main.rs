//! The estimate of a run's memory beside the peak that a process shows, on a real model.
//!
//! Each case is a process of its own, since a peak belongs to a process.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tunesmith_core::hyperparameters::{
    AdapterConfig, Auto, DataFacts, Hyperparameters, Method, Precision, Quantization,
};
use tunesmith_core::job::TrainSpec;
use tunesmith_core::memory::{MemoryEstimate, PassSize};
use tunesmith_core::protocol::{TRAINER_MEMORY, TrainRequest};
use tunesmith_engine::models::config::ModelConfig;
use tunesmith_engine::train::{Outcome, StopFlag, train};
use tunesmith_engine::{AdamWParams, Batch, Device, DropoutKey, TrainableModel};

const CASE: &str = "TUNESMITH_TEST_MEMORY_CASE";
const TOKENS: usize = 512;
const ROW: usize = 256;

fn model_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/test-models/SmolLM2-135M-Instruct")
}

/// Every part of the estimate is in one of them.
const CASES: [&str; 4] = ["lora-nf4", "lora-bf16-recomputed", "full-bf16", "full-recomputed"];

/// What a case trains and in which numbers, and whether it computes layers again.
fn case(name: &str) -> (AdapterConfig, Precision, bool) {
    let mut adapter =
        if name.starts_with("full") { AdapterConfig::full() } else { AdapterConfig::default() };
    if name.contains("nf4") {
        adapter.quantization = Quantization::Nf4;
    }
    let precision = if name.contains("bf16") { Precision::Bf16 } else { Precision::Fp32 };
    (adapter, precision, name.ends_with("recomputed"))
}

/// The greatest resident size of this process so far, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

/// Two steps on rows of random tokens, every one of them with loss.
#[test]
#[ignore = "a process that the test below starts"]
fn helper_trains_two_steps() {
    let (adapter, precision, recompute) = case(&std::env::var(CASE).unwrap());
    let cpu = Device::cpu();
    let mut model =
        TrainableModel::load_with_precision(&model_dir(), &adapter, 7, &cpu, precision).unwrap();
    model.set_gradient_checkpointing(recompute);
    let ids: Vec<u32> = (0..TOKENS as u32).map(|token| 17 + token * 7919 % 49_000).collect();
    let mut batch = Batch { weights: vec![1.0; TOKENS], ids, ..Batch::default() };
    for row in 0..TOKENS / ROW {
        let tokens = row * ROW..(row + 1) * ROW;
        batch.segments.push(tunesmith_engine::batch::Segment::whole(tokens));
        batch.rows.push(row);
    }
    for step in 0..2 {
        let key = DropoutKey { seed: 1, step, micro_batch: 0 };
        model.forward_backward(&batch, 1e-3, key).unwrap();
        let params = AdamWParams { learning_rate: 1e-5, ..AdamWParams::default() };
        model.optimizer_step(&params, Some(1.0)).unwrap();
    }
    println!("peak {}", peak());
}

/// What the helper `helper` prints for each case; cases run side by side, since a peak is a process's
/// own, and much of each run takes one core.
fn printed<const N: usize>(helper: &str, cases: [&'static str; N]) -> [(&'static str, String); N] {
    let children = cases.map(|name| {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", helper, "--nocapture"])
            .env(CASE, name)
            // As a worker starts a trainer: else freed memory is scattered over heaps.
            .env(TRAINER_MEMORY.0, TRAINER_MEMORY.1)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        (name, child.unwrap())
    });
    children.map(|(name, child)| {
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        (name, text)
    })
}

/// The number behind `label`.
fn number(text: &str, label: &str) -> u64 {
    let (_, rest) = text.split_once(label).unwrap_or_else(|| panic!("no {label:?} in {text}"));
    rest.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn peak_of_a_run_is_within_a_fifth_of_its_estimate() {
    let config = ModelConfig::read(&model_dir()).unwrap();
    let mut failures = Vec::new();
    for (name, text) in printed("helper_trains_two_steps", CASES) {
        let peak = number(&text, "peak ");
        let (adapter, precision, recompute) = case(name);
        let precision = Auto::Value(precision);
        let hyperparameters = Hyperparameters { adapter, precision, ..Hyperparameters::default() }
            .resolve(&DataFacts { examples: 4, context_length: 2048 });
        let pass =
            PassSize { tokens: TOKENS as u64, measured_tokens: 0, several: false, recompute };
        let estimate = MemoryEstimate::new(&config.size(), &hyperparameters, pass);
        let ratio = estimate.total() as f64 / peak as f64;
        println!("{name}: peak {} MiB, estimate {estimate}, ratio {ratio:.2}", peak >> 20);
        if !(0.8..1.2).contains(&ratio) {
            failures.push(format!("{name}: {ratio:.2}"));
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}

/// Jobs whose rows fill no pass: what they learn from, and what they ask for.
const JOBS: [&str; 4] = ["chats", "chats one by one", "chats dora", "pairs"];

fn job(name: &str) -> (Method, &'static str, Value) {
    let short = json!({"batch_size": 4, "n_epochs": 1, "max_steps": 3, "precision": "fp32"});
    let with = |fields: Value| {
        let mut all = short.clone();
        all.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        all
    };
    let (method, file, fields) = match name {
        // Its evaluation has more tokens in a pass than training has.
        "chats" => (Method::Supervised, "chat32.jsonl", json!({"validation_split": 0.5})),
        "chats one by one" => (Method::Supervised, "chat32.jsonl", json!({"packing": false})),
        "chats dora" => {
            (Method::Supervised, "chat32.jsonl", json!({"adapter": {"use_dora": true}}))
        }
        _ => (Method::Dpo, "dpo4.jsonl", json!({})),
    };
    (method, file, with(fields))
}

/// A whole job, which logs its plan.
#[test]
#[ignore = "a process that the test below starts"]
fn helper_trains_a_job() {
    tracing_subscriber::fmt().with_ansi(false).with_writer(std::io::stdout).init();
    let (method, file, fields) = job(&std::env::var(CASE).unwrap());
    let (asked, unknown) =
        Hyperparameters::parse_for(method, fields.as_object().unwrap(), "").unwrap();
    assert!(unknown.is_empty(), "{unknown:?}");
    let facts = DataFacts { examples: 32, context_length: 2048 };
    let out = tempfile::tempdir().unwrap();
    let request = TrainRequest {
        job_id: "ftjob-memory".into(),
        start_from: None,
        spec: TrainSpec {
            start_from: None,
            model: "smollm2".to_owned(),
            base_is_tuned: false,
            seed: 1,
            hyperparameters: asked.resolve(&facts),
        },
        base_model_dir: model_dir(),
        training_file: Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference").join(file),
        validation_file: None,
        resume_from: None,
        output_dir: out.path().to_owned(),
        device: "cpu".to_owned(),
    };
    let mut sink = |_| Ok(());
    let outcome = train(&request, &StopFlag::default(), &mut sink).unwrap();
    assert!(matches!(outcome, Outcome::Finished { .. }));
    println!("peak {}", peak());
}

#[test]
fn peak_of_a_job_is_within_a_fifth_of_its_plan() {
    let mut failures = Vec::new();
    for (name, text) in printed("helper_trains_a_job", JOBS) {
        let (peak, planned) = (number(&text, "peak "), number(&text, "estimated_bytes="));
        let ratio = planned as f64 / peak as f64;
        println!(
            "{name}: peak {} MiB, planned {} MiB, ratio {ratio:.2}",
            peak >> 20,
            planned >> 20
        );
        if !(0.8..1.2).contains(&ratio) {
            failures.push(format!("{name}: {ratio:.2}"));
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}
