//! Gemma 3 270M, imported from a GGUF in Q4_K_M, against transformers on the same weights.
//!
//! The reference and what its numbers are is in `scripts/fixtures/gemma3.py`.

use std::path::{Path, PathBuf};

use tunesmith_core::dataset::ChatTokenizer;
use tunesmith_core::hyperparameters::AdapterConfig;
use tunesmith_engine::{AdamWParams, Batch, DropoutKey, TrainableModel};

use crate::device::test_device;
use crate::support::{ids, numbers, pack, reference};

// What f32 makes of it, against float64, was seen at most as 3e-5, 6e-7 and 7e-7; another order of
// sums may double that.
const LOGIT_TOLERANCE: f64 = 1e-4;
const LOSS_TOLERANCE: f64 = 3e-6;
/// Relative.
const NORM_TOLERANCE: f64 = 3e-6;

/// The imported model. Fails when it is not there: a test that is skipped in silence proves nothing.
fn gemma3() -> PathBuf {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/test-models/gemma-3-270m");
    assert!(
        dir.join("model.safetensors").exists(),
        "no model at {}: `scripts/test-setup.sh` makes it",
        dir.display()
    );
    dir
}

fn load_gemma3(adapter: &AdapterConfig) -> TrainableModel {
    TrainableModel::load(&gemma3(), adapter, 0, &test_device()).unwrap()
}

#[test]
fn ids_of_awkward_texts_equal_sentencepiece() {
    let tokenizer = ChatTokenizer::from_dir(&gemma3()).unwrap();
    for entry in reference("gemma3.json")["texts"].as_array().unwrap() {
        let text = entry["text"].as_str().unwrap();
        let found = tokenizer.encode_plain(text).unwrap();
        assert_eq!(found, ids(&entry["ids"]), "{text:?}");
        // SentencePiece writes a space as ▁, and so cannot tell the two apart.
        assert_eq!(tokenizer.decode(&found).unwrap(), text.replace('▁', " "));
    }
}

#[test]
fn logits_losses_and_continuation_equal_transformers() {
    let model = load_gemma3(&AdapterConfig::default());
    let reference = reference("gemma3.json");
    for (name, prompt) in reference["prompts"].as_object().unwrap() {
        let ids_of_prompt = ids(&prompt["ids"]);
        let mut worst = 0f64;
        let positions = prompt["positions"].as_object().unwrap();
        let numbers_of: Vec<usize> = positions.keys().map(|key| key.parse().unwrap()).collect();
        let logits = model.logits(&ids_of_prompt, &numbers_of).unwrap();
        for (logits, (position, expected)) in logits.iter().zip(positions) {
            let top = ids(&expected["top20_ids"]).into_iter().map(|id| id as usize);
            for (id, expected) in top.zip(numbers(&expected["top20_logits"])) {
                worst = worst.max((f64::from(logits[id]) - expected).abs());
            }
            let every = numbers(&expected["every_8192nd"]);
            for (logit, expected) in logits.iter().step_by(8192).zip(every) {
                worst = worst.max((f64::from(*logit) - expected).abs());
            }
            let sum: f64 = logits.iter().map(|&z| f64::from(z).exp()).sum();
            let expected_sum = expected["logsumexp"].as_f64().unwrap();
            worst = worst.max((sum.ln() - expected_sum).abs());
            let greatest = logits.iter().copied().fold(f32::MIN, f32::max);
            let most_likely = logits.iter().position(|&z| z == greatest).unwrap();
            let at = position.parse::<usize>().unwrap();
            assert_eq!(most_likely as u64, prompt["argmax"][at].as_u64().unwrap(), "{name}");
        }
        let outcome = model.evaluate(&Batch::single(&ids_of_prompt)).unwrap();
        let expected = prompt["sum_nll"].as_f64().unwrap() / outcome.weight;
        let loss = (outcome.weighted_nll / outcome.weight - expected).abs();
        println!("{name}: greatest error of a logit {worst:.1e}, of the loss {loss:.1e}");
        assert!(worst < LOGIT_TOLERANCE, "{name}: {worst:e}");
        assert!(loss < LOSS_TOLERANCE, "{name}: {loss:e}");
    }
    let story = ids(&reference["prompts"]["story"]["ids"]);
    assert_eq!(model.generate_greedy(&story, 16, &[1]).unwrap(), ids(&reference["greedy"]));
}

#[test]
fn two_steps_of_lora_follow_peft() {
    let adapter = AdapterConfig {
        r: 4,
        alpha: 8.0,
        target_modules: vec!["q_proj".to_owned(), "v_proj".to_owned()],
        ..AdapterConfig::default()
    };
    let mut model = load_gemma3(&adapter);
    let mut tensors = model.trainable_tensors().unwrap();
    for tensor in tensors.iter_mut().filter(|tensor| tensor.name.ends_with("lora_A.weight")) {
        let layer: usize = tensor.name.split('.').nth(4).unwrap().parse().unwrap();
        let number = 2 * layer + usize::from(tensor.name.contains("v_proj"));
        let columns = tensor.shape[1];
        for (index, value) in tensor.data.iter_mut().enumerate() {
            let (row, column) = (index / columns, index % columns);
            *value = (((31 * row + 17 * column + 7 * number) % 64) as f32 - 31.5) / 1024.0;
        }
    }
    model.load_trainable_tensors(tensors).unwrap();

    let reference = reference("gemma3.json");
    let rows: Vec<(Vec<u32>, Vec<f32>)> = reference["prompts"]
        .as_object()
        .unwrap()
        .iter()
        .filter(|(name, _)| *name != "long")
        .map(|(_, prompt)| {
            let ids = ids(&prompt["ids"]);
            let weights = (0..ids.len()).map(|i| if i == 0 { 0.0 } else { 1.0 }).collect();
            (ids, weights)
        })
        .collect();
    let batch = pack(&rows);
    let params = AdamWParams { learning_rate: 2e-4, ..AdamWParams::default() };
    let losses = numbers(&reference["lora"]["losses"]);
    for (step, norm) in numbers(&reference["lora"]["grad_norms"]).into_iter().enumerate() {
        let key = DropoutKey { seed: 0, step: step as u64, micro_batch: 0 };
        let outcome = model.forward_backward(&batch, 1.0 / batch.total_weight(), key).unwrap();
        let found = model.optimizer_step(&params, None).unwrap();
        let loss = outcome.weighted_nll / outcome.weight;
        println!("step {step}: loss {loss}, norm {found}");
        assert!((loss - losses[step]).abs() < LOSS_TOLERANCE, "{loss} {}", losses[step]);
        assert!((found / norm - 1.0).abs() < NORM_TOLERANCE, "{found} {norm}");
    }
    let outcome = model.evaluate(&batch).unwrap();
    let loss = outcome.weighted_nll / outcome.weight;
    assert!((loss - losses[2]).abs() < LOSS_TOLERANCE, "{loss} {}", losses[2]);
}
