//! Steps, epochs, evaluations, and what stops a run.

use std::fs;
use std::ops::Add as _;

use serde_json::json;
use tunesmith_core::errors::ErrorCode;
use tunesmith_core::protocol::{Finished, FromTrainer};
use tunesmith_engine::train::{Outcome, TrainOptions};

use crate::support::{Bench, chat_rows, finish, run};

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-5 * a.abs().max(1.0)
}

#[test]
fn five_rows_by_four_make_two_steps_an_epoch_and_all_are_reported() {
    let bench = Bench::new(5);
    let request = bench.request("out", &json!({"batch_size": 4, "n_epochs": 3}));
    let transcript = finish(&request);
    assert_eq!(transcript.started().total_steps, 6);
    assert_eq!(transcript.started().train_rows, 5);
    let steps: Vec<u64> = transcript.steps.iter().map(|step| step.step).collect();
    assert_eq!(steps, [1, 2, 3, 4, 5, 6]);
    let epochs: Vec<f64> = transcript.steps.iter().map(|step| step.epoch).collect();
    assert_eq!(epochs, [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]);
    // Every epoch sees every token once.
    let tokens: Vec<u64> = transcript.steps.iter().map(|step| step.tokens).collect();
    assert_eq!((tokens[3], tokens[5]), (2 * tokens[1], 3 * tokens[1]));
    let finished = Finished { trained_tokens: tokens[5], steps: 6, best: None, model_step: 6 };
    assert_eq!(transcript.last, Some(FromTrainer::Finished(finished)));
    assert_eq!(transcript.checkpoints.last().map(|checkpoint| checkpoint.step), Some(6));
}

#[test]
fn every_row_is_reported_once_an_epoch_with_its_line_and_the_loss_that_it_has_alone() {
    let bench = Bench::new(5);
    // A rate of next to nothing: the model of the second epoch is that of the first.
    let fields = json!({"batch_size": 4, "n_epochs": 2, "learning_rate": 1e-12,
                        "prompt_loss_weight": 0.3});
    let together = finish(&bench.request("together", &fields));
    let steps: Vec<u64> = together.rows.iter().map(|row| row.step).collect();
    assert_eq!(steps, [1, 1, 1, 1, 2, 3, 3, 3, 3, 4]);
    let mut lines: Vec<u64> = together.rows[..5].iter().map(|row| row.line).collect();
    lines.sort_unstable();
    assert_eq!(lines, [1, 2, 3, 4, 5]);
    // Steps of one row, whose loss is the step's.
    let alone = json!({"batch_size": 1, "n_epochs": 1, "learning_rate": 1e-12,
                       "prompt_loss_weight": 0.3});
    let alone = finish(&bench.request("alone", &alone));
    for (row, step) in alone.rows.iter().zip(&alone.steps) {
        assert_eq!(row.step, step.step);
        assert!(close(row.loss, step.train_loss), "{row:?} {step:?}");
        let same = together.rows.iter().filter(|other| other.row == row.row);
        let losses: Vec<f64> = same.map(|other| other.loss).collect();
        assert_eq!(losses.len(), 2);
        assert!(losses.iter().all(|&loss| close(loss, row.loss)), "{row:?} {losses:?}");
    }
}

#[test]
fn training_lowers_the_loss() {
    let bench = Bench::new(10);
    let request = bench.request(
        "out",
        &json!({"batch_size": 5, "n_epochs": 20, "learning_rate": 1e-2, "warmup_ratio": 0}),
    );
    let losses = finish(&request).train_losses();
    assert!(losses[39] < 0.7 * losses[0], "{losses:?}");
}

#[test]
fn accumulated_micro_batches_equal_one_batch_and_so_do_passes_of_any_size() {
    let bench = Bench::new(10);
    let common = |fields: serde_json::Value| {
        let mut all = json!({"n_epochs": 3, "learning_rate": 1e-3, "prompt_loss_weight": 0.1});
        for (name, value) in fields.as_object().expect("an object") {
            all[name] = value.clone();
        }
        all
    };
    // Ten rows in steps of four: the last step of an epoch has two rows.
    let whole = finish(&bench.request("whole", &common(json!({"batch_size": 4}))));
    let ways = [
        ("parts", json!({"batch_size": 2, "gradient_accumulation_steps": 2}), 2048),
        ("alone", json!({"batch_size": 1, "gradient_accumulation_steps": 4}), 2048),
        ("unpacked", json!({"batch_size": 4, "packing": false}), 2048),
        ("small passes", json!({"batch_size": 4}), 60),
    ];
    for (name, fields, tokens_per_pass) in ways {
        let request = bench.request(name, &common(fields));
        let options = TrainOptions { tokens_per_pass, ..TrainOptions::default() };
        let (other, outcome) = run(&request, &options, None);
        assert!(outcome.is_ok(), "{outcome:?}");
        assert_eq!(whole.steps.len(), other.steps.len());
        for (one, two) in whole.steps.iter().zip(&other.steps) {
            assert!(close(one.train_loss, two.train_loss), "{name}: {one:?} {two:?}");
            assert!(close(one.grad_norm, two.grad_norm), "{name}: {one:?} {two:?}");
            assert_eq!(one.tokens, two.tokens);
        }
    }
}

#[test]
fn validation_is_measured_at_eval_steps_at_epoch_ends_and_at_the_end() {
    let bench = Bench::new(5);
    let mut request = bench
        .request("out", &json!({"batch_size": 1, "n_epochs": 2, "eval_steps": 3, "max_steps": 8}));
    let validation = bench.dir.path().join("valid.jsonl");
    fs::write(&validation, chat_rows(3)).expect("data");
    request.validation_file = Some(validation);
    let transcript = finish(&request);
    assert_eq!(transcript.started().valid_rows, 3);
    assert!(transcript.started().initial_valid_loss.is_some_and(|loss| loss > 0.0));
    let measured = |full: bool| -> Vec<u64> {
        let steps = transcript.steps.iter();
        let loss = steps.filter(|s| if full { s.full_valid_loss } else { s.valid_loss }.is_some());
        loss.map(|step| step.step).collect()
    };
    assert_eq!(measured(false), [3, 6, 8]);
    assert_eq!(measured(true), [5, 8]);
    let last = transcript.steps.last().expect("steps");
    assert_eq!(last.valid_loss, last.full_valid_loss);
    assert!(last.valid_mean_token_accuracy.is_some_and(|share| (0.0..=1.0).contains(&share)));
}

#[test]
fn a_split_holds_rows_out_of_training() {
    let bench = Bench::new(10);
    let request =
        bench.request("out", &json!({"batch_size": 2, "n_epochs": 1, "validation_split": 0.3}));
    let transcript = finish(&request);
    let started = transcript.started();
    assert_eq!((started.train_rows, started.valid_rows, started.total_steps), (7, 3, 4));
    assert!(started.initial_valid_loss.is_some());
}

#[test]
fn without_validation_rows_there_is_no_validation_loss() {
    let bench = Bench::new(4);
    let transcript = finish(&bench.request("out", &json!({"batch_size": 2, "n_epochs": 1})));
    assert_eq!(transcript.started().initial_valid_loss, None);
    assert!(transcript.steps.iter().all(|step| step.valid_loss.is_none()));
}

#[test]
fn warm_up_and_schedule_set_each_steps_rate() {
    let bench = Bench::new(10);
    let request = bench.request(
        "out",
        &json!({"batch_size": 1, "n_epochs": 1, "learning_rate": 1e-3, "warmup_ratio": 0.2}),
    );
    let transcript = finish(&request);
    let rates: Vec<f64> = transcript.steps.iter().map(|step| step.learning_rate).collect();
    assert_eq!(rates[..3], [0.0, 0.5e-3, 1e-3]);
    assert!(rates[2..].windows(2).all(|pair| pair[1] < pair[0]), "{rates:?}");
}

#[test]
fn a_short_run_is_not_all_warm_up() {
    let bench = Bench::new(10);
    let request = bench.request("out", &json!({"max_steps": 1, "learning_rate": 1e-3}));
    assert_eq!(finish(&request).steps[0].learning_rate, 1e-3);
}

#[test]
fn a_loss_that_is_no_number_stops_the_run_naming_step_and_rows() {
    let bench = Bench::new(6);
    let request = bench.request(
        "out",
        &json!({
            "batch_size": 2, "n_epochs": 50, "learning_rate": 1, "warmup_ratio": 0,
            "max_grad_norm": 0, "lr_scheduler": "constant", "adapter": {"type": "lora", "alpha": 65536, "r": 1},
        }),
    );
    let (transcript, outcome) = run(&request, &TrainOptions::default(), None);
    let error = outcome.expect_err("the loss is no number").to_api_error();
    assert_eq!(error.code, ErrorCode::NonFiniteLoss);
    let step = format!("Step {}: ", transcript.steps.len() + 1);
    assert!(error.message.starts_with(&step), "{}", error.message);
    assert!(error.message.contains("of the training file"), "{}", error.message);
    assert!(transcript.steps.iter().all(|step| step.train_loss.is_finite()));
}

#[test]
fn a_broken_row_is_the_owners_error_with_its_line() {
    let bench = Bench::new(5);
    let mut lines: Vec<String> = chat_rows(5).lines().map(str::to_owned).collect();
    lines[2] = r#"{"messages": [{"role": "user", "content": "#.to_owned();
    let request = bench.request("out", &json!({"n_epochs": 1}));
    fs::write(&request.training_file, lines.join("\n")).expect("data");
    let (_, outcome) = run(&request, &TrainOptions::default(), None);
    let error = outcome.expect_err("a broken row").to_api_error();
    assert_eq!(error.code, ErrorCode::InvalidFileFormat);
    assert_eq!(error.param.as_deref(), Some("training_file"));
    assert!(error.message.contains('3'), "{}", error.message);
}

#[test]
fn a_report_that_nobody_takes_ends_the_run() {
    let bench = Bench::new(4);
    let request = bench.request("out", &json!({"n_epochs": 1}));
    let mut reports = 0;
    let outcome = tunesmith_engine::train::train(&request, &Default::default(), &mut |_| {
        reports += 1;
        if reports == 2 { Err(std::io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
    });
    assert!(matches!(outcome, Err(tunesmith_engine::EngineError::Report(_))), "{outcome:?}");
    assert_eq!(reports, 2);
}

#[test]
fn a_stop_before_the_first_step_leaves_no_checkpoint() {
    let bench = Bench::new(4);
    let request = bench.request("out", &json!({"n_epochs": 1}));
    let stop = tunesmith_engine::train::StopFlag::default();
    stop.stop();
    let mut messages = Vec::new();
    let outcome = tunesmith_engine::train::train(&request, &stop, &mut |message| {
        messages.push(message);
        Ok(())
    });
    assert_eq!(outcome.expect("stopped"), Outcome::Stopped);
    assert!(matches!(messages[..], [FromTrainer::Started(_), FromTrainer::Stopped]));
}

#[test]
fn the_last_shorter_step_of_an_epoch_counts_in_full_divided_by_its_own_weight() {
    let bench = Bench::new(5);
    // Five times the same row: a mean over one of them is a mean over four.
    let row = chat_rows(1);
    let request = bench.request(
        "out",
        &json!({
            "batch_size": 2, "gradient_accumulation_steps": 2, "n_epochs": 1,
            "learning_rate": 1e-9, "lr_scheduler": "constant", "warmup_ratio": 0,
        }),
    );
    fs::write(&request.training_file, row.trim_end().to_owned().add("\n").repeat(5)).expect("data");
    let transcript = finish(&request);
    let [whole, shorter] = &transcript.steps[..] else { panic!("{:?}", transcript.steps) };
    assert_eq!(whole.tokens, 4 * (shorter.tokens - whole.tokens));
    assert!(close(whole.train_loss, shorter.train_loss), "{whole:?} {shorter:?}");
    assert!((whole.grad_norm / shorter.grad_norm - 1.0).abs() < 1e-5, "{whole:?} {shorter:?}");
}

#[test]
fn a_job_that_goes_on_from_a_tuned_model_starts_a_new_schedule_and_new_moments() {
    let bench = Bench::new(10);
    let fields = json!({
        "batch_size": 2, "n_epochs": 2, "learning_rate": 1e-3, "warmup_ratio": 0.2,
        "lr_scheduler": "linear", "adapter": {"type": "full"},
    });
    let first = finish(&bench.request("first", &fields));
    let mut request = bench.request("second", &fields);
    request.base_model_dir = first.checkpoint(10).join("weights");
    fs::write(&request.training_file, chat_rows(14)).expect("new data");
    let second = finish(&request);
    assert_eq!(second.started().resumed_from_step, 0);
    assert_eq!(second.started().total_steps, 14);
    let rates: Vec<f64> = second.steps.iter().map(|step| step.learning_rate).collect();
    assert_eq!(rates[..4], [0.0, 1e-3 / 3.0, 2e-3 / 3.0, 1e-3]);
    assert!(second.steps[0].step == 1 && second.steps[0].epoch < 1.0);
    // It goes on from what was learned.
    let (before, after) = (first.steps[0].train_loss, second.steps[0].train_loss);
    assert!(after < before, "{before} {after}");
}

#[test]
fn a_messages_weight_is_a_factor_on_its_tokens_loss() {
    let bench = Bench::new(2);
    let row = |answer: &str, weight: f64| {
        let messages = json!({"messages": [
            {"role": "user", "content": "What?"},
            {"role": "assistant", "content": answer, "weight": weight},
        ]});
        format!("{messages}\n")
    };
    let loss = |name: &str, rows: &str| {
        let fields = json!({"batch_size": 2, "n_epochs": 1, "prompt_loss_weight": 0});
        let request = bench.request(name, &fields);
        fs::write(&request.training_file, rows).expect("data");
        finish(&request).steps[0].train_loss
    };
    // Each letter is a token, and so is the end of the turn.
    let (a, b) = (loss("a", &row("no", 1.0)), loss("b", &row("yes it is", 1.0)));
    assert!((a - b).abs() > 1e-3, "{a} {b}");
    let mixed = loss("mixed", &(row("no", 1.0) + &row("yes it is", 0.1)));
    let expected = (3.0 * a + 0.1 * 10.0 * b) / (3.0 + 0.1 * 10.0);
    assert!(close(mixed, expected), "{mixed} {expected}");
}
