//! From logits to a token.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::HashMap;

use llguidance::toktrie::SimpleVob;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tunesmith_core::sampling::{Sampling, TokenLogprob};

use crate::ops::exponentials::{exponentials, greatest};

/// Candidates that top-p looks at first; most of the time they are enough.
const FIRST_CANDIDATES: usize = 64;

/// What chooses the tokens of one answer.
#[derive(Debug)]
pub(super) struct Chooser {
    sampling: Sampling,
    generator: ChaCha8Rng,
    /// How often the answer holds a token.
    counts: HashMap<u32, u32>,
}

/// A token that was chosen.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Choice {
    pub(super) token: TokenLogprob,
    pub(super) top: Vec<TokenLogprob>,
}

/// The logits are not all numbers.
#[derive(Debug, PartialEq)]
pub(super) struct NotNumbers;

impl Chooser {
    /// That of answer number `index`, which draws from a stream of its own.
    pub(super) fn new(sampling: Sampling, index: u32) -> Self {
        let mut generator = ChaCha8Rng::seed_from_u64(sampling.seed);
        generator.set_stream(u64::from(index));
        Self { sampling, generator, counts: HashMap::new() }
    }

    pub(super) fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// Chooses the next token; among `allowed`, where only some may come.
    pub(super) fn choose(
        &mut self,
        logits: &[f32],
        allowed: Option<&SimpleVob>,
    ) -> Result<Choice, NotNumbers> {
        let mut scratch = vec![0.0; logits.len()];
        let (greatest, total) = exponentials(logits, 1.0, &mut scratch);
        if !total.is_finite() || !greatest.is_finite() {
            return Err(NotNumbers);
        }
        let log_total = f64::from(greatest) + total.ln();
        let with_logprob = |id: u32| TokenLogprob {
            id,
            logprob: (f64::from(logits[id as usize]) - log_total) as f32,
        };
        let top = most_likely(logits, usize::from(self.sampling.top_logprobs));
        let top = top.into_iter().map(with_logprob).collect();
        let shifted = self.shifted(logits, allowed);
        let id = match self.sampling.temperature > 0.0 {
            true => self.draw(&shifted, &mut scratch),
            false => most_likely(&shifted, 1)[0],
        };
        *self.counts.entry(id).or_default() += 1;
        Ok(Choice { token: with_logprob(id), top })
    }

    /// The logits with bias and penalties, and without what may not come.
    fn shifted<'a>(&self, logits: &'a [f32], allowed: Option<&SimpleVob>) -> Cow<'a, [f32]> {
        let Sampling { frequency_penalty, presence_penalty, logit_bias, .. } = &self.sampling;
        let is_penalised = *frequency_penalty != 0.0 || *presence_penalty != 0.0;
        if logit_bias.is_empty() && !is_penalised && allowed.is_none() {
            return Cow::Borrowed(logits);
        }
        let mut shifted = logits.to_vec();
        let biases = logit_bias.iter().copied();
        let penalties = self
            .counts
            .iter()
            .map(|(&id, &count)| (id, -frequency_penalty * count as f32 - presence_penalty));
        for (id, shift) in biases.chain(penalties) {
            if let Some(logit) = shifted.get_mut(id as usize) {
                *logit += shift;
            }
        }
        if let Some(allowed) = allowed {
            for (id, logit) in shifted.iter_mut().enumerate() {
                // The model may have more rows than its tokenizer has tokens.
                if id >= allowed.len() || !allowed.get(id) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        Cow::Owned(shifted)
    }

    /// Draws from softmax(logits / temperature), of the most likely tokens up to top_p.
    fn draw(&mut self, logits: &[f32], p: &mut [f32]) -> u32 {
        let (_, total) = exponentials(logits, 1.0 / self.sampling.temperature, p);
        let point: f64 = self.generator.random();
        if self.sampling.top_p >= 1.0 {
            return pick((0..p.len() as u32).map(|id| (id, p[id as usize])), point * total);
        }
        let wanted = f64::from(self.sampling.top_p) * total;
        let mut count = FIRST_CANDIDATES;
        let (candidates, sum) = loop {
            let candidates = most_likely(p, count);
            let mut sum = 0.0;
            let enough = candidates.iter().position(|&id| {
                sum += f64::from(p[id as usize]);
                sum >= wanted
            });
            match enough {
                Some(last) => break (candidates[..=last].to_vec(), sum),
                None if candidates.len() == p.len() => break (candidates, sum),
                None => count *= 8,
            }
        };
        pick(candidates.into_iter().map(|id| (id, p[id as usize])), point * sum)
    }
}

/// The token in whose share of the sum `point` lies.
fn pick(shares: impl Iterator<Item = (u32, f32)>, mut point: f64) -> u32 {
    let mut last = 0;
    for (id, share) in shares {
        if share > 0.0 {
            last = id;
            if point < f64::from(share) {
                break;
            }
        }
        point -= f64::from(share);
    }
    last
}

/// The ids of the `count` greatest values, the greatest first, and of equals the lower id.
pub(super) fn most_likely(values: &[f32], count: usize) -> Vec<u32> {
    if count == 0 {
        return Vec::new();
    }
    if count == 1 {
        let greatest = greatest(values);
        let first = values.iter().position(|&value| value == greatest);
        return vec![first.unwrap_or(0) as u32];
    }
    let order = |&a: &u32, &b: &u32| -> Ordering {
        values[b as usize].total_cmp(&values[a as usize]).then(a.cmp(&b))
    };
    let mut ids: Vec<u32> = (0..values.len() as u32).collect();
    if count < ids.len() {
        ids.select_nth_unstable_by(count, order);
        ids.truncate(count);
    }
    ids.sort_unstable_by(order);
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    fn greedy() -> Sampling {
        Sampling { seed: 1, ..Sampling::greedy(10) }
    }

    fn logits() -> Vec<f32> {
        vec![0.0, 2.0, -1.0, 2.0, 1.0]
    }

    /// Softmax of some of the tokens.
    fn shares(logits: &[f32], temperature: f64, among: &[u32]) -> Vec<f64> {
        let exp: Vec<f64> = logits
            .iter()
            .enumerate()
            .map(|(id, &logit)| match among.contains(&(id as u32)) {
                true => (f64::from(logit) / temperature).exp(),
                false => 0.0,
            })
            .collect();
        let total: f64 = exp.iter().sum();
        exp.into_iter().map(|value| value / total).collect()
    }

    fn frequencies(sampling: Sampling, draws: u32) -> Vec<f64> {
        let mut counts = [0.0; 5];
        for index in 0..draws {
            let choice = Chooser::new(sampling.clone(), index).choose(&logits(), None).unwrap();
            counts[choice.token.id as usize] += 1.0 / f64::from(draws);
        }
        counts.to_vec()
    }

    #[test]
    fn greatest_of_many_is_found_wherever_it_is_and_the_first_of_equals() {
        for length in [1, 15, 16, 17, 50] {
            for place in 0..length {
                let mut values: Vec<f32> = (0..length).map(|i| -1.0 - i as f32).collect();
                values[place] = 2.0;
                values[length - 1] = 2.0;
                assert_eq!(most_likely(&values, 1), [place as u32], "{length}");
                assert_eq!(most_likely(&values, 2)[0], place as u32, "{length}");
            }
        }
    }

    #[test]
    fn greedy_takes_the_first_of_equals_with_its_log_probability() {
        let sampling = Sampling { top_logprobs: 3, ..greedy() };
        let choice = Chooser::new(sampling, 0).choose(&logits(), None).unwrap();
        let p = shares(&logits(), 1.0, &[0, 1, 2, 3, 4]);
        assert_eq!(choice.token.id, 1);
        assert_eq!(choice.top.iter().map(|token| token.id).collect::<Vec<_>>(), [1, 3, 4]);
        for token in choice.top {
            let expected = p[token.id as usize].ln();
            assert!((f64::from(token.logprob) - expected).abs() < 1e-6, "{token:?} {expected}");
        }
    }

    #[test]
    fn tokens_are_drawn_as_often_as_temperature_and_top_p_say() {
        let cases = [
            (Sampling { temperature: 1.0, ..greedy() }, vec![0, 1, 2, 3, 4]),
            (Sampling { temperature: 0.5, ..greedy() }, vec![0, 1, 2, 3, 4]),
            // The three greatest have 0.93 of the probability.
            (Sampling { temperature: 1.0, top_p: 0.9, ..greedy() }, vec![1, 3, 4]),
            (Sampling { temperature: 1.0, top_p: 0.5, ..greedy() }, vec![1, 3]),
            (Sampling { temperature: 1.0, top_p: 1e-6, ..greedy() }, vec![1]),
        ];
        for (sampling, among) in cases {
            let expected = shares(&logits(), f64::from(sampling.temperature), &among);
            let seen = frequencies(sampling.clone(), 20_000);
            for (seen, expected) in seen.iter().zip(&expected) {
                // Five standard deviations of the rarest and the most frequent alike.
                assert!((seen - expected).abs() < 0.018, "{sampling:?}: {seen} {expected}");
                assert!(*expected > 0.0 || *seen == 0.0, "{sampling:?}");
            }
        }
    }

    #[test]
    fn top_p_looks_further_where_many_tokens_are_alike() {
        let sampling = Sampling { temperature: 1.0, top_p: 0.95, ..greedy() };
        let ids: Vec<u32> = (0..2000)
            .map(|index| {
                Chooser::new(sampling.clone(), index).choose(&[0.0; 1000], None).unwrap().token.id
            })
            .collect();
        assert!(ids.iter().all(|&id| id < 950), "the first 950 hold 0.95");
        assert!(ids.iter().any(|&id| id >= 900));
    }

    #[test]
    fn penalties_and_bias_shift_the_choice_and_not_the_log_probability() {
        let sampling = Sampling {
            frequency_penalty: 0.6,
            presence_penalty: 0.5,
            logit_bias: vec![(3, -100.0), (2, 1.5)],
            ..greedy()
        };
        let mut chooser = Chooser::new(sampling, 0);
        let chosen: Vec<TokenLogprob> =
            (0..4).map(|_| chooser.choose(&logits(), None).unwrap().token).collect();
        // 1 falls from 2 to 0.9, then 4 at 1 wins and falls to −0.1, then 1 falls to 0.3.
        assert_eq!(chosen.iter().map(|token| token.id).collect::<Vec<_>>(), [1, 4, 1, 2]);
        assert_eq!(chosen[0].logprob, chosen[2].logprob);
    }

    #[test]
    fn same_seed_gives_the_same_tokens_and_answers_differ() {
        let sampling = Sampling { temperature: 2.0, ..greedy() };
        let draw = |seed, index| -> Vec<u32> {
            let mut chooser = Chooser::new(Sampling { seed, ..sampling.clone() }, index);
            (0..20).map(|_| chooser.choose(&logits(), None).unwrap().token.id).collect()
        };
        assert_eq!(draw(7, 0), draw(7, 0));
        assert_ne!(draw(7, 0), draw(7, 1));
        assert_ne!(draw(7, 0), draw(8, 0));
    }

    #[test]
    fn only_allowed_tokens_are_drawn_in_their_own_proportions() {
        let mut allowed = SimpleVob::alloc(3);
        allowed.allow_token(0);
        allowed.allow_token(2);
        for temperature in [0.0, 1.0] {
            for top_p in [0.4, 1.0] {
                let sampling = Sampling { temperature, top_p, ..greedy() };
                let mut counts = [0.0; 5];
                for index in 0..2000 {
                    let mut chooser = Chooser::new(sampling.clone(), index);
                    let choice = chooser.choose(&logits(), Some(&allowed)).unwrap();
                    counts[choice.token.id as usize] += 1.0 / 2000.0;
                    let expected = shares(&logits(), 1.0, &[0, 1, 2, 3, 4]);
                    let expected = expected[choice.token.id as usize].ln();
                    assert!((f64::from(choice.token.logprob) - expected).abs() < 1e-6);
                }
                let one = temperature == 0.0 || top_p < 0.5;
                let expected = if one { 1.0 } else { shares(&logits(), 1.0, &[0, 2])[0] };
                let more: f64 = counts[1] + counts[3] + counts[4];
                assert!(more == 0.0 && (counts[0] - expected).abs() < 0.05, "{counts:?}");
            }
        }
    }

    #[test]
    fn logits_that_are_no_numbers_are_told() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut logits = logits();
            logits[2] = bad;
            assert_eq!(Chooser::new(greedy(), 0).choose(&logits, None), Err(NotNumbers));
        }
    }
}
