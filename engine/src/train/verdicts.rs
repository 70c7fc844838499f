//! What a run decides by its losses: when it is over, which step was best, when it goes back, and
//! what it tells of the curve.

use tunesmith_core::diagnosis::DiagnosisFacts;
use tunesmith_core::hyperparameters::OnDivergence;
use tunesmith_core::metrics::BestStep;
use tunesmith_core::protocol::{Finished, FromTrainer, Note, NoteLevel};

use super::divergence::{MAX_ROLLBACKS, leap, rate_factor};
use super::evaluation::Evaluation;
use super::run::Run;
use super::{Outcome, Sink, checkpoint};
use crate::error::EngineError;

impl Run<'_> {
    /// Whether early stopping ends the run. As in transformers' `EarlyStoppingCallback`, an
    /// evaluation counts as better when it lies below the lowest so far by more than the
    /// threshold.
    pub(super) fn is_out_of_patience(&self) -> bool {
        let patience = self.request.spec.hyperparameters.early_stopping_patience;
        patience > 0 && self.progress.evaluations_without_improvement >= patience
    }

    /// Takes a validation loss after the step at hand in.
    pub(super) fn note_valid_loss(&mut self, loss: f64) {
        let threshold = self.request.spec.hyperparameters.early_stopping_threshold;
        let progress = &mut self.progress;
        progress.curve.push_valid(progress.step, loss);
        let lowest = progress.best.map_or(f64::INFINITY, |best| best.valid_loss);
        if lowest - loss > threshold {
            progress.evaluations_without_improvement = 0;
        } else {
            progress.evaluations_without_improvement += 1;
        }
        if loss < lowest {
            progress.best = Some(BestStep { step: progress.step, valid_loss: loss });
        }
    }

    /// The last words of a run.
    pub(super) fn finish(&mut self, sink: Sink<'_>) -> Result<Outcome, EngineError> {
        self.tell_findings(true, sink)?;
        let hyperparameters = &self.request.spec.hyperparameters;
        let (steps, best) = (self.progress.step, self.progress.best);
        if steps < self.total_steps {
            let message = format!(
                "Early stopping after step {steps} of {}: {} evaluations brought no validation \
                 loss below {:.4} by more than {}.",
                self.total_steps,
                self.progress.evaluations_without_improvement,
                best.map_or(f64::NAN, |best| best.valid_loss),
                hyperparameters.early_stopping_threshold,
            );
            self.tell(NoteLevel::Info, message, "early-stopping".to_owned(), sink)?;
        }
        let kept = best.filter(|_| hyperparameters.load_best_model_at_end);
        let model_step = kept.map_or(steps, |best| best.step);
        if let Some(best) = best {
            let which = if best.step == model_step {
                "its weights are the tuned model".to_owned()
            } else {
                format!(
                    "the tuned model has the weights of step {steps}, as load_best_model_at_end is \
                     false"
                )
            };
            let message = format!(
                "Best validation loss {:.4} at step {}: {which}.",
                best.valid_loss, best.step
            );
            self.tell(NoteLevel::Info, message, "best-step".to_owned(), sink)?;
        }
        let trained_tokens = self.progress.tokens;
        let finished = Finished { trained_tokens, steps, best, model_step };
        self.report(sink, FromTrainer::Finished(finished))?;
        Ok(Outcome::Finished { trained_tokens })
    }

    /// Says what the curve shows and was not said before.
    pub(super) fn tell_findings(
        &mut self,
        has_ended: bool,
        sink: Sink<'_>,
    ) -> Result<(), EngineError> {
        let facts = DiagnosisFacts {
            learning_rate: self.peak_learning_rate(),
            n_epochs: self.request.spec.hyperparameters.n_epochs,
            best: self.progress.best,
            has_ended,
        };
        for finding in self.progress.curve.diagnose(&facts) {
            if !self.progress.told.contains(&finding.kind) {
                self.progress.told.push(finding.kind);
                let key = format!("curve-{}", finding.kind.as_str());
                self.tell(finding.kind.level(), finding.message, key, sink)?;
            }
        }
        Ok(())
    }

    /// The peak of the schedule: halved each time the run went back.
    pub(super) fn peak_learning_rate(&self) -> f64 {
        self.request.spec.hyperparameters.learning_rate * rate_factor(self.progress.rollbacks)
    }

    /// # Errors
    /// [`EngineError::Spike`] when the loss of a step lies far above those before it. Nothing of
    /// the model has changed then but its gradients.
    pub(super) fn check_for_a_leap(
        &self,
        train: &Evaluation,
        rows: &[usize],
    ) -> Result<(), EngineError> {
        let factor = self.request.spec.hyperparameters.spike_factor;
        let recent = &self.progress.recent_losses;
        let Some(median) = leap(recent, train.loss, factor) else { return Ok(()) };
        Err(EngineError::Spike(format!(
            "Step {}: the training loss on {} is {:.4}, more than {factor} times {median:.4}, the \
             median of the last {} steps.",
            self.progress.step + 1,
            self.lines(rows),
            train.loss,
            recent.len(),
        )))
    }

    /// Whether the run goes back when its numbers go wrong.
    pub(super) fn goes_back(&self) -> bool {
        self.request.spec.hyperparameters.on_divergence == OnDivergence::Rollback
    }

    /// Makes sure that there is a checkpoint to go back to, where that may be needed.
    pub(super) fn begin_way_back(&mut self) -> Result<(), EngineError> {
        if !self.goes_back() {
            return Ok(());
        }
        if let Some(dir) = &self.request.resume_from {
            return self.way_back.point_to(dir);
        }
        let dir = self.write_checkpoint()?;
        self.way_back.point_to(&dir)
    }

    /// Goes back to the last checkpoint, at half the learning rate.
    ///
    /// # Errors
    /// `error` itself, with what its owner can do, when there is no way back.
    pub(super) fn go_back(
        &mut self,
        error: EngineError,
        sink: Sink<'_>,
    ) -> Result<(), EngineError> {
        let (EngineError::Numeric(sentence) | EngineError::Spike(sentence)) = &error else {
            return Err(error);
        };
        let rollbacks = self.progress.rollbacks + 1;
        let dir = self.way_back.dir().filter(|_| rollbacks <= MAX_ROLLBACKS);
        let Some(dir) = dir else { return Err(self.with_advice(error)) };
        let kind = self.request.spec.hyperparameters.adapter.kind;
        let fingerprint = &self.fingerprint;
        let earlier =
            self.model.update(|model| checkpoint::go_back(dir, kind, fingerprint, model))?;
        // Time has passed, whatever came of it.
        let elapsed_seconds = self.progress.elapsed_seconds;
        self.progress = checkpoint::Progress { rollbacks, elapsed_seconds, ..earlier };
        let message = format!(
            "{sentence} The run goes back to its checkpoint of step {} and on at half the learning \
             rate, {:e}. It may do so {MAX_ROLLBACKS} times; this was number {rollbacks}.",
            self.progress.step,
            self.peak_learning_rate(),
        );
        self.tell(NoteLevel::Warn, message, format!("rollback-{rollbacks}"), sink)
    }

    /// The error as the job's owner reads it, with what there is to do.
    pub(super) fn with_advice(&self, error: EngineError) -> EngineError {
        let hyperparameters = &self.request.spec.hyperparameters;
        let before = match self.progress.rollbacks {
            0 => String::new(),
            times => format!(
                "The run went back to a checkpoint {times} times before, each time to half the \
                 learning rate, {:e} at last. ",
                self.peak_learning_rate()
            ),
        };
        let advice = format!(
            "{before}Lower learning_rate (now {}) or set max_grad_norm (now {}); if it fails again \
             at these rows, look at them.",
            hyperparameters.learning_rate, hyperparameters.max_grad_norm,
        );
        match error {
            EngineError::Numeric(sentence) => EngineError::Numeric(format!("{sentence} {advice}")),
            EngineError::Spike(sentence) => EngineError::Spike(format!(
                "{sentence} {advice} on_divergence = \"rollback\" goes back and on more slowly; \
                 spike_factor = 0 lets such a loss pass."
            )),
            other => other,
        }
    }

    fn tell(
        &self,
        level: NoteLevel,
        message: String,
        key: String,
        sink: Sink<'_>,
    ) -> Result<(), EngineError> {
        self.report(sink, FromTrainer::Note(Note { level, message, key }))
    }
}
