//! Runs on preference pairs, and on raw text.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tunesmith_core::errors::ErrorCode;
use tunesmith_core::hyperparameters::{DataFacts, Hyperparameters, Method};
use tunesmith_core::protocol::TrainRequest;
use tunesmith_engine::train::{Outcome, TrainOptions};

use crate::resume::{check_equal, timeless};
use crate::support::{Bench, CONTEXT, finish, run};

/// Pairs of a short answer that is preferred to a long one.
fn pair_rows(rows: usize) -> String {
    let mut text = String::new();
    for row in 0..rows {
        let answer = |text: String| json!([{"role": "assistant", "content": text}]);
        let pair = json!({
            "input": {"messages": [{"role": "user", "content": format!("What is {row}?")}]},
            "preferred_output": answer("ha".repeat(1 + row % 3)),
            "non_preferred_output": answer(format!("no {}", "x".repeat(3 + row % 5))),
        });
        writeln!(text, "{pair}").expect("text");
    }
    text
}

/// A request to learn from `rows` pairs.
pub(crate) fn request(bench: &Bench, name: &str, rows: usize, fields: &Value) -> TrainRequest {
    let mut request = bench.request(name, &json!({}));
    fs::write(&request.training_file, pair_rows(rows)).expect("data");
    let fields = fields.as_object().expect("an object");
    let (parsed, unknown) =
        Hyperparameters::parse_for(Method::Dpo, fields, "hyperparameters").expect("valid");
    assert!(unknown.is_empty(), "{unknown:?}");
    let facts = DataFacts { examples: rows, context_length: CONTEXT };
    request.spec.hyperparameters = parsed.resolve(&facts);
    request
}

fn resumed(request: TrainRequest, from: &Path) -> TrainRequest {
    TrainRequest { resume_from: Some(from.to_owned()), ..request }
}

#[test]
fn dpo_learns_to_prefer_the_preferred_answers() {
    let bench = Bench::new(10);
    let fields = json!({
        "batch_size": 5, "n_epochs": 8, "learning_rate": 5e-3, "warmup_ratio": 0,
        "validation_split": 0.2,
    });
    let transcript = finish(&request(&bench, "out", 12, &fields));
    let started = transcript.started();
    assert_eq!((started.train_rows, started.valid_rows, started.total_steps), (10, 2, 16));
    // Before its first step the model is its own reference.
    let first = &transcript.steps[0];
    let ln_2 = std::f64::consts::LN_2;
    assert!((first.train_loss - ln_2).abs() < 1e-5, "{first:?}");
    assert!(started.initial_valid_loss.is_some_and(|loss| (loss - ln_2).abs() < 1e-5));
    let last = transcript.steps.last().expect("steps");
    assert!(last.train_loss < 0.6, "{last:?}");
    assert_eq!(last.train_reward_accuracy, Some(1.0));
    assert!(last.train_reward_margin.is_some_and(|margin| margin > 0.2), "{last:?}");
    assert!(last.valid_loss.is_some_and(|loss| loss < ln_2), "{last:?}");
    assert!(last.valid_reward_margin.is_some_and(|margin| margin > 0.0), "{last:?}");
    assert!((0.0..=1.0).contains(&last.train_mean_token_accuracy));
    let readme = fs::read_to_string(transcript.checkpoint(16).join("weights/README.md"));
    assert!(readme.expect("README").contains("| preference loss | DPO, beta 0.1 |"));
}

#[test]
fn orpo_and_simpo_lower_their_losses_without_a_reference() {
    for loss in ["orpo", "simpo"] {
        let bench = Bench::new(10);
        let fields = json!({
            "batch_size": 10, "n_epochs": 20, "learning_rate": 5e-3, "preference_loss": loss,
        });
        let transcript = finish(&request(&bench, "out", 10, &fields));
        let losses = transcript.train_losses();
        assert!(losses[19] < 0.9 * losses[0], "{loss}: {losses:?}");
        let margin = |step: usize| transcript.steps[step].train_reward_margin.expect("a margin");
        assert!(margin(19) > margin(0), "{loss}");
        let state = transcript.checkpoint(20).join("state/trainer.json");
        let state = fs::read_to_string(state).expect("state");
        assert!(!state.contains("references"), "{state}");
    }
}

/// Ten steps with a checkpoint every two.
fn ten_steps(adapter: Value) -> Value {
    json!({
        "batch_size": 2, "gradient_accumulation_steps": 2, "n_epochs": 10, "max_steps": 10,
        "learning_rate": 5e-3, "checkpoint_steps": 2, "eval_steps": 3, "validation_split": 0.1,
        "adapter": adapter,
    })
}

#[test]
fn a_run_on_pairs_goes_on_bit_equal_whatever_trains() {
    for adapter in [json!({"type": "full"}), json!({"r": 3, "dropout": 0.2})] {
        let bench = Bench::new(13);
        let of = |name: &str| request(&bench, name, 13, &ten_steps(adapter.clone()));
        let straight = finish(&of("straight"));
        assert_eq!(straight.steps.len(), 10);
        let (first, outcome) = run(&of("first"), &TrainOptions::default(), Some(5));
        assert_eq!(outcome.expect("stopped"), Outcome::Stopped);
        let second = finish(&resumed(of("second"), first.checkpoint(4)));
        check_equal(&straight, &first, &second, 4);
        assert!(straight.steps[9].train_loss < straight.steps[0].train_loss);
    }
}

#[test]
fn accumulated_passes_of_pairs_equal_one_pass() {
    let bench = Bench::new(10);
    let common = |fields: Value| {
        let mut all = json!({"n_epochs": 2, "learning_rate": 1e-3, "preference_loss": "orpo"});
        for (name, value) in fields.as_object().expect("an object") {
            all[name] = value.clone();
        }
        all
    };
    let whole = finish(&request(&bench, "whole", 10, &common(json!({"batch_size": 4}))));
    for (name, fields, tokens_per_pass) in [
        ("parts", json!({"batch_size": 2, "gradient_accumulation_steps": 2}), 2048),
        ("unpacked", json!({"batch_size": 4, "packing": false}), 2048),
        ("small passes", json!({"batch_size": 4}), 100),
    ] {
        let request = request(&bench, name, 10, &common(fields));
        let options = TrainOptions { tokens_per_pass, ..TrainOptions::default() };
        let (other, outcome) = run(&request, &options, None);
        assert!(outcome.is_ok(), "{outcome:?}");
        assert_eq!(whole.steps.len(), other.steps.len());
        for (one, two) in timeless(&whole.steps).iter().zip(&timeless(&other.steps)) {
            let close = |a: f64, b: f64| (a - b).abs() <= 1e-5 * a.abs().max(1.0);
            assert!(close(one.train_loss, two.train_loss), "{name}: {one:?} {two:?}");
            assert!(close(one.grad_norm, two.grad_norm), "{name}: {one:?} {two:?}");
            assert_eq!(one.tokens, two.tokens);
        }
    }
}

#[test]
fn a_chat_row_among_pairs_is_the_owners_error() {
    let bench = Bench::new(10);
    let request = request(&bench, "out", 10, &json!({"n_epochs": 1}));
    let chat = json!({"messages": [{"role": "user", "content": "q"},
                                   {"role": "assistant", "content": "a"}]});
    fs::write(&request.training_file, format!("{}{chat}\n", pair_rows(10))).expect("data");
    let (_, outcome) = run(&request, &TrainOptions::default(), None);
    let error = outcome.expect_err("a chat row").to_api_error();
    assert_eq!(error.code, ErrorCode::InvalidFileFormat);
    assert!(error.message.starts_with("Line 11: the row is a chat row, but method \"dpo\""));
}

#[test]
fn a_long_text_trains_on_every_token_in_windows() {
    let bench = Bench::new(3);
    let text = "no ".repeat(100);
    let request = bench.request(
        "out",
        &json!({"batch_size": 4, "n_epochs": 1, "max_seq_length": 32, "validation_split": 0}),
    );
    let rows: String = (0..3).map(|_| format!("{}\n", json!({"text": text}))).collect();
    fs::write(&request.training_file, rows).expect("data");
    let transcript = finish(&request);
    // 300 letters and the end token: 31 new tokens to a window after the first token.
    assert_eq!(transcript.started().train_rows, 3 * 10);
    assert_eq!(transcript.started().truncated_rows, 0);
    let last = transcript.steps.last().expect("steps");
    // Each window but a text's first begins with a token of the one before it.
    assert_eq!(last.tokens, 3 * (301 + 9));
}
