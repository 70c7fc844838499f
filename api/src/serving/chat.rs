//! Chat completions: answers in a conversation, whole or as a stream of chunks.

use super::answers::{Answers, Event, Prompt};
use super::chat_request::ChatRequest;
use super::reply::AnswerReply;
use super::text::{AnswerToken, Piece};
use super::tools::{ToolCall, ToolReader};
use super::{DONE, FinishReason, Head, KEEP_ALIVE, Served, Serving, Usage, event};
use crate::failure::Failure;
use bytes::Bytes;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;
use std::collections::VecDeque;
use std::sync::Arc;
use tunesmith_core::dataset::{ChatTokenizer, TokenizerError};
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::ids::ProjectId;
use tunesmith_core::sampling::TokenLogprob;

/// A chat completion on the wire.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ChatCompletion {
    id: String,
    #[schemars(extend("const" = "chat.completion"))]
    object: &'static str,
    created: i64,
    model: String,
    choices: Vec<Choice>,
    usage: Usage,
}

#[derive(Debug, Serialize, JsonSchema)]
struct Choice {
    index: u32,
    message: AnswerMessage,
    logprobs: Option<Logprobs>,
    finish_reason: FinishReason,
}

#[derive(Debug, Serialize, JsonSchema)]
struct AnswerMessage {
    #[schemars(extend("const" = "assistant"))]
    role: &'static str,
    content: Option<String>,
    /// Always null.
    refusal: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall>,
}

/// The tokens of an answer and how probable each was.
#[derive(Debug, Default, Serialize, JsonSchema)]
struct Logprobs {
    content: Vec<ShownToken>,
    /// Always null.
    refusal: Option<Vec<ShownToken>>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct ShownToken {
    #[serde(flatten)]
    token: Alternative,
    top_logprobs: Vec<Alternative>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct Alternative {
    /// Its text; for a part of a character, its bytes in hexadecimal.
    token: String,
    /// Natural logarithm of the probability that the model gave it.
    logprob: f32,
    bytes: Vec<u8>,
}

/// A chunk of a stream.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ChatCompletionChunk {
    id: String,
    #[schemars(extend("const" = "chat.completion.chunk"))]
    object: &'static str,
    created: i64,
    model: String,
    choices: Vec<ChunkChoice>,
    /// With the last chunk, where it is asked for.
    usage: Option<Usage>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct ChunkChoice {
    index: u32,
    delta: Delta,
    logprobs: Option<Logprobs>,
    finish_reason: Option<FinishReason>,
}

#[derive(Debug, Default, Serialize, JsonSchema)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<CallDelta>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct CallDelta {
    index: u32,
    #[serde(flatten)]
    call: ToolCall,
}

/// What happens to the answers of a conversation.
enum ChatEvent {
    Waiting,
    Text { index: u32, text: String, tokens: Vec<AnswerToken> },
    Calls { index: u32, calls: Vec<ToolCall> },
    End { index: u32, reason: FinishReason },
}

/// The answers to a conversation.
pub(crate) struct ChatAnswer {
    head: Head,
    tokenizer: Arc<ChatTokenizer>,
    answers: Answers,
    /// Where tools may be called, what reads the calls of each answer.
    readers: Vec<Option<ToolReader>>,
    ready: VecDeque<ChatEvent>,
    n: u32,
    shows_logprobs: bool,
    parallel_calls: bool,
    include_usage: bool,
}

impl ChatAnswer {
    /// Asks a sampler.
    ///
    /// # Errors
    /// `no_such_model`, `invalid_value` for a conversation that the model's template refuses,
    /// `context_length_exceeded`, and those of asking a sampler.
    pub(super) async fn begin(
        serving: &Serving,
        project: &ProjectId,
        request: &ChatRequest,
        low_priority: bool,
    ) -> Result<Self, Failure> {
        let served = serving.model(project, &request.model).await?;
        let (ids, stop_ids) = encode(&served, request).await?;
        let asked = &request.asked;
        let mut sampling = asked.sampling(&served, ids.len(), None, "messages", stop_ids)?;
        sampling.top_logprobs = request.top_logprobs.unwrap_or(0);
        sampling.json_schema = request.json_schema.clone();
        let (n, stops) = (asked.n, asked.stops.clone());
        let prompt = Prompt { ids, n, sampling, stops, goes_on: false, low_priority };
        let names = request.tools.as_ref().map(|_| request.tool_names());
        let reader = || names.clone().map(ToolReader::new);
        Ok(Self {
            head: Head::new("chatcmpl-", &served.name),
            answers: Answers::begin(serving, &served, prompt).await?,
            tokenizer: served.tokenizer,
            readers: (0..n).map(|_| reader()).collect(),
            ready: VecDeque::new(),
            n,
            shows_logprobs: request.top_logprobs.is_some(),
            parallel_calls: request.parallel_calls,
            include_usage: asked.include_usage,
        })
    }

    async fn next(&mut self) -> Result<Option<ChatEvent>, ApiError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            match self.answers.next().await? {
                None => return Ok(None),
                Some(Event::Waiting) => return Ok(Some(ChatEvent::Waiting)),
                Some(Event::Piece(index, Piece { text, tokens })) => {
                    let text = match &mut self.readers[index as usize] {
                        Some(reader) => reader.push(&text),
                        None => text,
                    };
                    self.show(index, text, tokens);
                }
                Some(Event::End(index, reason)) => self.end(index, reason),
            }
        }
    }

    fn show(&mut self, index: u32, text: String, tokens: Vec<AnswerToken>) {
        if !text.is_empty() || (self.shows_logprobs && !tokens.is_empty()) {
            self.ready.push_back(ChatEvent::Text { index, text, tokens });
        }
    }

    fn end(&mut self, index: u32, mut reason: FinishReason) {
        if let Some(reader) = &mut self.readers[index as usize] {
            let (text, mut calls) = reader.finish();
            self.show(index, text, Vec::new());
            if !calls.is_empty() {
                if !self.parallel_calls {
                    calls.truncate(1);
                }
                if reason == FinishReason::Stop {
                    reason = FinishReason::ToolCalls;
                }
                self.ready.push_back(ChatEvent::Calls { index, calls });
            }
        }
        self.ready.push_back(ChatEvent::End { index, reason });
    }

    fn event(&self, next: ChatEvent) -> Bytes {
        match next {
            ChatEvent::Waiting => KEEP_ALIVE,
            ChatEvent::Text { index, text, tokens } => {
                let mut chunk =
                    self.chunk(index, Delta { content: Some(text), ..Delta::default() }, None);
                if self.shows_logprobs {
                    let content = shown(&self.tokenizer, &tokens);
                    chunk.choices[0].logprobs = Some(Logprobs { content, refusal: None });
                }
                event(&chunk)
            }
            ChatEvent::Calls { index, calls } => {
                let calls = calls.into_iter().zip(0..);
                let tool_calls = calls.map(|(call, index)| CallDelta { index, call }).collect();
                event(&self.chunk(index, Delta { tool_calls, ..Delta::default() }, None))
            }
            ChatEvent::End { index, reason } => {
                event(&self.chunk(index, Delta::default(), Some(reason)))
            }
        }
    }

    fn chunk(
        &self,
        index: u32,
        delta: Delta,
        finish_reason: Option<FinishReason>,
    ) -> ChatCompletionChunk {
        let Head { id, created, model } = self.head.clone();
        let choice = ChunkChoice { index, delta, logprobs: None, finish_reason };
        ChatCompletionChunk {
            id,
            object: "chat.completion.chunk",
            created,
            model,
            choices: vec![choice],
            usage: None,
        }
    }
}

impl AnswerReply for ChatAnswer {
    type Whole = ChatCompletion;

    async fn whole(mut self) -> Result<ChatCompletion, ApiError> {
        let choice = |index| Choice {
            index,
            message: AnswerMessage {
                role: "assistant",
                content: None,
                refusal: None,
                tool_calls: Vec::new(),
            },
            logprobs: self.shows_logprobs.then(Logprobs::default),
            finish_reason: FinishReason::Stop,
        };
        let mut choices: Vec<Choice> = (0..self.n).map(choice).collect();
        while let Some(event) = self.next().await? {
            match event {
                ChatEvent::Waiting => {}
                ChatEvent::Text { index, text, tokens } => {
                    let choice = &mut choices[index as usize];
                    choice.message.content.get_or_insert_default().push_str(&text);
                    if let Some(logprobs) = &mut choice.logprobs {
                        logprobs.content.extend(shown(&self.tokenizer, &tokens));
                    }
                }
                ChatEvent::Calls { index, calls } => {
                    let message = &mut choices[index as usize].message;
                    message.tool_calls = calls;
                    message.content.take_if(|content| content.is_empty());
                }
                ChatEvent::End { index, reason } => {
                    let choice = &mut choices[index as usize];
                    choice.finish_reason = reason;
                    if choice.message.tool_calls.is_empty() {
                        choice.message.content.get_or_insert_default();
                    }
                }
            }
        }
        let Head { id, created, model } = self.head.clone();
        let usage = self.answers.usage();
        Ok(ChatCompletion { id, object: "chat.completion", created, model, choices, usage })
    }

    async fn wait_for_first(&mut self) -> Result<(), ApiError> {
        self.answers.wait_for_first().await
    }

    fn first_events(&self) -> Bytes {
        let mut first = Vec::new();
        for index in 0..self.n {
            let (role, content) = (Some("assistant"), Some(String::new()));
            let delta = Delta { role, content, tool_calls: Vec::new() };
            first.extend_from_slice(&event(&self.chunk(index, delta, None)));
        }
        first.into()
    }

    async fn next_event(&mut self) -> Result<Option<Bytes>, ApiError> {
        let next = self.next().await?;
        Ok(next.map(|next| self.event(next)))
    }

    fn last_events(&self) -> Bytes {
        if !self.include_usage {
            return DONE;
        }
        let mut chunk = self.chunk(0, Delta::default(), None);
        chunk.choices.clear();
        chunk.usage = Some(self.answers.usage());
        [event(&chunk), DONE].concat().into()
    }
}

/// The conversation as tokens, and those at which an answer ends.
async fn encode(served: &Served, request: &ChatRequest) -> Result<(Vec<u32>, Vec<u32>), Failure> {
    let tokenizer = Arc::clone(&served.tokenizer);
    let (messages, tools): (_, Option<Value>) = (request.messages.clone(), request.tools.clone());
    // A long conversation takes a moment, which the requests of others need not wait for.
    let encoded = tokio::task::spawn_blocking(move || {
        let ids = tokenizer.encode_chat(&messages, tools.as_ref(), true)?;
        Ok::<_, TokenizerError>((ids, tokenizer.turn_end_ids()))
    });
    let encoded = encoded.await.map_err(Failure::internal)?;
    let encoded = encoded.map_err(|error| {
        let (message, param) = match error {
            TokenizerError::NoChatTemplate => (
                format!(
                    "The model '{}' has no chat template, so it answers no conversations: use \
                     /v1/completions.",
                    served.name
                ),
                "model",
            ),
            other => (format!("Invalid value: {other}."), "messages"),
        };
        ApiError::new(ErrorCode::InvalidValue, message).with_param(param)
    })?;
    if encoded.0.is_empty() {
        let message = "Invalid value: the model's chat template makes nothing of the messages.";
        return Err(ApiError::new(ErrorCode::InvalidValue, message).with_param("messages").into());
    }
    Ok(encoded)
}

fn shown(tokenizer: &ChatTokenizer, tokens: &[AnswerToken]) -> Vec<ShownToken> {
    let shown = |token: &AnswerToken| ShownToken {
        token: alternative(tokenizer, token.token),
        top_logprobs: token.top.iter().map(|top| alternative(tokenizer, *top)).collect(),
    };
    tokens.iter().map(shown).collect()
}

fn alternative(tokenizer: &ChatTokenizer, token: TokenLogprob) -> Alternative {
    let bytes = tokenizer.token_bytes(token.id);
    Alternative { token: token_text(&bytes), logprob: token.logprob, bytes }
}

/// A token's text; where its bytes are a part of a character, they are spelled, as OpenAI does.
pub(super) fn token_text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            let spelled: String = bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
            format!("bytes:{spelled}")
        }
    }
}
