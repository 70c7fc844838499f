//! A run on preference pairs: the references of DPO, the passes of a step, and the evaluation.

use serde::{Deserialize, Serialize};
use tunesmith_core::dataset::TokenizedPair;
use tunesmith_core::hyperparameters::ResolvedHyperparameters;

use super::StopFlag;
use super::evaluation::{Evaluation, Rewards};
use crate::data::batching::Batching;
use crate::error::EngineError;
use crate::model::TrainableModel;
use crate::ops::dropout::DropoutKey;
use crate::parallel::{Replicas, deal};
use crate::preference::{Objective, PairBatch, PairLogps, PairOutcome, PairScale, tokens};

/// The log-probabilities of the answers under the model before its first step. They are part of a
/// checkpoint: where every weight trains, that model is nowhere else.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct References {
    /// For each training pair; none for one that the run never comes to.
    train: Vec<Option<PairLogps>>,
    /// For each validation pair.
    valid: Vec<Option<PairLogps>>,
}

/// The pairs of a run and what is minimised over them.
#[derive(Debug)]
pub(super) struct Preference {
    objective: Objective,
    train: Vec<TokenizedPair>,
    valid: Vec<TokenizedPair>,
    batching: Batching,
}

/// What the passes of a step showed.
pub(super) struct Passed {
    pub(super) evaluation: Evaluation,
    pub(super) tokens: u64,
}

/// An error, and the training rows in which it came up.
pub(super) struct FailedPass {
    pub(super) error: EngineError,
    pub(super) rows: Vec<usize>,
}

impl Preference {
    pub(super) fn new(
        hyperparameters: &ResolvedHyperparameters,
        train: Vec<TokenizedPair>,
        valid: Vec<TokenizedPair>,
        batching: Batching,
    ) -> Self {
        Self { objective: hyperparameters.into(), train, valid, batching }
    }

    pub(super) fn valid_rows(&self) -> usize {
        self.valid.len()
    }

    /// Pairs of which an answer was cut at the sequence length.
    pub(super) fn truncated(&self) -> usize {
        self.train.iter().chain(&self.valid).filter(|pair| pair.is_truncated()).count()
    }

    /// The line of training row `row` in its file.
    pub(super) fn line(&self, row: usize) -> usize {
        self.train[row].line
    }

    /// The references of the training rows `rows`, in ascending order, and of all validation rows,
    /// from `model` before its first step; none where no loss asks for them, or when `stop` is set
    /// on the way.
    pub(super) fn references(
        &self,
        model: &TrainableModel,
        rows: &[usize],
        stop: &StopFlag,
    ) -> Result<Option<References>, EngineError> {
        if !self.objective.loss.has_reference() {
            return Ok(None);
        }
        let valid: Vec<usize> = (0..self.valid.len()).collect();
        let mut references =
            References { train: vec![None; self.train.len()], valid: vec![None; self.valid.len()] };
        for (pairs, rows, found) in [
            (&self.train, rows, &mut references.train),
            (&self.valid, valid.as_slice(), &mut references.valid),
        ] {
            for pass in PairBatch::passes(pairs, rows, &self.batching.measuring(), &self.objective)
            {
                if stop.is_set() {
                    return Ok(None);
                }
                for (&row, logps) in pass.pairs().iter().zip(model.pair_logps(&pass)?) {
                    found[row] = Some(logps);
                }
            }
        }
        Ok(Some(references))
    }

    /// The forward and backward passes of one step on `rows`, shared among the replicas of `model`;
    /// `key` names the dropout masks of each.
    pub(super) fn step(
        &self,
        model: &mut Replicas,
        references: Option<&References>,
        rows: &[usize],
        key: impl Fn(u64) -> DropoutKey + Sync,
    ) -> Result<Passed, FailedPass> {
        let objective = &self.objective;
        let (passes, owners) = deal(
            rows,
            |row| tokens(&self.train[row]),
            model.count(),
            |rows| PairBatch::passes(&self.train, rows, &self.batching, objective),
        );
        // The denominator covers the whole step, so that how the step is cut, and a last shorter
        // step, change nothing of what a pair counts.
        let scale = PairScale::new(&passes, objective);
        let known = references.map(|references| references.train.as_slice());
        let outcomes = model.accumulate(&owners, |model, number| {
            let (pass, key) = (&passes[number], key(number as u64));
            let references = of_pass(known, pass)?;
            model.forward_backward_pairs(pass, objective, &references, scale, key)
        });
        let outcomes = outcomes.map_err(|(number, error)| FailedPass {
            error,
            rows: passes[number].pairs().to_vec(),
        })?;
        let mut sum = PairOutcome::default();
        outcomes.into_iter().for_each(|outcome| sum += outcome);
        let tokens = rows.iter().map(|&row| tokens(&self.train[row]) as u64).sum();
        Ok(Passed { evaluation: self.mean(&sum), tokens })
    }

    /// The means over all validation pairs; `None` when there is none, or when `stop` is set on
    /// the way.
    pub(super) fn evaluate(
        &self,
        model: &TrainableModel,
        references: Option<&References>,
        stop: &StopFlag,
    ) -> Result<Option<Evaluation>, EngineError> {
        let all: Vec<usize> = (0..self.valid.len()).collect();
        let mut sum = PairOutcome::default();
        for pass in
            PairBatch::passes(&self.valid, &all, &self.batching.measuring(), &self.objective)
        {
            if stop.is_set() {
                return Ok(None);
            }
            let references = of_pass(references.map(|known| known.valid.as_slice()), &pass)?;
            sum += model.evaluate_pairs(&pass, &self.objective, &references)?;
        }
        Ok((!all.is_empty()).then(|| self.mean(&sum)))
    }

    fn mean(&self, sum: &PairOutcome) -> Evaluation {
        let pairs = sum.pairs as f64;
        let chosen = &sum.chosen;
        let mut loss = sum.loss / pairs;
        if self.objective.learns_chosen() {
            loss += chosen.weighted_nll / chosen.weight;
        }
        Evaluation {
            loss,
            accuracy: chosen.weighted_correct / chosen.weight,
            rewards: Some(Rewards {
                accuracy: sum.reward_correct as f64 / pairs,
                margin: sum.reward_margin / pairs,
            }),
        }
    }
}

/// The references of a pass's pairs, in their order; empty where the loss has none.
fn of_pass(
    known: Option<&[Option<PairLogps>]>,
    pass: &PairBatch,
) -> Result<Vec<PairLogps>, EngineError> {
    let Some(known) = known else { return Ok(Vec::new()) };
    let one = |&row: &usize| {
        known.get(row).copied().flatten().ok_or_else(|| {
            EngineError::Checkpoint(format!(
                "the checkpoint has no reference of row {row}: start the job afresh"
            ))
        })
    };
    pass.pairs().iter().map(one).collect()
}
