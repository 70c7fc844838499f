//! What a run decides by its losses: early stopping, the best step, going back, and notes.

use std::fs;

use serde_json::{Value, json};
use tunesmith_core::errors::ErrorCode;
use tunesmith_core::protocol::{Finished, FromTrainer, Note, NoteLevel, TrainRequest};
use tunesmith_engine::train::{Outcome, TrainOptions};

use crate::support::{Bench, Transcript, chat_rows, finish, run};

fn finished(transcript: &Transcript) -> &Finished {
    match &transcript.last {
        Some(FromTrainer::Finished(finished)) => finished,
        other => panic!("{other:?}"),
    }
}

/// The notes of an occasion, by the begin of their keys.
fn notes<'a>(transcript: &'a Transcript, key: &str) -> Vec<&'a Note> {
    transcript.notes.iter().filter(|note| note.key.starts_with(key)).collect()
}

fn validated(bench: &Bench, name: &str, fields: &Value) -> TrainRequest {
    let validation = bench.dir.path().join("valid.jsonl");
    fs::write(&validation, chat_rows(3)).expect("data");
    TrainRequest { validation_file: Some(validation), ..bench.request(name, fields) }
}

/// Evaluates after every second step, and no evaluation is better than the first.
fn impatient() -> Value {
    json!({
        "batch_size": 1, "n_epochs": 9, "learning_rate": 1e-9, "eval_steps": 2,
        "checkpoint_steps": 5, "early_stopping_patience": 3, "early_stopping_threshold": 0.01,
    })
}

#[test]
fn early_stopping_ends_the_run_and_names_the_best_step_as_the_model() {
    let bench = Bench::new(4);
    let transcript = finish(&validated(&bench, "out", &impatient()));
    assert_eq!(transcript.started().total_steps, 36);
    // Evaluated after steps 2, 4, 6 and 8: three of them brought nothing. (An epoch ends with 4.)
    assert_eq!(transcript.steps.last().map(|step| step.step), Some(8));
    let finished = finished(&transcript);
    let best = finished.best.expect("there are validation rows");
    assert_eq!((finished.steps, finished.model_step), (8, best.step));
    assert_eq!(finished.trained_tokens, transcript.steps[7].tokens);
    for step in [best.step, 8] {
        let written = transcript.checkpoints.iter().find(|checkpoint| checkpoint.step == step);
        assert!(!written.expect("a checkpoint").for_resume_only);
    }
    let [note] = notes(&transcript, "early-stopping")[..] else { panic!("{transcript:?}") };
    assert!(
        note.message.starts_with("Early stopping after step 8 of 36: 3 evaluations"),
        "{note:?}"
    );
    let [note] = notes(&transcript, "best-step")[..] else { panic!("{transcript:?}") };
    let start = format!("Best validation loss {:.4} at step {}", best.valid_loss, best.step);
    assert!(note.message.starts_with(&start), "{note:?}");
    assert!(note.message.ends_with("its weights are the tuned model."), "{note:?}");
}

#[test]
fn patience_goes_on_where_it_was_after_a_resume() {
    let bench = Bench::new(4);
    let fields = impatient();
    let straight = finish(&validated(&bench, "straight", &fields));
    for stopped_at in [3, 5, 7] {
        let request = validated(&bench, &format!("first {stopped_at}"), &fields);
        let (first, outcome) = run(&request, &TrainOptions::default(), Some(stopped_at));
        assert_eq!(outcome.expect("stopped"), Outcome::Stopped);
        let dir = first.checkpoints.last().expect("a checkpoint").dir.clone();
        let request = validated(&bench, &format!("second {stopped_at}"), &fields);
        let second = finish(&TrainRequest { resume_from: Some(dir), ..request });
        assert_eq!(second.last, straight.last);
    }
    // From the very last checkpoint nothing is left to do but to say so.
    let request = validated(&bench, "after", &fields);
    let last = straight.checkpoint(8).to_owned();
    let after = finish(&TrainRequest { resume_from: Some(last), ..request });
    assert!(after.steps.is_empty(), "{:?}", after.steps);
    assert_eq!(after.last, straight.last);
}

#[test]
fn without_early_stopping_the_model_is_the_last_step_unless_the_best_is_asked_for() {
    let bench = Bench::new(8);
    // So fast that the loss on the validation rows rises again.
    let mut fields = json!({
        "batch_size": 2, "n_epochs": 8, "learning_rate": 5e-2, "eval_steps": 1,
        "lr_scheduler": "constant", "checkpoint_steps": 1000,
    });
    let last = finish(&validated(&bench, "last", &fields));
    let best = finished(&last).best.expect("there are validation rows");
    assert!(best.step < 32, "the case needs a best step before the last");
    assert_eq!((finished(&last).steps, finished(&last).model_step), (32, 32));
    let [note] = notes(&last, "best-step")[..] else { panic!("{:?}", last.notes) };
    assert!(note.message.contains("has the weights of step 32"), "{note:?}");
    assert_eq!(last.checkpoints.len(), 1);

    fields["load_best_model_at_end"] = json!(true);
    let kept = finish(&validated(&bench, "best", &fields));
    assert_eq!(finished(&kept).best, Some(best));
    assert_eq!((finished(&kept).steps, finished(&kept).model_step), (32, best.step));
    let readme = kept.checkpoint(best.step).join("weights/README.md");
    let readme = fs::read_to_string(readme).expect("README");
    assert!(readme.contains(&format!("after step {} |", best.step)), "{readme}");
    let losses = kept.steps.iter().map(|step| step.valid_loss.expect("evaluated"));
    let lowest = losses.enumerate().min_by(|a, b| a.1.total_cmp(&b.1)).expect("steps");
    assert_eq!((lowest.0 as u64 + 1, lowest.1), (best.step, best.valid_loss));
}

#[test]
fn without_validation_rows_nothing_is_said_of_a_best_step() {
    let bench = Bench::new(4);
    let transcript = finish(&bench.request("out", &json!({"batch_size": 2, "n_epochs": 1})));
    assert_eq!((finished(&transcript).best, finished(&transcript).model_step), (None, 2));
    assert_eq!(transcript.notes, []);
}

#[test]
fn a_loss_that_leaps_ends_the_run_naming_step_and_rows() {
    let bench = Bench::new(10);
    // Rows of one step each differ by more than a tenth.
    let fields = json!({
        "batch_size": 1, "n_epochs": 5, "learning_rate": 1e-9, "spike_factor": 1.02,
        "checkpoint_steps": 3,
    });
    let (transcript, outcome) = run(&bench.request("out", &fields), &TrainOptions::default(), None);
    let error = outcome.expect_err("a leap").to_api_error();
    assert_eq!(error.code, ErrorCode::LossSpike);
    let failed = transcript.steps.len() + 1;
    assert!(failed > 5, "five losses come before the first verdict");
    assert!(error.message.starts_with(&format!("Step {failed}: the training loss on line ")));
    assert!(error.message.contains("more than 1.02 times"), "{}", error.message);
    assert!(error.message.contains("spike_factor = 0"), "{}", error.message);
}

/// Diverges within a few steps at its learning rate, and not any more at an eighth: each time back
/// to the start, as the first checkpoint comes later.
fn wild(on_divergence: &str) -> Value {
    json!({
        "batch_size": 2, "n_epochs": 6, "learning_rate": 1, "warmup_ratio": 0, "max_grad_norm": 0,
        "lr_scheduler": "constant", "checkpoint_steps": 9, "on_divergence": on_divergence,
        "adapter": {"type": "lora", "alpha": 3072, "r": 1},
    })
}

#[test]
fn a_run_that_goes_back_tells_of_it_and_takes_the_last_checkpoint_at_half_the_rate() {
    let bench = Bench::new(6);
    let (failed, outcome) =
        run(&bench.request("fail", &wild("fail")), &TrainOptions::default(), None);
    let error = outcome.expect_err("diverges").to_api_error();
    assert_eq!(error.code, ErrorCode::NonFiniteLoss);
    let diverged_at = failed.steps.len() as u64 + 1;

    let transcript = finish(&bench.request("back", &wild("rollback")));
    let notes = notes(&transcript, "rollback-");
    assert!(!notes.is_empty());
    assert!(notes.iter().all(|note| note.level == NoteLevel::Warn), "{notes:?}");
    assert!(notes[0].message.starts_with(&format!("Step {diverged_at}: ")), "{:?}", notes[0]);
    let checkpoint = (diverged_at - 1) / 9 * 9;
    let back = format!("goes back to its checkpoint of step {checkpoint} and on at half");
    assert!(notes[0].message.contains(&back), "{:?}", notes[0]);
    // The steps after the checkpoint are trained again, at the lower rate.
    let again = transcript.steps[diverged_at as usize - 1].clone();
    assert_eq!((again.step, again.learning_rate), (checkpoint + 1, 0.5));
    assert_eq!(transcript.steps.last().map(|step| step.step), Some(18));
    let factor = 0.5f64.powi(notes.len() as i32);
    assert_eq!(transcript.steps.last().map(|step| step.learning_rate), Some(factor));
    // Nothing of the way back is left but the last.
    let left = fs::read_dir(bench.dir.path().join("back")).expect("directory");
    let copies = left.filter(|entry| {
        let name = entry.as_ref().expect("entry").file_name();
        name.to_string_lossy().starts_with("way-back-")
    });
    assert_eq!(copies.count(), 1);
}

#[test]
fn a_resumed_run_goes_back_as_the_one_that_ran_through() {
    let bench = Bench::new(6);
    let straight = finish(&bench.request("straight", &wild("rollback")));
    let bits = |transcript: &Transcript| {
        let file = transcript.checkpoint(18).join("weights/adapter_model.safetensors");
        fs::read(file).expect("weights")
    };
    let mut resumed = 0;
    for checkpoint in &straight.checkpoints {
        if checkpoint.step == 18 {
            continue;
        }
        let request = bench.request(&format!("from {}", checkpoint.step), &wild("rollback"));
        let second = finish(&TrainRequest { resume_from: Some(checkpoint.dir.clone()), ..request });
        assert_eq!(bits(&second), bits(&straight), "from step {}", checkpoint.step);
        assert_eq!(second.last, straight.last);
        resumed += 1;
    }
    assert!(resumed > 0);
}

#[test]
fn a_run_that_diverges_whatever_the_rate_fails_after_three_times() {
    let bench = Bench::new(6);
    let mut fields = wild("rollback");
    fields["adapter"]["alpha"] = json!(65_536);
    fields["learning_rate"] = json!(1);
    let (transcript, outcome) = run(&bench.request("out", &fields), &TrainOptions::default(), None);
    let error = outcome.expect_err("diverges").to_api_error();
    assert_eq!(error.code, ErrorCode::NonFiniteLoss);
    assert!(error.message.contains("went back to a checkpoint 3 times"), "{}", error.message);
    assert_eq!(notes(&transcript, "rollback-").len(), 3);
    let keys: Vec<&str> = transcript.notes.iter().map(|note| note.key.as_str()).collect();
    assert_eq!(keys, ["rollback-1", "rollback-2", "rollback-3"]);
}

/// The loss of a row leaps whatever the rate: three times back, to the same state each time.
fn leaping(adapter: Value) -> Value {
    json!({
        "batch_size": 1, "n_epochs": 5, "learning_rate": 1e-6, "spike_factor": 1.02,
        "on_divergence": "rollback", "checkpoint_steps": 3, "adapter": adapter,
    })
}

#[test]
fn a_resumed_run_goes_back_at_the_same_steps_and_says_the_same() {
    let bench = Bench::new(6);
    let fields = leaping(json!({"type": "full"}));
    let request = bench.request("straight", &fields);
    let (straight, outcome) = run(&request, &TrainOptions::default(), None);
    let error = outcome.expect_err("a leap").to_string();
    assert!(!straight.checkpoints.is_empty());
    for checkpoint in &straight.checkpoints {
        let request = bench.request(&format!("from {}", checkpoint.step), &fields);
        let request = TrainRequest { resume_from: Some(checkpoint.dir.clone()), ..request };
        let (second, outcome) = run(&request, &TrainOptions::default(), None);
        assert_eq!(outcome.expect_err("a leap").to_string(), error);
        assert_eq!(second.notes, straight.notes);
        let before = straight.steps.len() - second.steps.len();
        assert_eq!(second.train_losses()[..], straight.train_losses()[before..]);
    }
}

#[test]
fn full_fine_tuning_goes_back_too() {
    assert_goes_back(json!({"type": "full"}));
}

#[test]
fn frozen_layers_in_the_checkpoint_are_no_hindrance_on_the_way_back() {
    assert_goes_back(json!({"type": "full", "trainable_layers": 1}));
    assert_goes_back(json!({"type": "lora", "r": 3, "trainable_layers": 1}));
    assert_goes_back(json!({"r": 3, "init_lora_weights": "pissa"}));
}

fn assert_goes_back(adapter: Value) {
    let bench = Bench::new(6);
    let fields = leaping(adapter);
    let (transcript, outcome) = run(&bench.request("out", &fields), &TrainOptions::default(), None);
    assert_eq!(outcome.expect_err("a leap").to_api_error().code, ErrorCode::LossSpike);
    let notes = notes(&transcript, "rollback-");
    assert_eq!(notes.len(), 3);
    let first = |step: u64| {
        let losses = transcript.steps.iter().filter(move |metrics| metrics.step == step);
        losses.map(|metrics| metrics.train_loss).collect::<Vec<_>>()
    };
    // The first step after the checkpoint has the very loss that it had before.
    let checkpoint = transcript.checkpoints.last().expect("a checkpoint").step;
    let losses = first(checkpoint + 1);
    assert_eq!(losses.len(), 4);
    assert!(losses.iter().all(|loss| loss == &losses[0]), "{losses:?}");
}

#[test]
fn noise_changes_training_and_leaves_evaluation_alone() {
    let bench = Bench::new(6);
    let fields = |alpha: f64| {
        json!({
            "batch_size": 2, "max_steps": 3, "learning_rate": 1e-3, "warmup_ratio": 0,
            "neftune_noise_alpha": alpha,
        })
    };
    let plain = finish(&validated(&bench, "plain", &fields(0.0)));
    let noisy = finish(&validated(&bench, "noisy", &fields(50.0)));
    let again = finish(&validated(&bench, "again", &fields(50.0)));
    assert_eq!(plain.started().initial_valid_loss, noisy.started().initial_valid_loss);
    assert_ne!(plain.steps[0].train_loss, noisy.steps[0].train_loss);
    assert_ne!(plain.steps[0].grad_norm, noisy.steps[0].grad_norm);
    assert_eq!(noisy.train_losses(), again.train_losses());
}

#[test]
fn a_curve_that_does_not_move_is_told_of_at_the_end() {
    let bench = Bench::new(10);
    let fields = json!({"batch_size": 1, "n_epochs": 5, "learning_rate": 1e-9});
    let transcript = finish(&bench.request("out", &fields));
    let [note] = &transcript.notes[..] else { panic!("{:?}", transcript.notes) };
    assert_eq!((note.key.as_str(), note.level), ("curve-learning-rate-too-low", NoteLevel::Warn));
}
