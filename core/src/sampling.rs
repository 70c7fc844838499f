//! How tokens are sampled, and what a sampler and its child for one base model say to each other:
//! frames as between a worker and its trainer (see [`protocol`](crate::protocol)).
//!
//! The child holds a base model and any number of adapters of it. It knows tokens alone: templates,
//! text and stop strings are the business of whoever asks.

use crate::errors::ErrorCode;
use crate::export_check::{CheckFiles, CheckReply};
use crate::hyperparameters::Precision;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::PathBuf;

/// The most alternatives that a token may be shown with.
pub const MAX_TOP_LOGPROBS: u8 = 20;

/// How to choose the tokens of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Tokens to generate at most, at least 1.
    pub max_tokens: u32,
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Samples among the fewest tokens whose probabilities sum to this, over 0 and up to 1
    /// (Holtzman et al. 2020).
    pub top_p: f32,
    /// The same seed, prompt and model give the same answer, whatever is answered beside it.
    pub seed: u64,
    /// Taken from a token's logit as often as the answer holds it, from −2 to 2.
    pub frequency_penalty: f32,
    /// Taken once from the logit of each token that the answer holds, from −2 to 2.
    pub presence_penalty: f32,
    /// Added to the logits of these tokens, from −100 to 100.
    pub logit_bias: Vec<(u32, f32)>,
    /// Alternatives to tell with each token, up to [`MAX_TOP_LOGPROBS`].
    pub top_logprobs: u8,
    /// Tokens that end an answer. They are not part of it.
    pub stop_ids: Vec<u32>,
    /// A JSON schema: only tokens are chosen with which the answer becomes JSON that it allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub json_schema: Option<Value>,
}

impl Sampling {
    /// The most likely tokens, up to `max_tokens` of them, and nothing beside.
    #[must_use]
    pub fn greedy(max_tokens: u32) -> Self {
        Self {
            max_tokens,
            temperature: 0.0,
            top_p: 1.0,
            seed: 0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            top_logprobs: 0,
            stop_ids: Vec::new(),
            json_schema: None,
        }
    }
}

/// A prompt to go on from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SampleRequest {
    /// Names the request in what comes back; unique among those that are running.
    pub id: u64,
    /// An adapter that was loaded, or None for the base model.
    pub adapter: Option<String>,
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// Answers to give, at least 1. They share the work on the prompt; answer i draws with its own
    /// stream of the seed.
    pub n: u32,
    /// How.
    pub sampling: Sampling,
    /// Waits until no other request does: for work that nobody is looking at.
    pub low_priority: bool,
}

/// Sampler → child.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToSampler {
    /// The first frame.
    Load {
        /// A Hugging Face directory.
        base_model_dir: PathBuf,
        /// `auto`, `cpu`, `cuda` or `cuda:N`.
        device: String,
        /// The numbers that products multiply. `auto` keeps the weights as they are stored.
        precision: Precision,
        /// Answers that are computed side by side at most.
        max_batch: usize,
        /// Memory for the keys and values of running answers and of prompts that may come again.
        cache_bytes: u64,
    },
    /// Read an adapter and keep it until it is unloaded.
    LoadAdapter {
        /// Its name from now on.
        adapter: String,
        /// A PEFT directory.
        dir: PathBuf,
    },
    /// Forget an adapter. Answers that run with it go on.
    UnloadAdapter {
        /// Its name.
        adapter: String,
    },
    /// Answer.
    Sample(SampleRequest),
    /// Nobody waits for this request any more. Nothing more is said about it.
    Cancel {
        /// The request.
        id: u64,
    },
    /// The first and only frame: compare an export with what is served.
    Check(CheckFiles),
}

/// Child → sampler.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FromSampler {
    /// The base model is in memory.
    Loaded {
        /// The device, in words.
        device: String,
    },
    /// The base model cannot be loaded; the child exits.
    LoadFailed {
        /// Why.
        message: String,
    },
    /// An adapter is in memory.
    AdapterLoaded {
        /// Its name.
        adapter: String,
    },
    /// An adapter cannot be loaded.
    AdapterFailed {
        /// Its name.
        adapter: String,
        /// Why.
        message: String,
    },
    /// One more token of an answer.
    Token {
        /// The request.
        id: u64,
        /// Which of its answers, from 0.
        index: u32,
        /// The token.
        token: TokenLogprob,
        /// The most likely tokens in its place, best first.
        top: Vec<TokenLogprob>,
    },
    /// An answer is complete.
    End {
        /// The request.
        id: u64,
        /// Which of its answers, from 0.
        index: u32,
        /// Why it ended.
        reason: EndReason,
        /// The prompt's tokens that an earlier request had left in the cache.
        cached_tokens: u32,
    },
    /// A request came to nothing; none of its answers goes on.
    Failed {
        /// The request.
        id: u64,
        /// Which error of the table.
        code: ErrorCode,
        /// For whoever asked.
        message: String,
    },
    /// What came of a check; the child exits.
    Checked {
        /// It.
        reply: CheckReply,
    },
}

/// A token and log p of it: natural logarithm, of the model's own distribution, before temperature,
/// penalties and bias.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// Token id.
    pub id: u32,
    /// Log probability.
    pub logprob: f32,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// The model said so, with a token of [`Sampling::stop_ids`].
    Stop,
    /// [`Sampling::max_tokens`] or the model's context is used up.
    Length,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{read_frame, write_frame};

    #[test]
    fn messages_come_back_as_they_were_sent() {
        let token = TokenLogprob { id: 7, logprob: -0.1 };
        let messages = [
            FromSampler::Token { id: 1, index: 0, token, top: vec![token; 2] },
            FromSampler::End { id: 1, index: 0, reason: EndReason::Length, cached_tokens: 3 },
            FromSampler::Loaded { device: "CPU".to_owned() },
            FromSampler::Checked { reply: CheckReply::Unfit { reason: "torn".to_owned() } },
        ];
        let mut wire = Vec::new();
        for message in &messages {
            write_frame(&mut wire, message).expect("write");
        }
        let mut reader = wire.as_slice();
        for message in messages {
            assert_eq!(read_frame(&mut reader).expect("read"), Some(message));
        }
    }
}
