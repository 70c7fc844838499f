//! The answers to one prompt, as text that grows.

use super::text::{AnswerText, Piece};
use super::upstream::Upstream;
use super::{FinishReason, Served, Serving, Usage, tokenizer_failed};
use crate::failure::Failure;
use crate::telemetry::Telemetry;
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use tunesmith_core::errors::ApiError;
use tunesmith_core::sampling::{EndReason, Sampling};
use tunesmith_core::serving::{SampleLine, SampleOrder};

/// So long a streamed reply waits for its first word, so that what goes wrong before it gets a
/// status of its own. A model that is loaded meanwhile takes longer: its reply begins with comments.
const FIRST_WAIT: Duration = Duration::from_secs(10);

/// What happens to the answers.
#[derive(Debug)]
pub(super) enum Event {
    /// Nothing yet.
    Waiting,
    /// The answer `index` has grown.
    Piece(u32, Piece),
    /// It is complete.
    End(u32, FinishReason),
}

/// A prompt and how to go on from it.
pub(super) struct Prompt {
    pub(super) ids: Vec<u32>,
    pub(super) n: u32,
    pub(super) sampling: Sampling,
    pub(super) stops: Vec<String>,
    /// Whether the answers' text goes on from the prompt's.
    pub(super) goes_on: bool,
    pub(super) low_priority: bool,
}

/// The answers to one prompt. Dropping them gives up on those that are not complete.
pub(super) struct Answers {
    upstream: Upstream,
    /// None for those that are complete.
    texts: Vec<Option<AnswerText>>,
    ready: VecDeque<Event>,
    prompt_tokens: u64,
    completion_tokens: u64,
    cached_tokens: u64,
    begun: Instant,
    has_begun: bool,
    telemetry: Telemetry,
}

impl Answers {
    /// Asks a sampler.
    ///
    /// # Errors
    /// Those of [`Serving::order`].
    pub(super) async fn begin(
        serving: &Serving,
        served: &Served,
        prompt: Prompt,
    ) -> Result<Self, Failure> {
        let begun = Instant::now();
        let Prompt { ids, n, sampling, stops, goes_on, low_priority } = prompt;
        let after = goes_on.then_some(ids.as_slice());
        let stops = stops.into();
        let text =
            || AnswerText::new(served.tokenizer.clone(), after, std::sync::Arc::clone(&stops));
        let texts = (0..n).map(|_| Some(text())).collect();
        let order = SampleOrder {
            base_model: served.base.id.clone(),
            tuned: served.tuned.clone(),
            prompt: ids,
            n,
            sampling,
            low_priority,
        };
        Ok(Self {
            upstream: serving.order(&served.name, &order).await?,
            texts,
            ready: VecDeque::new(),
            prompt_tokens: order.prompt.len() as u64,
            completion_tokens: 0,
            cached_tokens: 0,
            begun,
            has_begun: false,
            telemetry: serving.telemetry.clone(),
        })
    }

    /// Waits for the first event for a while; it is kept for [`next`](Self::next).
    ///
    /// # Errors
    /// What goes wrong before it.
    pub(super) async fn wait_for_first(&mut self) -> Result<(), ApiError> {
        let first = async {
            loop {
                match self.next().await? {
                    Some(Event::Waiting) => {}
                    event => return Ok::<_, ApiError>(event),
                }
            }
        };
        match tokio::time::timeout(FIRST_WAIT, first).await {
            Ok(event) => {
                if let Some(event) = event? {
                    self.ready.push_front(event);
                }
            }
            Err(_elapsed) => {}
        }
        Ok(())
    }

    /// What happens next; none when all answers are complete. May be dropped and called again.
    ///
    /// # Errors
    /// What the sampler says, or that it is gone.
    pub(super) async fn next(&mut self) -> Result<Option<Event>, ApiError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            if self.texts.iter().all(Option::is_none) {
                return Ok(None);
            }
            let line = self.upstream.next().await?;
            self.take(line)?;
        }
    }

    fn take(&mut self, line: SampleLine) -> Result<(), ApiError> {
        match line {
            SampleLine::Waiting => self.ready.push_back(Event::Waiting),
            SampleLine::Failed { error } => return Err(error),
            SampleLine::Token { index, token, top } => {
                // One that a stop string has ended may go on in the sampler.
                let Some(Some(text)) = self.texts.get_mut(index as usize) else { return Ok(()) };
                self.completion_tokens += 1;
                if !self.has_begun {
                    self.has_begun = true;
                    self.telemetry.observe_first_token(self.begun.elapsed());
                }
                let (piece, stopped) = text.push(token, top).map_err(|e| tokenizer_failed(&e))?;
                self.show(index, piece);
                if stopped {
                    self.end(index, FinishReason::Stop);
                }
            }
            SampleLine::End { index, reason, cached_tokens } => {
                self.cached_tokens = self.cached_tokens.max(u64::from(cached_tokens));
                let Some(Some(text)) = self.texts.get_mut(index as usize) else { return Ok(()) };
                let piece = text.finish().map_err(|error| tokenizer_failed(&error))?;
                self.show(index, piece);
                self.end(
                    index,
                    match reason {
                        EndReason::Stop => FinishReason::Stop,
                        EndReason::Length => FinishReason::Length,
                    },
                );
            }
        }
        Ok(())
    }

    fn show(&mut self, index: u32, piece: Piece) {
        if !piece.is_empty() {
            self.ready.push_back(Event::Piece(index, piece));
        }
    }

    fn end(&mut self, index: u32, reason: FinishReason) {
        self.texts[index as usize] = None;
        self.ready.push_back(Event::End(index, reason));
    }

    /// What it took so far.
    pub(super) fn usage(&self) -> Usage {
        Usage::new(self.prompt_tokens, self.completion_tokens, self.cached_tokens)
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        let Self { prompt_tokens, completion_tokens, cached_tokens, .. } = *self;
        self.telemetry.count_tokens(prompt_tokens, cached_tokens, completion_tokens);
    }
}
