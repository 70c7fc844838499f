//! Learning from preferences: pairs of answers of which one is preferred.
//!
//! A pass computes the log-probability of every token of both answers with the graph kept; only
//! then is it known how much each pair counts, and the backward pass takes these weights. The
//! reference of DPO is the model before its first step: its log-probabilities are computed once,
//! so no second model is held.

mod batch;
mod loss;

pub use batch::{PairBatch, tokens};
pub use loss::{Answer, Objective, PairLogps, PairLoss};

use burn::tensor::{Tensor, TensorData};

use crate::batch::BatchOutcome;
use crate::error::EngineError;
use crate::model::TrainableModel;
use crate::ops::dropout::DropoutKey;
use crate::ops::token_nll::TokenNll;
use batch::Side;

/// Sums over pairs, from which means are made once, at the end of a step.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PairOutcome {
    /// Pairs.
    pub pairs: usize,
    /// Σ of their losses, without ORPO's loss of the preferred answers.
    pub loss: f64,
    /// Σ of their reward margins.
    pub reward_margin: f64,
    /// Pairs whose preferred answer has the higher reward.
    pub reward_correct: usize,
    /// The preferred answers as examples: sums over their tokens.
    pub chosen: BatchOutcome,
}

impl std::ops::AddAssign for PairOutcome {
    fn add_assign(&mut self, other: Self) {
        self.pairs += other.pairs;
        self.loss += other.loss;
        self.reward_margin += other.reward_margin;
        self.reward_correct += other.reward_correct;
        self.chosen += other.chosen;
    }
}

/// What a pass's sums are multiplied by, so that a step's gradient is that of its means, however
/// the step was cut.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairScale {
    /// 1 / the step's pairs.
    pub pair: f64,
    /// 1 / the step's weight of preferred answers; 0 where they are not learned beside.
    pub chosen: f64,
}

impl PairScale {
    /// The scale of a step that consists of `passes`.
    #[must_use]
    pub fn new(passes: &[PairBatch], objective: &Objective) -> Self {
        let pairs: usize = passes.iter().map(|pass| pass.pairs.len()).sum();
        let weight: f64 = passes.iter().map(PairBatch::chosen_weight).sum();
        let chosen = if objective.learns_chosen() { 1.0 / weight } else { 0.0 };
        Self { pair: 1.0 / pairs as f64, chosen }
    }
}

impl TrainableModel {
    /// Σ log p of the answers of each pair, without gradients and without dropout.
    ///
    /// # Errors
    /// [`EngineError::Data`] for an unknown id; [`EngineError::Numeric`] for a sum that is not
    /// finite.
    pub fn pair_logps(&self, batch: &PairBatch) -> Result<Vec<PairLogps>, EngineError> {
        let answers = answers(batch, &self.pair_nll(batch)?)?;
        let logps = answers
            .iter()
            .map(|(chosen, rejected)| PairLogps { chosen: chosen.logp, rejected: rejected.logp });
        Ok(logps.collect())
    }

    /// The losses of a batch, without gradients and without dropout. `references` are those of its
    /// pairs, in their order; only DPO reads them.
    ///
    /// # Errors
    /// As [`TrainableModel::pair_logps`].
    pub fn evaluate_pairs(
        &self,
        batch: &PairBatch,
        objective: &Objective,
        references: &[PairLogps],
    ) -> Result<PairOutcome, EngineError> {
        let nll = self.pair_nll(batch)?;
        let (_, outcome) = losses(batch, &nll, objective, references)?;
        Ok(outcome)
    }

    /// One forward and one backward pass: adds the gradient of the batch's losses, times `scale`,
    /// to the accumulated gradients. `references` as in [`TrainableModel::evaluate_pairs`].
    ///
    /// # Errors
    /// As [`TrainableModel::pair_logps`]: the gradients are then as before.
    pub fn forward_backward_pairs(
        &mut self,
        batch: &PairBatch,
        objective: &Objective,
        references: &[PairLogps],
        scale: PairScale,
        dropout_key: DropoutKey,
    ) -> Result<PairOutcome, EngineError> {
        self.check_pairs(batch)?;
        self.backward(&batch.batch, dropout_key, |decoder, parameters, hidden| {
            let nll = decoder.nll_of(parameters, hidden, &batch.targets)?;
            let (losses, outcome) = losses(batch, &nll, objective, references)?;
            // d loss / d nll of each target, where nll is −log p.
            let slopes = batch.places.iter().zip(&batch.targets).map(|(place, target)| {
                let loss = &losses[place.pair];
                let (compared, learned) = match place.side {
                    Side::Chosen => (-loss.d_chosen, f64::from(target.weight) * scale.chosen),
                    Side::Rejected => (-loss.d_rejected, 0.0),
                };
                let compared = if place.in_answer { compared * scale.pair } else { 0.0 };
                (compared + learned) as f32
            });
            let slopes = TensorData::new(slopes.collect::<Vec<f32>>(), [batch.targets.len()]);
            let slopes = Tensor::<1>::from_data(slopes, &nll.nll.device().inner()).autodiff();
            Ok(((nll.nll * slopes).sum(), outcome))
        })
    }

    fn pair_nll(&self, batch: &PairBatch) -> Result<TokenNll, EngineError> {
        self.check_pairs(batch)?;
        let parameters = self.parameters().frozen();
        self.decoder().token_nll(&parameters, &batch.batch, &batch.targets, None)
    }

    fn check_pairs(&self, batch: &PairBatch) -> Result<(), EngineError> {
        self.check_ids(&batch.batch.ids)?;
        batch.batch.check()
    }
}

/// Both answers of each pair under the model.
fn answers(batch: &PairBatch, nll: &TokenNll) -> Result<Vec<(Answer, Answer)>, EngineError> {
    let mut answers = vec![(Answer::default(), Answer::default()); batch.pairs.len()];
    for (place, nll) in batch.places.iter().zip(&nll.values) {
        let (chosen, rejected) = &mut answers[place.pair];
        if place.in_answer {
            let answer = if place.side == Side::Chosen { chosen } else { rejected };
            answer.logp -= nll;
            answer.tokens += 1;
        }
    }
    let is_broken = |(a, b): &(Answer, Answer)| !(a.logp.is_finite() && b.logp.is_finite());
    match answers.iter().position(is_broken) {
        Some(pair) => Err(not_finite(&batch.pairs[pair..=pair], "log-probability")),
        None => Ok(answers),
    }
}

/// Each pair's loss, and the sums over them.
fn losses(
    batch: &PairBatch,
    nll: &TokenNll,
    objective: &Objective,
    references: &[PairLogps],
) -> Result<(Vec<PairLoss>, PairOutcome), EngineError> {
    const NONE: PairLogps = PairLogps { chosen: 0.0, rejected: 0.0 };
    let answers = answers(batch, nll)?;
    let references = references.iter().copied().chain(std::iter::repeat(NONE));
    let losses: Vec<PairLoss> = answers
        .into_iter()
        .zip(references)
        .map(|((chosen, rejected), reference)| objective.pair(chosen, rejected, reference))
        .collect();
    let mut outcome = PairOutcome { pairs: losses.len(), ..PairOutcome::default() };
    for (pair, loss) in losses.iter().enumerate() {
        if ![loss.loss, loss.d_chosen, loss.d_rejected].iter().all(|value| value.is_finite()) {
            return Err(not_finite(&batch.pairs[pair..=pair], "loss"));
        }
        outcome.loss += loss.loss;
        outcome.reward_margin += loss.reward_margin;
        outcome.reward_correct += usize::from(loss.reward_margin > 0.0);
    }
    let targets = batch.targets.iter().zip(&batch.places);
    for ((target, place), (nll, correct)) in targets.zip(nll.values.iter().zip(&nll.correct)) {
        if place.side == Side::Chosen {
            let weight = f64::from(target.weight);
            outcome.chosen += BatchOutcome {
                weighted_nll: weight * nll,
                weight,
                weighted_correct: if *correct { weight } else { 0.0 },
            };
        }
    }
    Ok((losses, outcome))
}

fn not_finite(rows: &[usize], what: &str) -> EngineError {
    EngineError::Numeric(format!(
        "the {what} of rows {rows:?} is not finite: lower the learning rate, or look at these rows"
    ))
}
