//! One run: steps, evaluations, checkpoints, and their reports.

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::thread;
use std::time::Instant;

use tunesmith_core::dataset::TokenizedRow;
use tunesmith_core::hyperparameters::{AdapterType, Method, Precision, ResolvedHyperparameters};
use tunesmith_core::metrics::{MAX_ROW_LOSSES, RowLoss, StepMetrics};
use tunesmith_core::protocol::{
    CheckpointWritten, FromTrainer, MAX_ROWS_A_FRAME, Started, TrainRequest,
};

use super::checkpoint::{self, Progress};
use super::dataset::Dataset;
use super::divergence::{self, WayBack};
use super::evaluation::{Evaluation, ValidationSet};
use super::memory::{self, Planner};
use super::pass_sizes::{Cut, Examples};
use super::preference::{FailedPass, Preference};
use super::{Outcome, Sink, StopFlag, TrainOptions};
use crate::batch::{Batch, BatchOutcome};
use crate::data::batching::Batching;
use crate::data::sampler::Sampler;
use crate::device::Device;
use crate::error::EngineError;
use crate::export::JobFacts;
use crate::model::TrainableModel;
use crate::models::config::ModelConfig;
use crate::ops::dropout::DropoutKey;
use crate::optim::adamw::AdamWParams;
use crate::optim::schedule::Schedule;
use crate::parallel::{Replicas, deal};

/// Line numbers that an error message lists before it says how many more there are.
const LISTED_LINES: usize = 10;

/// A run with everything loaded.
pub(super) struct Run<'a> {
    pub(super) request: &'a TrainRequest,
    pub(super) fingerprint: String,
    /// The first is the lead's.
    devices: Vec<Device>,
    /// Never `Auto`.
    precision: Precision,
    pub(super) model: Replicas,
    /// Empty where pairs train.
    train: Vec<TokenizedRow>,
    preference: Option<Preference>,
    valid_rows: usize,
    truncated_rows: usize,
    validation: ValidationSet,
    sampler: Sampler,
    batching: Batching,
    schedule: Schedule,
    pub(super) total_steps: u64,
    resumed_from_step: u64,
    /// The step of the last checkpoint that was reported or resumed from.
    checkpoint_step: u64,
    pub(super) way_back: WayBack,
    pub(super) progress: Progress,
}

/// Measures training time over all attempts.
struct Clock {
    began: Instant,
    /// Seconds of earlier attempts.
    before: f64,
}

impl Clock {
    fn elapsed_seconds(&self) -> f64 {
        self.before + self.began.elapsed().as_secs_f64()
    }
}

/// A step's means, its tokens, and rows with their mean losses.
type Passes = (Evaluation, u64, Vec<(usize, f64)>);

/// What one update showed, before it is a report.
struct Update {
    train: Evaluation,
    /// Rows with their mean losses; none of pairs.
    row_losses: Vec<(usize, f64)>,
    learning_rate: f64,
    grad_norm: f64,
    tokens: u64,
    seconds: f64,
}

impl<'a> Run<'a> {
    /// Loads the data, the model and, where there is one, the checkpoint to go on from.
    pub(super) fn prepare(
        request: &'a TrainRequest,
        options: &TrainOptions,
    ) -> Result<Self, EngineError> {
        let spec = &request.spec;
        let hyperparameters = &spec.hyperparameters;
        let devices = Device::parse_list(&request.device)?;
        let fingerprint = checkpoint::fingerprint(request, options)?;
        // A run goes on in the precision it began in, also on another device.
        let precision = match &request.resume_from {
            Some(dir) => checkpoint::precision(dir)?,
            None => devices[0].precision(hyperparameters.precision),
        };
        let hyperparameters = &ResolvedHyperparameters { precision, ..hyperparameters.clone() };
        let start_dir = checkpoint::start_dir(request)?;
        let config = ModelConfig::read(&start_dir)?;
        // Replicas on the CPU share its memory; each GPU has its own.
        let (replicas, available) = if devices[0].is_cpu() {
            (devices.len(), memory::available())
        } else {
            (1, devices.iter().map(Device::free_memory).min().flatten())
        };
        let planner = Planner { config: &config, hyperparameters, replicas, available };
        planner.check_weights()?;
        // Making tokens keeps one core busy, and reading weights mostly waits for memory.
        let (data, model) = thread::scope(|scope| {
            let data = scope.spawn(|| load_data(request));
            let model = checkpoint::adapter_to_go_on(request).and_then(|exported| {
                TrainableModel::load_to_go_on(
                    &start_dir,
                    &hyperparameters.adapter,
                    spec.seed,
                    &devices[0],
                    precision,
                    exported.as_deref(),
                )
            });
            (data.join().unwrap_or_else(|panic| resume_unwind(panic)), model)
        });
        // Of two errors the data's is told: it is the one that a job's owner can mend.
        let (examples, mut model) = (data?, model?);
        checkpoint::remove_merged(request)?;
        model.set_optimizer(hyperparameters.optimizer, hyperparameters.muon_adjust_lr_fn);
        model.set_neftune_noise_alpha(hyperparameters.neftune_noise_alpha);
        let mut progress = match &request.resume_from {
            Some(dir) => {
                checkpoint::resume(dir, hyperparameters.adapter.kind, &fingerprint, &mut model)?
            }
            None => {
                checkpoint::begin(request, &mut model)?;
                Progress::default()
            }
        };
        let sampler = Sampler {
            rows: examples.count(),
            rows_per_step: hyperparameters.rows_per_step() as usize,
            seed: spec.seed,
            order: options.order,
        };
        let total_steps = hyperparameters.total_steps(examples.count());
        let batching = |tokens_per_pass| Batching {
            batch_size: hyperparameters.batch_size as usize,
            packing: hyperparameters.packing,
            share_prefixes: !has_token_noise(hyperparameters),
            tokens_per_pass,
        };
        let plan = planner.plan(
            options.tokens_per_pass,
            examples.longest(),
            progress.tokens_per_pass,
            |tokens| {
                examples.largest_passes(&Cut {
                    sampler: &sampler,
                    steps: total_steps,
                    replicas: devices.len(),
                    batching: batching(tokens),
                })
            },
        )?;
        tracing::info!(
            tokens_per_pass = plan.tokens_per_pass,
            recompute = plan.recompute,
            estimate = %plan.estimate,
            estimated_bytes = plan.estimate.total(),
            "memory is planned"
        );
        progress.tokens_per_pass = Some(plan.tokens_per_pass);
        model.set_gradient_checkpointing(plan.recompute);
        let batching = batching(plan.tokens_per_pass);
        let (data, preference) = match examples {
            Examples::Rows(data) => (data, None),
            Examples::Pairs(Dataset { train, valid }) => {
                let preference = Preference::new(hyperparameters, train, valid, batching);
                (Dataset { train: Vec::new(), valid: Vec::new() }, Some(preference))
            }
        };
        Ok(Self {
            request,
            fingerprint,
            model: Replicas::new(model, &devices),
            devices,
            precision,
            valid_rows: preference.as_ref().map_or(data.valid.len(), Preference::valid_rows),
            truncated_rows: preference.as_ref().map_or(data.truncated(), Preference::truncated),
            validation: ValidationSet::new(&data.valid, &batching),
            sampler,
            train: data.train,
            preference,
            batching,
            schedule: Schedule::new(hyperparameters, total_steps),
            total_steps,
            resumed_from_step: progress.step,
            checkpoint_step: progress.step,
            way_back: WayBack::default(),
            progress,
        })
    }

    /// Trains to the end, or until `stop`.
    pub(super) fn run(mut self, stop: &StopFlag, sink: Sink<'_>) -> Result<Outcome, EngineError> {
        if self.progress.step == 0 {
            self.find_references(stop)?;
            let initial = self.measure(stop).map_err(|error| self.with_advice(error))?;
            self.progress.initial_valid_loss = initial.map(|evaluation| evaluation.loss);
        }
        self.report(sink, FromTrainer::Started(self.started()))?;
        self.begin_way_back()?;
        let clock = Clock { began: Instant::now(), before: self.progress.elapsed_seconds };
        while !self.has_ended() {
            if stop.is_set() {
                self.stop(sink)?;
                return Ok(Outcome::Stopped);
            }
            let (metrics, row_losses) = match self.step(&clock) {
                Ok(shown) => shown,
                Err(error) => {
                    self.go_back(error, sink)?;
                    continue;
                }
            };
            for rows in row_losses.chunks(MAX_ROWS_A_FRAME) {
                self.report(sink, FromTrainer::Rows { rows: rows.to_vec() })?;
            }
            self.report(sink, FromTrainer::Step(metrics.clone()))?;
            self.tell_findings(false, sink)?;
            if self.checkpoint_is_due() {
                let dir = self.write_checkpoint()?;
                if self.goes_back() {
                    self.way_back.keep(&dir)?;
                }
                self.checkpoint_step = self.progress.step;
                let written = self.written(dir, Some(metrics), false);
                self.report(sink, written)?;
            }
        }
        self.finish(sink)
    }

    /// Whether nothing is left to train.
    fn has_ended(&self) -> bool {
        self.progress.step >= self.total_steps || self.is_out_of_patience()
    }

    /// One step with its evaluation, and what its rows showed.
    fn step(&mut self, clock: &Clock) -> Result<(StepMetrics, Vec<RowLoss>), EngineError> {
        let update = self.update()?;
        self.progress.step += 1;
        self.progress.tokens += update.tokens;
        divergence::remember(&mut self.progress.recent_losses, update.train.loss);
        self.progress.curve.push_train(update.train.loss);
        let (valid, full_valid) = self.evaluate()?;
        self.progress.elapsed_seconds = clock.elapsed_seconds();
        Ok((self.metrics(&update, valid, full_valid), self.rows_of(&update)))
    }

    /// The rows of a step that is done, as they are reported.
    fn rows_of(&self, update: &Update) -> Vec<RowLoss> {
        let step = self.progress.step;
        let kept = update.row_losses.iter().filter(|&&(row, _)| (row as u64) < MAX_ROW_LOSSES);
        kept.map(|&(row, loss)| RowLoss {
            row: row as u64,
            line: self.train[row].line as u64,
            step,
            loss,
        })
        .collect()
    }

    /// What pairs are compared with, where the loss asks for it: the model as it is now, before
    /// its first step.
    fn find_references(&mut self, stop: &StopFlag) -> Result<(), EngineError> {
        let Some(preference) = &self.preference else { return Ok(()) };
        let steps = self.total_steps.min(self.sampler.steps_per_epoch());
        let mut rows: Vec<usize> = self.sampler.steps(steps).flatten().collect();
        rows.sort_unstable();
        self.progress.references = preference
            .references(&self.model, &rows, stop)
            .map_err(|error| self.at_step(error, "reference", None))?;
        Ok(())
    }

    /// The loss on the validation rows; `None` where there is none, or when `stop` is set.
    fn measure(&self, stop: &StopFlag) -> Result<Option<Evaluation>, EngineError> {
        let measured = match &self.preference {
            Some(preference) => {
                preference.evaluate(&self.model, self.progress.references.as_ref(), stop)
            }
            None => self.validation.evaluate_unless(stop, &self.model),
        };
        measured.map_err(|error| self.at_step(error, "validation loss", None))
    }

    /// The passes of one optimiser step on `rows`: their means, their tokens, and each row's loss
    /// where rows have one.
    fn passes(&mut self, rows: &[usize]) -> Result<Passes, EngineError> {
        let step = self.progress.step;
        if let Some(preference) = &self.preference {
            let references = self.progress.references.as_ref();
            let seed = self.request.spec.seed;
            let key = |micro_batch| DropoutKey { seed, step, micro_batch };
            let passed = preference.step(&mut self.model, references, rows, key);
            return passed.map(|passed| (passed.evaluation, passed.tokens, Vec::new())).map_err(
                |FailedPass { error, rows }| self.at_step(error, "training loss", Some(&rows)),
            );
        }
        let (batches, owners) = deal(
            rows,
            |row| self.train[row].ids.len(),
            self.model.count(),
            |rows| self.batching.micro_batches(&self.train, rows),
        );
        // The denominator covers the whole step, so that how the step is cut, and a last shorter
        // step, change nothing of what a token counts.
        let scale = 1.0 / batches.iter().map(Batch::total_weight).sum::<f64>();
        let seed = self.request.spec.seed;
        let outcomes = self.model.accumulate(&owners, |model, micro_batch| {
            let key = DropoutKey { seed, step, micro_batch: micro_batch as u64 };
            model.forward_backward_with_nll(&batches[micro_batch], scale, key)
        });
        let outcomes = outcomes.map_err(|(micro_batch, error)| {
            self.at_step(error, "training loss", Some(&batches[micro_batch].rows))
        })?;
        let mut sum = BatchOutcome::default();
        // A row of several sequences may be parted among passes.
        let mut sums: BTreeMap<usize, (f64, f64)> = BTreeMap::new();
        for (batch, (outcome, nll)) in batches.iter().zip(outcomes) {
            sum += outcome;
            for (row, loss, weight) in
                batch.row_sums(&nll, |row, ids| self.train[row].weights_of(ids))
            {
                let entry = sums.entry(row).or_default();
                *entry = (entry.0 + loss, entry.1 + weight);
            }
        }
        let row_losses = rows.iter().filter_map(|row| Some((*row, sums.get(row)?)));
        let row_losses = row_losses.map(|(row, &(loss, weight))| (row, loss / weight)).collect();
        let tokens = batches.iter().map(|batch| batch.row_tokens() as u64).sum();
        Ok((sum.into(), tokens, row_losses))
    }

    /// One optimiser step.
    fn update(&mut self) -> Result<Update, EngineError> {
        let began = Instant::now();
        let step = self.progress.step;
        let rows = self.sampler.rows_of_step(step);
        let (train, tokens, row_losses) = self.passes(&rows)?;
        self.check_for_a_leap(&train, &rows)?;
        let hyperparameters = &self.request.spec.hyperparameters;
        let learning_rate = self.peak_learning_rate() * self.schedule.factor(step);
        let params = AdamWParams {
            learning_rate,
            beta1: hyperparameters.adam_beta1,
            beta2: hyperparameters.adam_beta2,
            epsilon: hyperparameters.adam_epsilon,
            weight_decay: hyperparameters.weight_decay,
        };
        let max_grad_norm =
            (hyperparameters.max_grad_norm > 0.0).then_some(hyperparameters.max_grad_norm);
        let update = |model: &mut TrainableModel| model.optimizer_step(&params, max_grad_norm);
        let grad_norm = self
            .model
            .update(update)
            .map_err(|error| self.at_step(error, "gradient", Some(&rows)))?;
        Ok(Update {
            train,
            row_losses,
            learning_rate,
            grad_norm,
            tokens,
            seconds: began.elapsed().as_secs_f64(),
        })
    }

    /// The validation loss, where this step asks for it, and again as the full one where an epoch
    /// or the run ends.
    fn evaluate(&mut self) -> Result<(Option<Evaluation>, Option<Evaluation>), EngineError> {
        let step = self.progress.step;
        let is_last = step == self.total_steps;
        let ends_epoch = is_last || step.is_multiple_of(self.sampler.steps_per_epoch());
        let is_due = step.is_multiple_of(self.request.spec.hyperparameters.eval_steps);
        if !(ends_epoch || is_due) {
            return Ok((None, None));
        }
        let evaluation = self.measure(&StopFlag::default())?;
        if let Some(Evaluation { loss, .. }) = evaluation {
            self.note_valid_loss(loss);
        }
        Ok((evaluation.filter(|_| is_due || is_last), evaluation.filter(|_| ends_epoch)))
    }

    fn metrics(
        &self,
        update: &Update,
        valid: Option<Evaluation>,
        full_valid: Option<Evaluation>,
    ) -> StepMetrics {
        let valid_rewards = valid.or(full_valid).and_then(|evaluation| evaluation.rewards);
        StepMetrics {
            step: self.progress.step,
            epoch: self.progress.step as f64 / self.sampler.steps_per_epoch() as f64,
            train_loss: update.train.loss,
            train_mean_token_accuracy: update.train.accuracy,
            valid_loss: valid.map(|evaluation| evaluation.loss),
            valid_mean_token_accuracy: valid.map(|evaluation| evaluation.accuracy),
            full_valid_loss: full_valid.map(|evaluation| evaluation.loss),
            full_valid_mean_token_accuracy: full_valid.map(|evaluation| evaluation.accuracy),
            learning_rate: update.learning_rate,
            grad_norm: update.grad_norm,
            tokens: self.progress.tokens,
            tokens_per_second: update.tokens as f64 / update.seconds,
            elapsed_seconds: self.progress.elapsed_seconds,
            train_reward_accuracy: update.train.rewards.map(|rewards| rewards.accuracy),
            train_reward_margin: update.train.rewards.map(|rewards| rewards.margin),
            valid_reward_accuracy: valid_rewards.map(|rewards| rewards.accuracy),
            valid_reward_margin: valid_rewards.map(|rewards| rewards.margin),
        }
    }

    fn started(&self) -> Started {
        Started {
            total_steps: self.total_steps,
            resumed_from_step: self.resumed_from_step,
            train_rows: self.sampler.rows as u64,
            valid_rows: self.valid_rows as u64,
            truncated_rows: self.truncated_rows as u64,
            initial_valid_loss: self.progress.initial_valid_loss,
            device: self.devices.iter().map(Device::to_string).collect::<Vec<_>>().join(","),
            precision: self.precision,
        }
    }

    fn checkpoint_is_due(&self) -> bool {
        let step = self.progress.step;
        let hyperparameters = &self.request.spec.hyperparameters;
        let is_best = self.progress.best.is_some_and(|best| best.step == step);
        self.has_ended()
            || step.is_multiple_of(hyperparameters.checkpoint_steps)
            || is_best && hyperparameters.load_best_model_at_end
    }

    /// Leaves a checkpoint to go on from, unless the one of this very step is there already.
    fn stop(&self, sink: Sink<'_>) -> Result<(), EngineError> {
        if self.progress.step != self.checkpoint_step {
            let dir = self.write_checkpoint()?;
            self.report(sink, self.written(dir, None, true))?;
        }
        self.report(sink, FromTrainer::Stopped)
    }

    pub(super) fn write_checkpoint(&self) -> Result<PathBuf, EngineError> {
        let writer = checkpoint::Writer {
            request: self.request,
            fingerprint: &self.fingerprint,
            precision: self.precision,
        };
        let facts = JobFacts {
            job: self.request.job_id.as_str(),
            spec: &self.request.spec,
            step: self.progress.step,
            total_steps: self.total_steps,
            trained_tokens: self.progress.tokens,
            initial_valid_loss: self.progress.initial_valid_loss,
            best: self.progress.best,
        };
        writer.write(&self.model, &self.progress, &facts)
    }

    fn written(
        &self,
        dir: PathBuf,
        metrics: Option<StepMetrics>,
        for_resume_only: bool,
    ) -> FromTrainer {
        let step = self.progress.step;
        FromTrainer::Checkpoint(CheckpointWritten { step, dir, metrics, for_resume_only })
    }

    pub(super) fn report(&self, sink: Sink<'_>, message: FromTrainer) -> Result<(), EngineError> {
        sink(message).map_err(EngineError::Report)
    }

    /// Tells of numbers gone wrong where they did: in which step and in which rows.
    fn at_step(&self, error: EngineError, what: &str, rows: Option<&[usize]>) -> EngineError {
        let EngineError::Numeric(cause) = error else { return error };
        let place = match (rows, self.progress.step) {
            (Some(rows), done) => format!("Step {}: the {what} on {}", done + 1, self.lines(rows)),
            (None, 0) => format!("Before step 1: the {what}"),
            (None, done) => format!("After step {done}: the {what}"),
        };
        EngineError::Numeric(format!("{place} is no longer a finite number ({cause})."))
    }

    /// The lines of the training file that `rows` came from, in words.
    pub(super) fn lines(&self, rows: &[usize]) -> String {
        let line = |&row: &usize| match &self.preference {
            Some(preference) => preference.line(row),
            None => self.train[row].line,
        };
        lines_in_words(rows.iter().map(line).collect())
    }
}

fn load_data(request: &TrainRequest) -> Result<Examples, EngineError> {
    Ok(match request.spec.hyperparameters.method {
        Method::Supervised => Examples::Rows(Dataset::load(request)?),
        Method::Dpo => Examples::Pairs(Dataset::load_pairs(request)?),
    })
}

/// Whether something random is drawn for each token of a row, so that two rows differ even where
/// their tokens do not.
fn has_token_noise(hyperparameters: &ResolvedHyperparameters) -> bool {
    let has_dropout =
        hyperparameters.adapter.kind == AdapterType::Lora && hyperparameters.adapter.dropout > 0.0;
    has_dropout || hyperparameters.neftune_noise_alpha > 0.0
}

fn lines_in_words(mut lines: Vec<usize>) -> String {
    lines.sort_unstable();
    lines.dedup();
    let listed: Vec<String> = lines.iter().take(LISTED_LINES).map(usize::to_string).collect();
    let noun = if lines.len() == 1 { "line" } else { "lines" };
    let more = match lines.len().saturating_sub(LISTED_LINES) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("{noun} {}{more} of the training file", listed.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_lines_are_listed_in_order_and_then_counted() {
        assert_eq!(lines_in_words(vec![7]), "line 7 of the training file");
        assert_eq!(lines_in_words(vec![9, 2, 9]), "lines 2, 9 of the training file");
        assert_eq!(
            lines_in_words((1..=12).rev().collect()),
            "lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more of the training file"
        );
    }
}
