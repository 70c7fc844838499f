//! Answers of models: a request is checked and turned into tokens, a sampler goes on from them, and
//! its tokens come back as text. OpenAI's contract on one side, [`tunesmith_core::serving`] on the
//! other.

mod answers;
mod chat;
mod chat_request;
mod completion;
mod completion_request;
mod format;
mod reply;
mod sampling_request;
mod text;
mod tools;
mod upstream;

pub(crate) use chat::{ChatCompletion, ChatCompletionChunk};
pub(crate) use chat_request::ChatRequest;
pub(crate) use completion::Completion;
pub(crate) use completion_request::{CompletionRequest, MAX_LOGPROBS};
pub(crate) use reply::{AnswerReply, AnswerRequest};
pub(crate) use sampling_request::{MAX_N, MAX_STOPS};

use crate::failure::Failure;
use crate::telemetry::Telemetry;
use crate::tokenizers::Tokenizers;
use bytes::Bytes;
use schemars::JsonSchema;
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tunesmith_core::dataset::{ChatTokenizer, TokenizerError};
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::hyperparameters::AdapterType;
use tunesmith_core::ids::{ProjectId, random_text};
use tunesmith_core::serving::{SAY_EVERY_SECONDS, TunedWeights};
use tunesmith_store::Store;
use tunesmith_store::base_models::BaseModel;
use tunesmith_store::models::Model;

/// A sampler that is there takes a connection at once.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A sampler that says nothing for so long is not there any more.
const SILENCE: Duration = Duration::from_secs(6 * SAY_EVERY_SECONDS);

/// What it takes to answer with models. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Serving {
    pub(crate) store: Store,
    pub(crate) tokenizers: Arc<Tokenizers>,
    pub(crate) model_aliases: Arc<BTreeMap<String, String>>,
    pub(crate) telemetry: Telemetry,
    http: reqwest::Client,
}

/// The model that a request names.
pub(crate) struct Served {
    /// As the client calls it.
    name: String,
    base: BaseModel,
    tuned: Option<TunedWeights>,
    tokenizer: Arc<ChatTokenizer>,
}

impl Serving {
    /// # Errors
    /// An HTTP client that cannot be made.
    pub(crate) fn new(
        store: Store,
        tokenizers: Arc<Tokenizers>,
        model_aliases: BTreeMap<String, String>,
        telemetry: Telemetry,
    ) -> reqwest::Result<Self> {
        let http = reqwest::Client::builder()
            // Samplers are neighbours, and their tokens are for them alone.
            .no_proxy()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(SILENCE)
            .build()?;
        let model_aliases = Arc::new(model_aliases);
        Ok(Self { store, tokenizers, model_aliases, telemetry, http })
    }

    /// The base model, tuned model or checkpoint that `project` calls by this name.
    ///
    /// # Errors
    /// `no_such_model`, also for one of another project, and those of the store.
    async fn model(&self, project: &ProjectId, name: &str) -> Result<Served, Failure> {
        let base_name = self.model_aliases.get(name).map_or(name, String::as_str);
        let (mut base, mut tuned) =
            self.store.base_or_tuned_model(project, base_name, name).await?;
        // A model that adapters go on is in memory once, for them and for itself.
        if let Some(model) = tuned.take_if(|tuned| tuned.adapter.kind == AdapterType::Full) {
            match self.store.known_tuned_base(&model.place).await? {
                Some(own) => base = own,
                None => tuned = Some(model),
            }
        }
        let tuned =
            tuned.map(|Model { place, adapter, .. }| TunedWeights { place, kind: adapter.kind });
        let tokenizer = self.tokenizers.of(&base).await??;
        Ok(Served { name: name.to_owned(), base, tuned, tokenizer })
    }
}

/// What a request and its answers took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub(crate) struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
    prompt_tokens_details: PromptTokensDetails,
}

/// What is worth knowing of a prompt's tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, JsonSchema)]
struct PromptTokensDetails {
    /// Those that an earlier request had left in the sampler's memory.
    cached_tokens: u64,
}

impl Usage {
    fn new(prompt_tokens: u64, completion_tokens: u64, cached_tokens: u64) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens },
        }
    }

    fn plus(self, other: Self) -> Self {
        Self::new(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.prompt_tokens_details.cached_tokens + other.prompt_tokens_details.cached_tokens,
        )
    }
}

/// Why an answer ended, in OpenAI's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FinishReason {
    /// The model said so, or a stop string came.
    Stop,
    /// As many tokens as were asked for, or as fit.
    Length,
    /// The model calls tools.
    ToolCalls,
}

/// What answers of all kinds begin with.
#[derive(Debug, Clone)]
struct Head {
    id: String,
    created: i64,
    model: String,
}

impl Head {
    fn new(prefix: &str, model: &str) -> Self {
        Self {
            id: format!("{prefix}{}", random_text(&mut rand::rng(), 29)),
            created: time::OffsetDateTime::now_utc().unix_timestamp(),
            model: model.to_owned(),
        }
    }
}

/// `400 unsupported_parameter`: what it asks for is not done here, and why.
fn unsupported(name: &str, why: &str) -> ApiError {
    ApiError::new(
        ErrorCode::UnsupportedParameter,
        format!("Unsupported parameter: '{name}'. {why}"),
    )
    .with_param(name)
}

fn tokenizer_failed(error: &TokenizerError) -> ApiError {
    ApiError::new(ErrorCode::Internal, format!("The answer cannot be turned into text: {error}."))
}

/// An event of a stream of server-sent events.
fn event(content: &impl Serialize) -> Bytes {
    let mut text = b"data: ".to_vec();
    // Answers have no map keys but text.
    let _ = serde_json::to_writer(&mut text, content);
    text.extend_from_slice(b"\n\n");
    text.into()
}

const DONE: Bytes = Bytes::from_static(b"data: [DONE]\n\n");
/// A comment, which no client takes for an event.
const KEEP_ALIVE: Bytes = Bytes::from_static(b": the model is not ready yet\n\n");
