//! Continuing a prompt, with the keys and values of earlier tokens kept.

use crate::error::EngineError;
use crate::model::TrainableModel;
use crate::models::decoder::{Adaptation, KeyValueCache, RotaryTables, Sequence};
use crate::parameter::{Parameters, read};

/// One sequence that grows: feeds tokens in, gives the logits of the next token.
#[derive(Debug)]
pub struct Generation<'a> {
    model: &'a TrainableModel,
    parameters: Parameters,
    adaptation: Adaptation,
    cache: KeyValueCache,
    rotary: RotaryTables,
}

impl Generation<'_> {
    /// Appends `ids` to the sequence; returns the logits `[vocab_size]` of the token after them.
    ///
    /// # Errors
    /// [`EngineError::Data`] for an unknown id or for none at all, or for a sequence that has grown
    /// longer than the model can compute.
    pub fn advance(&mut self, ids: &[u32]) -> Result<Vec<f32>, EngineError> {
        self.model.check_ids(ids)?;
        let tokens = self.cache.tokens() + ids.len();
        self.model.check_length(tokens)?;
        let decoder = self.model.decoder();
        if self.rotary.positions < tokens {
            self.rotary = decoder.rotary_tables(tokens.next_power_of_two());
        }
        let adaptation = Some(&self.adaptation);
        let sequence = Sequence { ids, cache: &mut self.cache, adaptation };
        let hidden = decoder.extend(&self.parameters, &mut [sequence], &self.rotary);
        read(decoder.next_logits(&self.parameters, hidden, &[ids.len() - 1]))
    }
}

impl TrainableModel {
    /// Starts an empty sequence.
    #[must_use]
    pub fn generation(&self) -> Generation<'_> {
        let parameters = self.parameters().frozen();
        Generation {
            model: self,
            adaptation: self.decoder().own_adaptation(&parameters),
            parameters,
            cache: KeyValueCache::default(),
            rotary: self.decoder().rotary_tables(0),
        }
    }

    /// The most likely continuation of `prompt`, token by token, until `max_new_tokens` or a token
    /// of `stop`, which is the last one returned.
    ///
    /// # Errors
    /// [`EngineError::Data`] for an empty prompt or an unknown id; [`EngineError::Numeric`] when
    /// no logit is a number.
    pub fn generate_greedy(
        &self,
        prompt: &[u32],
        max_new_tokens: usize,
        stop: &[u32],
    ) -> Result<Vec<u32>, EngineError> {
        let mut generation = self.generation();
        let mut generated = Vec::with_capacity(max_new_tokens);
        let mut next = prompt.to_vec();
        while generated.len() < max_new_tokens {
            let token = most_likely(&generation.advance(&next)?)?;
            generated.push(token);
            if stop.contains(&token) {
                break;
            }
            next = vec![token];
        }
        Ok(generated)
    }
}

/// Index of the greatest logit; the first of equals, as `argmax` has it.
fn most_likely(logits: &[f32]) -> Result<u32, EngineError> {
    let mut best: Option<(usize, f32)> = None;
    for (token, &logit) in logits.iter().enumerate() {
        if logit.is_nan() {
            return Err(EngineError::Numeric(format!("the logit of token {token} is NaN")));
        }
        if best.is_none_or(|(_, greatest)| logit > greatest) {
            best = Some((token, logit));
        }
    }
    best.map(|(token, _)| token as u32)
        .ok_or_else(|| EngineError::Numeric("there are no logits".to_owned()))
}
