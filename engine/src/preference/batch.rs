//! Pairs laid out for one pass.

use std::ops::Range;

use tunesmith_core::dataset::{TokenizedAnswer, TokenizedPair};

use super::loss::Objective;
use crate::batch::{Batch, Segment, Target};
use crate::data::batching::{Batching, MIN_SHARED_TOKENS};

/// Both answers of some pairs, each behind its prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PairBatch {
    pub(super) batch: Batch,
    pub(super) targets: Vec<Target>,
    /// For each target, where it stands.
    pub(super) places: Vec<Place>,
    /// The pairs' numbers in the data set.
    pub(super) pairs: Vec<usize>,
}

/// Where a target stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Which pair of the batch.
    pub(super) pair: usize,
    pub(super) side: Side,
    /// Whether it is a token of the answer and not of the prompt.
    pub(super) in_answer: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Chosen,
    Rejected,
}

impl PairBatch {
    /// Lays `numbers`, pairs of `pairs`, out end to end. Targets are the answers' tokens and, where
    /// `objective` learns them, the prompts' of the preferred answers. With `share_prompts` the
    /// prompt of a pair is computed once; not together with what is random for each token of a row.
    #[must_use]
    pub fn new(
        pairs: &[TokenizedPair],
        numbers: &[usize],
        objective: &Objective,
        share_prompts: bool,
    ) -> Self {
        let mut whole = Self {
            batch: Batch::default(),
            targets: Vec::new(),
            places: Vec::new(),
            pairs: numbers.to_vec(),
        };
        let prompt_weight =
            if objective.learns_chosen() { objective.prompt_loss_weight } else { 0.0 };
        for (pair, &number) in numbers.iter().enumerate() {
            let TokenizedPair { chosen, rejected, .. } = &pairs[number];
            let shared = if share_prompts { shared_tokens(&pairs[number]) } else { 0 };
            let prefix = whole.batch.ids.len()..whole.batch.ids.len() + shared;
            if shared > 0 {
                whole.batch.ids.extend_from_slice(&chosen.ids[..shared]);
                whole.batch.weights.extend(std::iter::repeat_n(prompt_weight, shared));
                whole.batch.segments.push(Segment::whole(prefix.clone()));
            }
            // Of each sequence: noise is drawn by the row, and a pair's answers have the same.
            whole.batch.rows.extend([number; 2]);
            let place = |side| Place { pair, side, in_answer: true };
            whole.append(chosen, &prefix, place(Side::Chosen), prompt_weight);
            whole.append(rejected, &prefix, place(Side::Rejected), 0.0);
        }
        whole
    }

    /// Adds an answer whose first tokens lie at `prefix` already.
    fn append(
        &mut self,
        answer: &TokenizedAnswer,
        prefix: &Range<usize>,
        place: Place,
        prompt_weight: f32,
    ) {
        let (shared, start) = (prefix.len(), self.batch.ids.len());
        let position =
            |token: usize| token + if token < shared { prefix.start } else { start - shared };
        for (token, &id) in answer.ids.iter().enumerate().skip(1) {
            let in_answer = answer.completion.contains(&token);
            let weight = if in_answer { 1.0 } else { prompt_weight };
            if weight > 0.0 {
                self.targets.push(Target { position: position(token - 1), id, weight });
                self.places.push(Place { in_answer, ..place });
            }
        }
        self.batch.ids.extend_from_slice(&answer.ids[shared..]);
        let weight = |token| if answer.completion.contains(&token) { 1.0 } else { prompt_weight };
        self.batch.weights.extend((shared..answer.ids.len()).map(weight));
        let prefix = if shared > 0 { prefix.clone() } else { 0..0 };
        self.batch.segments.push(Segment { tokens: start..self.batch.ids.len(), prefix });
    }

    /// Cuts `numbers`, pairs of `pairs`, into passes in that order; a pair is never torn apart.
    #[must_use]
    pub fn passes(
        pairs: &[TokenizedPair],
        numbers: &[usize],
        batching: &Batching,
        objective: &Objective,
    ) -> Vec<Self> {
        let share_prompts = batching.share_prefixes;
        groups(pairs, numbers, batching)
            .iter()
            .map(|(group, _)| Self::new(pairs, group, objective, share_prompts))
            .collect()
    }

    /// How many tokens each of these has.
    pub(crate) fn sizes(
        pairs: &[TokenizedPair],
        numbers: &[usize],
        batching: &Batching,
    ) -> Vec<usize> {
        groups(pairs, numbers, batching).into_iter().map(|(_, tokens)| tokens).collect()
    }

    /// The pairs' numbers in the data set.
    #[must_use]
    pub fn pairs(&self) -> &[usize] {
        &self.pairs
    }

    /// Σ of the weights of the preferred answers' targets.
    #[must_use]
    pub fn chosen_weight(&self) -> f64 {
        let chosen = self.targets.iter().zip(&self.places);
        let chosen = chosen.filter(|(_, place)| place.side == Side::Chosen);
        chosen.map(|(target, _)| f64::from(target.weight)).sum()
    }
}

/// The numbers of the pairs of each pass, and the tokens that are then computed.
fn groups(
    pairs: &[TokenizedPair],
    numbers: &[usize],
    batching: &Batching,
) -> Vec<(Vec<usize>, usize)> {
    let batch_size = if batching.packing { batching.batch_size } else { 1 };
    let mut groups: Vec<(Vec<usize>, usize)> = Vec::new();
    for chunk in numbers.chunks(batch_size) {
        let mut room = 0;
        for &number in chunk {
            let pair = &pairs[number];
            let shared = if batching.share_prefixes { shared_tokens(pair) } else { 0 };
            let tokens = tokens(pair) - shared;
            match groups.last_mut() {
                Some((group, all)) if room >= tokens => {
                    group.push(number);
                    *all += tokens;
                }
                _ => {
                    room = batching.tokens_per_pass.max(tokens);
                    groups.push((vec![number], tokens));
                }
            }
            room -= tokens;
        }
    }
    groups
}

/// Tokens of both answers, each with its prompt.
#[must_use]
pub fn tokens(pair: &TokenizedPair) -> usize {
    pair.chosen.ids.len() + pair.rejected.ids.len()
}

/// How many first tokens of both answers are the same prompt; 0 where sharing is not worth it.
fn shared_tokens(pair: &TokenizedPair) -> usize {
    let TokenizedPair { chosen, rejected, .. } = pair;
    let longest = chosen.completion.start.min(rejected.completion.start);
    let alike = chosen.ids.iter().zip(&rejected.ids).take(longest);
    let shared = alike.take_while(|(a, b)| a == b).count();
    if shared < MIN_SHARED_TOKENS { 0 } else { shared }
}

#[cfg(test)]
mod tests {
    use tunesmith_core::hyperparameters::PreferenceLoss;

    use super::*;

    fn pair(line: usize, prompt: usize, chosen: usize, rejected: usize) -> TokenizedPair {
        let answer = |tokens: usize, first: u32| TokenizedAnswer {
            ids: (0..prompt as u32).chain(first..first + tokens as u32).collect(),
            completion: prompt..prompt + tokens,
            truncated: false,
        };
        TokenizedPair { line, chosen: answer(chosen, 100), rejected: answer(rejected, 200) }
    }

    fn objective(loss: PreferenceLoss, prompt_loss_weight: f32) -> Objective {
        Objective { loss, beta: 0.1, simpo_gamma: 0.5, prompt_loss_weight }
    }

    #[test]
    fn targets_are_the_answers_tokens_and_each_knows_its_pair_and_side() {
        let pairs = [pair(1, 2, 2, 1), pair(2, 3, 1, 1)];
        let batch = PairBatch::new(&pairs, &[1, 0], &objective(PreferenceLoss::Dpo, 0.0), true);
        assert!(batch.batch.check().is_ok());
        assert_eq!(batch.pairs(), [1, 0]);
        let ids: Vec<u32> = batch.targets.iter().map(|target| target.id).collect();
        assert_eq!(ids, [100, 200, 100, 101, 200]);
        let places: Vec<_> = batch.places.iter().map(|place| (place.pair, place.side)).collect();
        use Side::{Chosen, Rejected};
        assert_eq!(places, [(0, Chosen), (0, Rejected), (1, Chosen), (1, Chosen), (1, Rejected)]);
        assert!(batch.places.iter().all(|place| place.in_answer));
        assert!(batch.targets.iter().all(|target| target.weight == 1.0));
        assert_eq!(batch.chosen_weight(), 3.0);
    }

    #[test]
    fn orpo_learns_the_prompt_of_the_preferred_answer_where_that_is_asked_for() {
        let pairs = [pair(1, 3, 2, 2)];
        let batch = PairBatch::new(&pairs, &[0], &objective(PreferenceLoss::Orpo, 0.25), true);
        let targets: Vec<_> = batch.targets.iter().map(|t| (t.position, t.id, t.weight)).collect();
        assert_eq!(
            targets,
            [
                (0, 1, 0.25),
                (1, 2, 0.25),
                (2, 100, 1.0),
                (3, 101, 1.0),
                (7, 200, 1.0),
                (8, 201, 1.0)
            ]
        );
        let in_answer: Vec<bool> = batch.places.iter().map(|place| place.in_answer).collect();
        assert_eq!(in_answer, [false, false, true, true, true, true]);
        assert_eq!(batch.chosen_weight(), 2.5);
    }

    #[test]
    fn a_prompt_is_computed_once_and_predicts_both_answers() {
        let pairs = [pair(1, 1, 1, 1), pair(2, 20, 2, 1)];
        let batch = PairBatch::new(&pairs, &[0, 1], &objective(PreferenceLoss::Orpo, 0.5), true);
        assert!(batch.batch.check().is_ok());
        // The first pair's prompt is too short to share.
        let whole = [0..2, 2..4, 4..24].map(Segment::whole);
        let continued = [24..26, 26..27].map(|tokens| Segment { tokens, prefix: 4..24 });
        assert_eq!(batch.batch.segments, [whole.as_slice(), &continued].concat());
        let answers = batch.targets.iter().zip(&batch.places).filter(|(_, place)| place.in_answer);
        let answers: Vec<_> = answers.map(|(target, _)| (target.position, target.id)).collect();
        assert_eq!(answers, [(0, 100), (2, 200), (23, 100), (24, 101), (23, 200)]);
        assert_eq!(batch.chosen_weight(), 1.0 + 19.0 * 0.5 + 2.0);
    }

    #[test]
    fn passes_keep_pairs_whole_and_within_the_budget() {
        let pairs = [pair(1, 2, 1, 1), pair(2, 2, 1, 1), pair(3, 9, 9, 9), pair(4, 1, 1, 1)];
        let batching =
            Batching { batch_size: 3, packing: true, share_prefixes: true, tokens_per_pass: 12 };
        let objective = objective(PreferenceLoss::Dpo, 0.0);
        let numbers = |batching: &Batching| -> Vec<Vec<usize>> {
            let passes = PairBatch::passes(&pairs, &[0, 1, 2, 3], batching, &objective);
            passes.iter().map(|pass| pass.pairs.clone()).collect()
        };
        assert_eq!(numbers(&batching), [vec![0, 1], vec![2], vec![3]]);
        let alone = Batching { packing: false, ..batching };
        assert_eq!(numbers(&alone), [[0], [1], [2], [3]]);
    }
}
