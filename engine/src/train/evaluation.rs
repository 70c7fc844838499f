//! The loss on rows that do not train.

use tunesmith_core::dataset::TokenizedRow;

use super::StopFlag;
use crate::batch::{Batch, BatchOutcome};
use crate::data::batching::Batching;
use crate::error::EngineError;
use crate::model::TrainableModel;

/// A mean over a set of rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Evaluation {
    /// Σ wᵢ·NLLᵢ / Σ wᵢ.
    pub(super) loss: f64,
    /// Share of the targets' weight whose token was also the most likely one.
    pub(super) accuracy: f64,
    /// Of preference pairs.
    pub(super) rewards: Option<Rewards>,
}

/// How a model tells preferred answers from others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rewards {
    /// Share of the pairs whose preferred answer has the higher reward.
    pub(super) accuracy: f64,
    /// Mean difference of the two rewards.
    pub(super) margin: f64,
}

impl From<BatchOutcome> for Evaluation {
    fn from(sum: BatchOutcome) -> Self {
        Self {
            loss: sum.weighted_nll / sum.weight,
            accuracy: sum.weighted_correct / sum.weight,
            rewards: None,
        }
    }
}

/// Validation rows, laid out as batches once.
#[derive(Debug)]
pub(super) struct ValidationSet {
    batches: Vec<Batch>,
}

impl ValidationSet {
    pub(super) fn new(rows: &[TokenizedRow], batching: &Batching) -> Self {
        let all: Vec<usize> = (0..rows.len()).collect();
        Self { batches: batching.measuring().micro_batches(rows, &all) }
    }

    /// The mean over all rows; `None` when there is no row, or when `stop` is set on the way.
    pub(super) fn evaluate_unless(
        &self,
        stop: &StopFlag,
        model: &TrainableModel,
    ) -> Result<Option<Evaluation>, EngineError> {
        let mut sum = BatchOutcome::default();
        for batch in &self.batches {
            if stop.is_set() {
                return Ok(None);
            }
            sum += model.evaluate(batch)?;
        }
        Ok((!self.batches.is_empty()).then(|| sum.into()))
    }
}
