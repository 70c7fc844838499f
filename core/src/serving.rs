//! What a front-end and a sampler say to each other: one `POST` of a [`SampleOrder`] in JSON, and
//! back a [`SampleLine`] in JSON on each line.

use crate::errors::ApiError;
use crate::hyperparameters::AdapterType;
use crate::ids::BaseModelId;
use crate::sampling::{EndReason, Sampling, TokenLogprob};
use crate::weights::WeightsPlace;
use serde::{Deserialize, Serialize};

/// Where a sampler takes orders.
pub const SAMPLE_PATH: &str = "/v1/sample";
/// Bytes of an order at most: a prompt of two million tokens.
pub const MAX_ORDER_BYTES: usize = 16 << 20;
/// A sampler says something at least this often, even if it is only [`SampleLine::Waiting`].
pub const SAY_EVERY_SECONDS: u64 = 5;

/// A prompt to go on from, with the model that is to do so.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SampleOrder {
    /// The base model.
    pub base_model: BaseModelId,
    /// What was made of it, or None for the base model itself.
    pub tuned: Option<TunedWeights>,
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// Answers to give, at least 1.
    pub n: u32,
    /// How.
    pub sampling: Sampling,
    /// Waits until no other order does.
    pub low_priority: bool,
}

/// The weights of a tuned model or a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunedWeights {
    /// Where they lie.
    pub place: WeightsPlace,
    /// An adapter on the base model, or a model of its own.
    pub kind: AdapterType,
}

impl SampleOrder {
    /// The model that a sampler must have in memory, adapters aside: the base model, or the tuned
    /// one where every weight was trained.
    #[must_use]
    pub fn in_memory(&self) -> String {
        match &self.tuned {
            Some(tuned) if tuned.kind == AdapterType::Full => tuned.place.to_string(),
            _ => self.base_model.to_string(),
        }
    }
}

/// What a sampler says of an order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum SampleLine {
    /// Nothing yet; the connection is alive.
    Waiting,
    /// One more token of an answer.
    Token {
        /// Which of its answers, from 0.
        index: u32,
        /// The token.
        token: TokenLogprob,
        /// The most likely tokens in its place, best first.
        top: Vec<TokenLogprob>,
    },
    /// An answer is complete.
    End {
        /// Which of its answers, from 0.
        index: u32,
        /// Why it ended.
        reason: EndReason,
        /// The prompt's tokens that an earlier request had left in the cache.
        cached_tokens: u32,
    },
    /// The order came to nothing; this is the last line.
    Failed {
        /// For whoever asked.
        error: ApiError,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::CheckpointPlace;

    #[test]
    fn an_adapter_needs_its_base_in_memory_and_a_full_model_itself() {
        let place = CheckpointPlace { job: "ftjob-a".into(), attempt: 2, step: 7 };
        let tuned = |kind| TunedWeights { place: place.clone().into(), kind };
        let mut order = SampleOrder {
            base_model: "basemodel_b".into(),
            tuned: None,
            prompt: vec![1],
            n: 1,
            sampling: Sampling::greedy(1),
            low_priority: false,
        };
        assert_eq!(order.in_memory(), "basemodel_b");
        order.tuned = Some(tuned(AdapterType::Lora));
        assert_eq!(order.in_memory(), "basemodel_b");
        order.tuned = Some(tuned(AdapterType::Full));
        assert_eq!(order.in_memory(), "ftjob-a-2-7");
        let json = serde_json::to_string(&order).expect("json");
        assert_eq!(serde_json::from_str::<SampleOrder>(&json).expect("back"), order);
    }
}
