//! A trainer that follows a script in place of learning: a real process that speaks the protocol
//! and writes real checkpoints, so that the worker's tests can make it die where they need it.
//!
//! Its loss is a function of a running sum that only its checkpoint carries from one process to
//! the next: a curve that continues wrongly is a curve that differs.

use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;
use tunesmith_core::errors::ErrorCode;
use tunesmith_core::hyperparameters::Precision;
use tunesmith_core::metrics::StepMetrics;
use tunesmith_core::protocol::{
    CheckpointWritten, Finished, FromTrainer, Note, NoteLevel, Started, ToTrainer, TrainRequest,
    read_frame, write_frame,
};

/// What to do, as JSON in the first argument.
#[derive(Deserialize)]
struct Script {
    total_steps: u64,
    checkpoint_steps: u64,
    #[serde(default)]
    validation: bool,
    /// Sleep between steps.
    #[serde(default)]
    step_millis: u64,
    /// Kill this very process, as the kernel would, once it has done so many steps and their
    /// messages are out …
    #[serde(default)]
    die_after_steps: Option<u64>,
    /// … but not when it resumed from a checkpoint.
    #[serde(default)]
    die_only_when_fresh: bool,
    /// Say that the job cannot go on before this step.
    #[serde(default)]
    fail_at_step: Option<u64>,
    /// After this step, wait: go on once the file is there.
    #[serde(default)]
    wait_at_step: Option<u64>,
    #[serde(default)]
    wait_for: Option<PathBuf>,
    /// After this step, stop early: the model is the checkpoint of the step before the last one.
    #[serde(default)]
    stop_early_at_step: Option<u64>,
    /// Fail unless the run begins with an adapter that is there, or resumes.
    #[serde(default)]
    starts_from_weights: bool,
    /// Do not obey `Stop`.
    #[serde(default)]
    ignore_stop: bool,
    /// Reported with every step, to tell one worker's trainer from another's.
    #[serde(default)]
    mark: f64,
    /// Append this process's id to a file at the start.
    #[serde(default)]
    pid_file: Option<PathBuf>,
}

/// What a checkpoint carries.
#[derive(Serialize, Deserialize, Clone, Copy, Default)]
struct State {
    step: u64,
    sum: u64,
}

static STOP: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("scripted trainer: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<()> {
    let script = std::env::args().nth(1).ok_or(io::ErrorKind::InvalidInput)?;
    let script: Script = serde_json::from_str(&script)?;
    if let Some(path) = &script.pid_file {
        use std::io::Write as _;
        let mut file = fs::File::options().append(true).create(true).open(path)?;
        writeln!(file, "{}", std::process::id())?;
    }
    let Some(ToTrainer::Train(request)) = read_frame(&mut io::stdin().lock())? else {
        return Err(io::ErrorKind::UnexpectedEof.into());
    };
    thread::spawn(watch_stdin);
    train(&script, &request)
}

/// Notes a `Stop`; an end of standard input means that the worker is gone.
fn watch_stdin() {
    match read_frame::<ToTrainer>(&mut io::stdin().lock()) {
        Ok(Some(_)) => {
            STOP.store(true, Ordering::SeqCst);
            let _ = io::stdin().lock().read(&mut [0]);
            std::process::exit(3);
        }
        _ => std::process::exit(3),
    }
}

fn say(message: &FromTrainer) -> io::Result<()> {
    write_frame(&mut io::stdout().lock(), message)
}

fn train(script: &Script, request: &TrainRequest) -> io::Result<()> {
    // What the worker promised to have put there.
    fs::metadata(request.base_model_dir.join("config.json"))?;
    let rows = fs::read_to_string(&request.training_file)?.lines().count() as u64;
    let mut state = match &request.resume_from {
        Some(dir) => {
            fs::metadata(dir.join("weights/adapter_model.safetensors"))?;
            serde_json::from_slice(&fs::read(dir.join("state/trainer.json"))?)?
        }
        None => {
            assert_eq!(request.start_from.is_some(), request.spec.start_from.is_some());
            if let Some(dir) = &request.start_from {
                fs::metadata(dir.join("adapter_model.safetensors"))?;
            } else if script.starts_from_weights {
                return Err(io::Error::other("nothing to begin with"));
            }
            State::default()
        }
    };
    let fresh = request.resume_from.is_none();
    let first_step = state.step;
    eprintln!("training {} rows from step {}", rows, state.step);
    say(&FromTrainer::Started(Started {
        total_steps: script.total_steps,
        resumed_from_step: state.step,
        train_rows: rows,
        valid_rows: u64::from(script.validation),
        truncated_rows: 0,
        initial_valid_loss: script.validation.then_some(9.0),
        device: "script".to_owned(),
        precision: Precision::Fp32,
    }))?;
    while state.step < script.total_steps {
        if script.fail_at_step == Some(state.step + 1) {
            return say(&FromTrainer::Failed {
                code: ErrorCode::NonFiniteLoss,
                message: "The loss is no longer a number.".to_owned(),
                param: Some("hyperparameters.learning_rate".to_owned()),
            });
        }
        state.step += 1;
        state.sum = state.sum.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(state.step);
        thread::sleep(Duration::from_millis(script.step_millis));
        let metrics = metrics(script, state);
        say(&FromTrainer::Step(metrics.clone()))?;
        let due = state.step.is_multiple_of(script.checkpoint_steps);
        let stop = STOP.load(Ordering::SeqCst) && !script.ignore_stop;
        let early = script.stop_early_at_step == Some(state.step);
        let is_last = early || state.step == script.total_steps;
        if due || stop || is_last {
            let for_resume_only = stop && !due && !is_last;
            checkpoint(&request.output_dir, state, metrics, for_resume_only)?;
        }
        let dies = script.die_after_steps == Some(state.step - first_step);
        if dies && (fresh || !script.die_only_when_fresh) {
            kill_self();
        }
        if early {
            say(&FromTrainer::Note(Note {
                level: NoteLevel::Warn,
                message: "The loss rises.".to_owned(),
                key: "rises".to_owned(),
            }))?;
            break;
        }
        if stop && state.step != script.total_steps {
            return say(&FromTrainer::Stopped);
        }
        if script.wait_at_step == Some(state.step)
            && let Some(path) = &script.wait_for
        {
            let stopped = || STOP.load(Ordering::SeqCst) && !script.ignore_stop;
            while !path.exists() && !stopped() {
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
    let early = script.stop_early_at_step.is_some();
    say(&FromTrainer::Finished(Finished {
        trained_tokens: 10 * state.step,
        steps: state.step,
        best: None,
        model_step: if early { state.step - script.checkpoint_steps } else { state.step },
    }))
}

/// A curve whose every point depends on all the steps before it.
fn metrics(script: &Script, state: State) -> StepMetrics {
    let noise = (state.sum >> 40) as f64 / f64::from(1 << 24);
    let evaluated = script.validation && state.step.is_multiple_of(2);
    StepMetrics {
        step: state.step,
        epoch: state.step as f64 / script.total_steps as f64,
        train_loss: 1.0 + noise,
        train_mean_token_accuracy: noise,
        valid_loss: evaluated.then_some(2.0 + noise),
        valid_mean_token_accuracy: evaluated.then_some(noise / 2.0),
        full_valid_loss: None,
        full_valid_mean_token_accuracy: None,
        learning_rate: 1e-4,
        grad_norm: script.mark,
        tokens: 10 * state.step,
        tokens_per_second: 10.0,
        elapsed_seconds: state.step as f64,
        train_reward_accuracy: None,
        train_reward_margin: None,
        valid_reward_accuracy: None,
        valid_reward_margin: None,
    }
}

fn checkpoint(
    output_dir: &Path,
    state: State,
    metrics: StepMetrics,
    for_resume_only: bool,
) -> io::Result<()> {
    let dir = output_dir.join(format!("checkpoint-{}", state.step));
    fs::create_dir_all(dir.join("weights"))?;
    fs::create_dir_all(dir.join("state"))?;
    fs::write(dir.join("weights/adapter_config.json"), r#"{"r": 1}"#)?;
    fs::write(dir.join("weights/adapter_model.safetensors"), state.sum.to_le_bytes())?;
    fs::write(dir.join("state/trainer.json"), serde_json::to_vec(&state)?)?;
    say(&FromTrainer::Checkpoint(CheckpointWritten {
        step: state.step,
        dir,
        metrics: Some(metrics),
        for_resume_only,
    }))
}

/// Ends this process by SIGKILL: no destructor, no last word.
fn kill_self() -> ! {
    let pid = std::process::id().to_string();
    let _ = std::process::Command::new("kill").args(["-9", &pid]).status();
    loop {
        thread::park();
    }
}
