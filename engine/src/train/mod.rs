//! The training loop, from a request to a model.

pub mod checkpoint;
mod dataset;
mod divergence;
mod evaluation;
pub(crate) mod memory;
mod pass_sizes;
mod preference;
mod run;
mod verdicts;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use tunesmith_core::protocol::{FromTrainer, TrainRequest};

use crate::data::batching::TOKENS_PER_PASS;
use crate::data::sampler::RowOrder;
use crate::error::EngineError;

/// Asks a run to stop after the step at hand. Shared between the run and who may stop it.
#[derive(Debug, Default)]
pub struct StopFlag(AtomicBool);

impl StopFlag {
    /// Asks; asking twice is asking once.
    pub fn stop(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether it was asked for.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// How a run that did not fail came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done, or as many as early stopping left.
    Finished {
        /// Tokens seen in training, each epoch counted.
        trained_tokens: u64,
    },
    /// Stopped on request; the last checkpoint is where to go on.
    Stopped,
}

/// Choices that a job does not have, for comparing runs with each other and with other programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainOptions {
    /// The order of rows within an epoch.
    pub order: RowOrder,
    /// The most tokens of one pass.
    pub tokens_per_pass: usize,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self { order: RowOrder::default(), tokens_per_pass: TOKENS_PER_PASS }
    }
}

/// Where a run's messages go. An error ends the run.
pub type Sink<'a> = &'a mut dyn FnMut(FromTrainer) -> io::Result<()>;

/// Trains as `request` says and reports to `sink`: `Started`, a `Step` each step, `Checkpoint`s,
/// `Note`s and, at the end, `Finished` or `Stopped`.
///
/// On the CPU the numbers are a pure function of the request: a run that stops, or is killed, and
/// goes on from any of its checkpoints ends with the bits of one that ran through.
///
/// # Errors
/// [`EngineError::Input`] for data that breaks a rule, [`EngineError::Numeric`] naming step and
/// rows for a loss that is no longer a number, [`EngineError::Spike`] for one that leapt, and whatever loading and writing may bring. Nothing
/// is reported about an error: that is the caller's.
pub fn train(
    request: &TrainRequest,
    stop: &StopFlag,
    sink: Sink<'_>,
) -> Result<Outcome, EngineError> {
    train_with(request, &TrainOptions::default(), stop, sink)
}

/// As [`train`], with choices that a job does not have.
///
/// # Errors
/// As [`train`].
pub fn train_with(
    request: &TrainRequest,
    options: &TrainOptions,
    stop: &StopFlag,
    sink: Sink<'_>,
) -> Result<Outcome, EngineError> {
    run::Run::prepare(request, options)?.run(stop, sink)
}
