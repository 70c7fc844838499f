//! The trainer as a child process: frames in on standard input, frames out on standard output.

use std::any::Any;
use std::io::{self, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::protocol::{FromTrainer, ToTrainer, TrainRequest, read_frame, write_frame};

use crate::error::EngineError;
use crate::train::{StopFlag, train};

/// Exit status of a trainer whose worker is gone.
const ORPHANED: i32 = 3;

/// Runs the trainer on this process's standard input and output, until its job is done.
///
/// The exit status is 0 when it finished or stopped as asked, 1 when it failed (and said so), and
/// 3 when its standard input ended: the worker is gone and so is the job's lease.
#[must_use]
pub fn run_trainer() -> ExitCode {
    let output = match take_stdout() {
        Ok(output) => output,
        Err(error) => {
            tracing::error!(%error, "the trainer cannot take its standard output");
            return ExitCode::FAILURE;
        }
    };
    serve(io::stdin(), output, || std::process::exit(ORPHANED))
}

/// Keeps the pipe to the worker for frames only: whatever else is printed in this process, by a
/// driver's library for instance, goes to standard error.
pub(crate) fn take_stdout() -> io::Result<std::fs::File> {
    let output = rustix::io::dup(io::stdout())?;
    rustix::stdio::dup2_stdout(io::stderr())?;
    Ok(output.into())
}

/// Reads the job from `input`, trains, and reports to `output`. `orphaned` is called, on another
/// thread, when `input` ends or breaks without [`ToTrainer::Stop`].
pub fn serve(
    mut input: impl Read + Send + 'static,
    mut output: impl Write,
    orphaned: impl FnOnce() + Send + 'static,
) -> ExitCode {
    let request = match first_frame(&mut input) {
        Ok(request) => request,
        Err(error) => return fail(&mut output, error),
    };
    let stop = Arc::new(StopFlag::default());
    let asked = Arc::clone(&stop);
    // Not joined: it waits on a read that may never end.
    thread::spawn(move || watch(input, &asked, orphaned));

    let mut sink = |message: FromTrainer| write_frame(&mut output, &message);
    let result = catch_unwind(AssertUnwindSafe(|| train(&request, &stop, &mut sink)));
    let error = match result {
        Ok(Ok(_)) => return ExitCode::SUCCESS,
        Ok(Err(EngineError::Report(error))) => {
            tracing::error!(%error, job = %request.job_id, "the worker no longer reads");
            return ExitCode::FAILURE;
        }
        Ok(Err(error)) => error.to_api_error(),
        Err(panic) => trainer_failed(format!(
            "The trainer met a fault of its own: {}. Please report it.",
            panic_message(panic.as_ref())
        )),
    };
    fail(&mut output, error)
}

fn first_frame(input: &mut impl Read) -> Result<TrainRequest, ApiError> {
    match read_frame(input) {
        Ok(Some(ToTrainer::Train(request))) => Ok(*request),
        Ok(Some(ToTrainer::Stop)) => {
            Err(trainer_failed("The trainer was told to stop before it was told what to train."))
        }
        Ok(None) => Err(trainer_failed("The trainer was not told what to train.")),
        Err(error) => {
            Err(trainer_failed(format!("The trainer cannot read what it should train: {error}.")))
        }
    }
}

/// Waits for a word from the worker.
fn watch(mut input: impl Read, stop: &StopFlag, orphaned: impl FnOnce()) {
    match read_frame(&mut input) {
        Ok(Some(ToTrainer::Stop)) => stop.stop(),
        Ok(None) => {
            tracing::warn!("the worker is gone: the trainer leaves");
            orphaned();
        }
        Ok(Some(ToTrainer::Train(_))) => {
            tracing::error!("the worker sent a second job to a trainer at work: it leaves");
            orphaned();
        }
        Err(error) => {
            tracing::error!(%error, "the worker's words cannot be read: the trainer leaves");
            orphaned();
        }
    }
}

fn trainer_failed(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::TrainerFailed, message)
}

/// Tells the worker, which logs it.
fn fail(output: &mut impl Write, error: ApiError) -> ExitCode {
    let ApiError { code, message, param } = error;
    if let Err(error) = write_frame(output, &FromTrainer::Failed { code, message, param }) {
        tracing::error!(%error, "the worker no longer reads");
    }
    ExitCode::FAILURE
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without words")
}
