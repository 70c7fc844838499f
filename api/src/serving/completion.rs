//! Completions of plain prompts, whole or as a stream.

use super::answers::{Answers, Event, Prompt};
use super::chat::token_text;
use super::completion_request::{CompletionRequest, PromptText};
use super::reply::AnswerReply;
use super::text::{AnswerToken, Piece};
use super::{
    DONE, FinishReason, Head, KEEP_ALIVE, Served, Serving, Usage, event, tokenizer_failed,
};
use crate::failure::{Failure, invalid_value};
use bytes::Bytes;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value};
use std::sync::Arc;
use tunesmith_core::dataset::ChatTokenizer;
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::ids::ProjectId;

/// OpenAI's default for plain prompts.
const DEFAULT_MAX_TOKENS: u64 = 16;

/// A completion on the wire, and a chunk of one that is streamed.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Completion {
    id: String,
    #[schemars(extend("const" = "text_completion"))]
    object: &'static str,
    created: i64,
    model: String,
    choices: Vec<Choice>,
    /// Of a stream: with the last chunk, where it is asked for.
    usage: Option<Usage>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct Choice {
    text: String,
    index: u32,
    logprobs: Option<Logprobs>,
    /// Null in a stream until the answer's end.
    finish_reason: Option<FinishReason>,
}

/// The tokens of an answer and how probable each was, in columns.
#[derive(Debug, Default, Serialize, JsonSchema)]
struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    /// The most likely tokens in each place.
    top_logprobs: Vec<Map<String, Value>>,
    /// Where each token's text begins, in characters of the answer's.
    text_offset: Vec<usize>,
}

impl Logprobs {
    fn extend(&mut self, tokenizer: &ChatTokenizer, tokens: &[AnswerToken]) {
        let text = |id| token_text(&tokenizer.token_bytes(id));
        for token in tokens {
            self.tokens.push(text(token.token.id));
            self.token_logprobs.push(token.token.logprob);
            let top = token.top.iter().map(|top| (text(top.id), top.logprob.into()));
            self.top_logprobs.push(top.collect());
            self.text_offset.push(token.offset);
        }
    }
}

/// The answers to all prompts of a request, one prompt after another.
pub(crate) struct CompletionAnswer {
    head: Head,
    tokenizer: Arc<ChatTokenizer>,
    /// Those to each prompt; all are under way.
    answers: Vec<Answers>,
    /// The prompt whose answers come now.
    current: usize,
    /// What each prompt's answers begin with.
    echoes: Vec<String>,
    n: u32,
    shows_logprobs: bool,
    include_usage: bool,
}

impl CompletionAnswer {
    /// Asks samplers.
    ///
    /// # Errors
    /// `no_such_model`, `invalid_value` for token ids that are none, `context_length_exceeded`,
    /// and those of asking a sampler.
    pub(super) async fn begin(
        serving: &Serving,
        project: &ProjectId,
        request: &CompletionRequest,
        low_priority: bool,
    ) -> Result<Self, Failure> {
        let served = serving.model(project, &request.model).await?;
        let asked = &request.asked;
        let mut prompts = Vec::new();
        let mut echoes = Vec::new();
        for prompt in &request.prompts {
            let ids = encode(&served, prompt)?;
            let default = Some(DEFAULT_MAX_TOKENS);
            let stop_ids = served.tokenizer.eos_ids().to_vec();
            let mut sampling = asked.sampling(&served, ids.len(), default, "prompt", stop_ids)?;
            sampling.top_logprobs = request.logprobs.unwrap_or(0);
            if request.echo {
                echoes.push(match prompt {
                    PromptText::Text(text) => text.clone(),
                    PromptText::Ids(ids) => served
                        .tokenizer
                        .decode_with_special(ids)
                        .map_err(|error| tokenizer_failed(&error))?,
                });
            }
            let (n, stops) = (asked.n, asked.stops.clone());
            prompts.push(Prompt { ids, n, sampling, stops, goes_on: true, low_priority });
        }
        let begun = prompts.into_iter().map(|prompt| Answers::begin(serving, &served, prompt));
        let answers = futures::future::try_join_all(begun).await?;
        Ok(Self {
            head: Head::new("cmpl-", &served.name),
            tokenizer: served.tokenizer,
            answers,
            current: 0,
            echoes,
            n: asked.n,
            shows_logprobs: request.logprobs.is_some(),
            include_usage: asked.include_usage,
        })
    }

    /// What happens next, with the index of its choice among all.
    async fn next(&mut self) -> Result<Option<Event>, ApiError> {
        while let Some(answers) = self.answers.get_mut(self.current) {
            let first = self.current as u32 * self.n;
            match answers.next().await? {
                Some(Event::Waiting) => return Ok(Some(Event::Waiting)),
                Some(Event::Piece(index, piece)) => {
                    return Ok(Some(Event::Piece(first + index, piece)));
                }
                Some(Event::End(index, reason)) => {
                    return Ok(Some(Event::End(first + index, reason)));
                }
                None => self.current += 1,
            }
        }
        Ok(None)
    }

    fn choices(&self) -> Vec<Choice> {
        let choice = |index: u32| Choice {
            text: self.echoes.get((index / self.n) as usize).cloned().unwrap_or_default(),
            index,
            logprobs: self.shows_logprobs.then(Logprobs::default),
            finish_reason: None,
        };
        (0..self.answers.len() as u32 * self.n).map(choice).collect()
    }

    fn usage(&self) -> Usage {
        self.answers.iter().map(Answers::usage).fold(Usage::default(), Usage::plus)
    }

    fn completion(&self, choices: Vec<Choice>, usage: Option<Usage>) -> Completion {
        let Head { id, created, model } = self.head.clone();
        Completion { id, object: "text_completion", created, model, choices, usage }
    }

    fn event(&self, next: Event) -> Bytes {
        let choice = match next {
            Event::Waiting => return KEEP_ALIVE,
            Event::Piece(index, Piece { text, tokens }) => {
                let logprobs = self.shows_logprobs.then(|| {
                    let mut logprobs = Logprobs::default();
                    logprobs.extend(&self.tokenizer, &tokens);
                    logprobs
                });
                Choice { text, index, logprobs, finish_reason: None }
            }
            Event::End(index, reason) => {
                Choice { text: String::new(), index, logprobs: None, finish_reason: Some(reason) }
            }
        };
        event(&self.completion(vec![choice], None))
    }
}

impl AnswerReply for CompletionAnswer {
    type Whole = Completion;

    async fn whole(mut self) -> Result<Completion, ApiError> {
        let mut choices = self.choices();
        while let Some(event) = self.next().await? {
            match event {
                Event::Waiting => {}
                Event::Piece(index, Piece { text, tokens }) => {
                    let choice = &mut choices[index as usize];
                    choice.text.push_str(&text);
                    if let Some(logprobs) = &mut choice.logprobs {
                        logprobs.extend(&self.tokenizer, &tokens);
                    }
                }
                Event::End(index, reason) => {
                    choices[index as usize].finish_reason = Some(reason);
                }
            }
        }
        Ok(self.completion(choices, Some(self.usage())))
    }

    async fn wait_for_first(&mut self) -> Result<(), ApiError> {
        self.answers[0].wait_for_first().await
    }

    fn first_events(&self) -> Bytes {
        if self.echoes.is_empty() {
            return Bytes::new();
        }
        let choices = self.choices().into_iter();
        let first = choices.map(|choice| event(&self.completion(vec![choice], None)));
        first.collect::<Vec<Bytes>>().concat().into()
    }

    async fn next_event(&mut self) -> Result<Option<Bytes>, ApiError> {
        let next = self.next().await?;
        Ok(next.map(|next| self.event(next)))
    }

    fn last_events(&self) -> Bytes {
        if !self.include_usage {
            return DONE;
        }
        [event(&self.completion(Vec::new(), Some(self.usage()))), DONE].concat().into()
    }
}

fn encode(served: &Served, prompt: &PromptText) -> Result<Vec<u32>, ApiError> {
    let ids = match prompt {
        PromptText::Text(text) => served.tokenizer.encode_prompt(text).map_err(|error| {
            let message = format!("Invalid value: {error}.");
            ApiError::new(ErrorCode::InvalidValue, message).with_param("prompt")
        })?,
        PromptText::Ids(ids) => ids.clone(),
    };
    let size = served.tokenizer.vocabulary_size();
    if let Some(id) = ids.iter().find(|id| **id as usize >= size) {
        let rule = format!("made of the model's tokens, from 0 to {}", size.saturating_sub(1));
        return Err(invalid_value("prompt", id, &rule));
    }
    if ids.is_empty() {
        return Err(invalid_value("prompt", "\"\"", "of one token at least"));
    }
    Ok(ids)
}
