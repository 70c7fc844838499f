//! SmolLM2's logits, hidden states, continuations and losses before training.

use serde_json::Value;
use tunesmith_core::hyperparameters::AdapterConfig;
use tunesmith_engine::{Batch, TrainableModel};

use crate::support::{ids, load_smollm2, numbers, pack, reference};

/// f32 against f64 was up to 9e-5 in PyTorch.
const LOGIT_TOLERANCE: f64 = 2e-4;
/// PyTorch's own f32 cross entropy is off by up to 1.6e-5 a token.
const LOSS_TOLERANCE: f64 = 2e-5;

fn logits_at(model: &TrainableModel, prompt: &Value) -> (Vec<usize>, Vec<Vec<f32>>) {
    let ids = ids(&prompt["ids"]);
    let positions: Vec<usize> = (0..ids.len()).collect();
    let logits = model.logits(&ids, &positions).unwrap();
    (positions, logits)
}

#[test]
fn logits_of_three_prompts_equal_pytorch() {
    let model = load_smollm2(&AdapterConfig::default());
    for (name, prompt) in reference("a_logits.json").as_object().unwrap() {
        let (_, logits) = logits_at(&model, prompt);
        let mut worst = 0f64;
        for (position, expected) in prompt["positions"].as_object().unwrap() {
            let logits = &logits[position.parse::<usize>().unwrap()];
            let top = ids(&expected["top20_ids"]).into_iter().map(|id| id as usize);
            for (id, expected) in top.zip(numbers(&expected["top20_logits"])) {
                worst = worst.max((f64::from(logits[id]) - expected).abs());
            }
            let every_1024th = numbers(&expected["every_1024th"]);
            for (logit, expected) in logits.iter().step_by(1024).zip(every_1024th) {
                worst = worst.max((f64::from(*logit) - expected).abs());
            }
            let sum: f64 = logits.iter().map(|&z| f64::from(z).exp()).sum();
            let expected = expected["logsumexp"].as_f64().unwrap();
            worst = worst.max((sum.ln() - expected).abs());
        }
        println!("{name}: greatest error of a logit {worst:.1e}");
        assert!(worst < LOGIT_TOLERANCE, "{name}: {worst:e}");
    }
}

#[test]
fn most_likely_token_of_every_position_equals_pytorch() {
    let model = load_smollm2(&AdapterConfig::default());
    for (name, prompt) in reference("a_logits.json").as_object().unwrap() {
        let (_, logits) = logits_at(&model, prompt);
        let most_likely: Vec<u32> = logits
            .iter()
            .map(|logits| {
                let greatest = logits.iter().copied().fold(f32::MIN, f32::max);
                logits.iter().position(|&z| z == greatest).unwrap() as u32
            })
            .collect();
        assert_eq!(most_likely, ids(&prompt["argmax_all_positions"]), "{name}");
    }
}

#[test]
fn hidden_state_after_every_layer_equals_pytorch() {
    let model = load_smollm2(&AdapterConfig::default());
    for (name, prompt) in reference("a_logits.json").as_object().unwrap() {
        let norms = model.hidden_norms(&ids(&prompt["ids"])).unwrap();
        let expected = numbers(&prompt["hidden_l2_last_position"]);
        assert_eq!(norms.len(), expected.len());
        for (layer, (norm, expected)) in norms.iter().zip(expected).enumerate() {
            assert!((norm / expected - 1.0).abs() < 1e-5, "{name}: {layer}: {norm} {expected}");
        }
    }
}

#[test]
fn greedy_continuation_equals_pytorch() {
    let model = load_smollm2(&AdapterConfig::default());
    for (name, prompt) in reference("a_logits.json").as_object().unwrap() {
        // 2 is `<|im_end|>`, where one of the references stops.
        let generated = model.generate_greedy(&ids(&prompt["ids"]), 32, &[2]).unwrap();
        assert_eq!(generated, ids(&prompt["greedy32_ids"]), "{name}");
    }
}

#[test]
fn mean_loss_of_plain_text_equals_pytorch() {
    let model = load_smollm2(&AdapterConfig::default());
    for (name, prompt) in reference("a_logits.json").as_object().unwrap() {
        let outcome = model.evaluate(&Batch::single(&ids(&prompt["ids"]))).unwrap();
        let expected = prompt["mean_ce_all_tokens"].as_f64().unwrap();
        let loss = outcome.weighted_nll / outcome.weight;
        assert!((loss - expected).abs() < LOSS_TOLERANCE, "{name}: {loss} {expected}");
    }
}

/// Every example with a prompt-loss weight: ids, and the weight of each token as a target.
pub(crate) fn examples(prompt_loss_weight: f32) -> Vec<(Vec<u32>, Vec<f32>)> {
    let losses = reference("c_init_losses.json");
    losses["examples"]
        .as_array()
        .unwrap()
        .iter()
        .map(|example| {
            let mask = example["completion_mask"].as_str().unwrap();
            let weight = |bit| if bit == '1' { 1.0 } else { prompt_loss_weight };
            (ids(&example["ids"]), mask.chars().map(weight).collect())
        })
        .collect()
}

#[test]
fn loss_of_every_example_equals_the_f64_sums_at_three_prompt_loss_weights() {
    let model = load_smollm2(&AdapterConfig::default());
    let losses = reference("c_init_losses.json");
    let mut worst = 0f64;
    for prompt_loss_weight in [0f64, 0.1, 1.0] {
        let examples = examples(prompt_loss_weight as f32);
        for (row, expected) in examples.iter().zip(losses["examples"].as_array().unwrap()) {
            let outcome = model.evaluate(&pack(std::slice::from_ref(row))).unwrap();
            let number = |name: &str| expected[name].as_f64().unwrap();
            let sum = number("sum_ce_completion") + prompt_loss_weight * number("sum_ce_prompt");
            let weight = number("n_completion") + prompt_loss_weight * number("n_prompt");
            worst = worst.max((outcome.weighted_nll / outcome.weight - sum / weight).abs());
        }
    }
    println!("greatest error of an example's loss {worst:.1e}");
    assert!(worst < LOSS_TOLERANCE, "{worst:e}");
}

#[test]
fn loss_of_packed_batches_equals_that_of_padded_ones() {
    let model = load_smollm2(&AdapterConfig::default());
    let losses = reference("c_init_losses.json");
    let expected = losses["batch4_losses_padded"].as_array().unwrap();
    let mut worst = 0f64;
    for (key, prompt_loss_weight) in [("0.0", 0.0), ("0.1", 0.1), ("1.0", 1.0)] {
        let examples = examples(prompt_loss_weight);
        for (rows, expected) in examples.chunks(4).zip(expected) {
            let outcome = model.evaluate(&pack(rows)).unwrap();
            let loss = outcome.weighted_nll / outcome.weight;
            worst = worst.max((loss - expected[key].as_f64().unwrap()).abs());
        }
    }
    println!("greatest error of a batch's loss {worst:.1e}");
    assert!(worst < LOSS_TOLERANCE, "{worst:e}");
}
