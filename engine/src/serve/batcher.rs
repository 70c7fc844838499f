//! Many answers at a time over one base model.
//!
//! Each step computes one token of every running answer in one pass: the base model's matrices are
//! read once for all, whichever adapter each answer is computed with. Between two steps short
//! prompts, or a part of a long one, are computed in one pass, so that a long prompt delays nobody
//! for long, and an answer that ends makes room at once for the next request (continuous batching,
//! Yu et al. 2022).

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;
use tunesmith_core::errors::ErrorCode;
use tunesmith_core::sampling::{EndReason, FromSampler, SampleRequest, Sampling};

use super::choice::{Choice, Chooser, NotNumbers};
use super::constraint::{Constraint, Constraints};
use super::model::ServedModel;
use super::prefixes::{Prefixes, same};
use crate::error::EngineError;
use crate::models::decoder::{Adaptation, KeyValueCache, Sequence};

/// Tokens of prompts that are computed between two steps.
const PROMPT_PART: usize = 256;

/// Answers requests over one base model.
#[derive(Debug)]
pub struct Batcher {
    model: ServedModel,
    adapters: HashMap<String, Arc<Adaptation>>,
    /// Requests in the order of their arrival, those of low priority apart.
    waiting: [VecDeque<Waiting>; 2],
    /// In the order in which they were admitted.
    reading: VecDeque<Reading>,
    /// Neighbours share an adapter where any two do.
    answers: Vec<Answer>,
    prefixes: Prefixes,
    constraints: Constraints,
    max_answers: usize,
    /// Tokens whose keys and values fit into memory.
    max_tokens: usize,
}

/// A request that nothing was done for yet.
#[derive(Debug)]
struct Waiting {
    request: SampleRequest,
    /// As it was when the request came.
    adaptation: Option<Arc<Adaptation>>,
    constraint: Option<Constraint>,
}

/// A request whose prompt is being computed.
#[derive(Debug)]
struct Reading {
    request: SampleRequest,
    adaptation: Option<Arc<Adaptation>>,
    constraint: Option<Constraint>,
    cache: KeyValueCache,
    cached_tokens: u32,
}

impl Reading {
    /// What of the prompt the next pass computes.
    fn part(&self) -> Range<usize> {
        let done = self.cache.tokens();
        done..self.request.prompt.len().min(done + PROMPT_PART)
    }
}

/// An answer that grows.
#[derive(Debug)]
struct Answer {
    id: u64,
    index: u32,
    adaptation: Option<Arc<Adaptation>>,
    /// The prompt and the answer so far; the cache lacks the last one.
    ids: Vec<u32>,
    cache: KeyValueCache,
    /// Where the answer ends at the latest, in tokens with the prompt.
    limit: usize,
    chooser: Chooser,
    constraint: Option<Constraint>,
    cached_tokens: u32,
}

impl Answer {
    /// Tokens for which it may take room in the cache.
    fn room(&self) -> usize {
        KeyValueCache::room_of(self.limit)
    }
}

/// Why an answer cannot go on.
#[derive(Debug)]
enum Stuck {
    /// The logits are not numbers.
    NotNumbers,
    /// What it must become cannot be computed any further.
    Constraint(String),
}

/// A token, and whether it completes what the answer must become.
type Chosen = Result<(Choice, bool), Stuck>;

impl Answer {
    /// Chooses its next token.
    fn choose(&mut self, logits: &[f32]) -> Chosen {
        let Some(constraint) = &mut self.constraint else {
            let choice = self.chooser.choose(logits, None).map_err(|NotNumbers| Stuck::NotNumbers);
            return Ok((choice?, false));
        };
        let allowed = constraint.allowed().map_err(Stuck::Constraint)?;
        let choice = self.chooser.choose(logits, Some(&allowed));
        let choice = choice.map_err(|NotNumbers| Stuck::NotNumbers)?;
        let is_complete = constraint.push(choice.token.id).map_err(Stuck::Constraint)?;
        Ok((choice, is_complete))
    }
}

/// Where among `others` one with an adapter belongs, so that neighbours share theirs where any two
/// do and are multiplied by it together.
fn place_beside<'a>(
    others: impl ExactSizeIterator<Item = &'a Option<Arc<Adaptation>>> + DoubleEndedIterator,
    adaptation: &Option<Arc<Adaptation>>,
) -> usize {
    let end = others.len();
    others.rev().position(|other| same(other, adaptation)).map_or(end, |behind| end - behind)
}

/// What is said to the sampler.
type Sink<'a> = &'a mut dyn FnMut(FromSampler);

impl Batcher {
    /// Answers with `model`, up to `max_answers` at a time, while their keys and values and those
    /// of earlier prompts take `cache_bytes` at most.
    #[must_use]
    pub fn new(model: ServedModel, max_answers: usize, cache_bytes: usize) -> Self {
        let max_tokens = cache_bytes / model.cache_bytes_per_token().max(1);
        let constraints = Constraints::new(model.dir().to_owned());
        Self {
            model,
            adapters: HashMap::new(),
            waiting: Default::default(),
            reading: VecDeque::new(),
            answers: Vec::new(),
            prefixes: Prefixes::default(),
            constraints,
            max_answers,
            max_tokens,
        }
    }

    /// Reads the PEFT adapter in `dir` and keeps it as `name`.
    ///
    /// # Errors
    /// An adapter that does not fit the model, or that cannot be read.
    pub fn load_adapter(&mut self, name: String, dir: &Path) -> Result<(), EngineError> {
        let adaptation = self.model.read_adapter(dir)?;
        self.unload_adapter(&name);
        self.adapters.insert(name, Arc::new(adaptation));
        Ok(())
    }

    /// Forgets an adapter; answers that run with it go on.
    pub fn unload_adapter(&mut self, name: &str) {
        if let Some(adaptation) = self.adapters.remove(name) {
            self.prefixes.forget(&adaptation);
        }
    }

    /// Takes a request, or says at once why not.
    pub fn submit(&mut self, request: SampleRequest, sink: Sink<'_>) {
        let checked = self.check(&request).and_then(|adaptation| {
            let Sampling { json_schema, stop_ids, .. } = &request.sampling;
            let schema = json_schema.as_ref();
            let constraint = schema.map(|schema| self.constraints.of(schema, stop_ids));
            Ok((adaptation, constraint.transpose()?))
        });
        match checked {
            Ok((adaptation, constraint)) => {
                let queue = &mut self.waiting[usize::from(request.low_priority)];
                queue.push_back(Waiting { request, adaptation, constraint });
            }
            Err(message) => {
                sink(FromSampler::Failed {
                    id: request.id,
                    code: ErrorCode::InvalidValue,
                    message,
                });
            }
        }
    }

    /// The adapter of a request that can be answered.
    fn check(&self, request: &SampleRequest) -> Result<Option<Arc<Adaptation>>, String> {
        let (context, vocabulary) = (self.model.context_length(), self.model.vocab_size());
        if request.prompt.is_empty() {
            return Err("The prompt has no token.".to_owned());
        }
        if request.prompt.len() >= context {
            return Err(format!(
                "The prompt has {} tokens, and the model's context of {context} leaves none for an \
                 answer: shorten the prompt.",
                request.prompt.len()
            ));
        }
        if let Some(id) = request.prompt.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(format!(
                "Token id {id} lies outside of the model's vocabulary of {vocabulary}."
            ));
        }
        let adaptation = match &request.adapter {
            None => None,
            Some(name) => match self.adapters.get(name) {
                Some(adaptation) => Some(Arc::clone(adaptation)),
                None => return Err(format!("The adapter {name} is not loaded.")),
            },
        };
        if request.n == 0 || request.n as usize > self.max_answers {
            return Err(format!("n is {}: use 1 to {}.", request.n, self.max_answers));
        }
        let tokens = self.tokens_of(request);
        if tokens > self.max_tokens {
            return Err(format!(
                "{} answers to a prompt of {} tokens need room for the keys and values of \
                 {tokens} tokens, and this sampler has it for {}: lower n or max_tokens, or start \
                 the sampler with more cache.",
                request.n,
                request.prompt.len(),
                self.max_tokens
            ));
        }
        Ok(adaptation)
    }

    /// Tokens of each answer at most, with the prompt.
    fn limit_of(&self, request: &SampleRequest) -> usize {
        let asked = request.prompt.len().saturating_add(request.sampling.max_tokens as usize);
        asked.min(self.model.context_length())
    }

    /// Tokens for which a request's answers may take room in the cache.
    fn tokens_of(&self, request: &SampleRequest) -> usize {
        KeyValueCache::room_of(self.limit_of(request)) * request.n as usize
    }

    /// Forgets a request.
    pub fn cancel(&mut self, id: u64) {
        for waiting in &mut self.waiting {
            waiting.retain(|waiting| waiting.request.id != id);
        }
        self.reading.retain(|reading| reading.request.id != id);
        let (ended, running) =
            std::mem::take(&mut self.answers).into_iter().partition(|answer| answer.id == id);
        self.answers = running;
        for answer in ended {
            self.keep(answer);
        }
    }

    /// Whether there is nothing to do until the next request.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.answers.is_empty()
            && self.reading.is_empty()
            && self.waiting.iter().all(VecDeque::is_empty)
    }

    /// Computes waiting prompts, or a part of one, and the next token of every running answer.
    ///
    /// # Errors
    /// [`EngineError::Device`] when the device fails: nothing goes on then.
    pub fn step(&mut self, sink: Sink<'_>) -> Result<(), EngineError> {
        while self.reading.iter().map(|reading| reading.part().len()).sum::<usize>() < PROMPT_PART
            && self.admit()
        {}
        self.read_prompts(sink)?;
        self.extend_answers(sink)
    }

    /// Begins with the next request; false where there is none, or no room for it.
    fn admit(&mut self) -> bool {
        let Some(queue) = self.waiting.iter().position(|queue| !queue.is_empty()) else {
            return false;
        };
        let request = &self.waiting[queue][0].request;
        let reading = self.reading.iter().map(|reading| &reading.request);
        let answers: u32 = reading.clone().chain([request]).map(|request| request.n).sum();
        let running: usize = self.answers.iter().map(Answer::room).sum();
        let tokens = running
            + reading.chain([request]).map(|request| self.tokens_of(request)).sum::<usize>();
        if self.answers.len() + answers as usize > self.max_answers || tokens > self.max_tokens {
            return false;
        }
        self.prefixes.shrink_to(self.max_tokens - tokens);
        let Some(waiting) = self.waiting[queue].pop_front() else { return false };
        let Waiting { request, adaptation, constraint } = waiting;
        let cache = self.prefixes.find(&adaptation, &request.prompt);
        let cached_tokens = cache.tokens() as u32;
        self.reading.push_back(Reading { request, adaptation, constraint, cache, cached_tokens });
        true
    }

    /// Computes the first prompts that go together, or the next part of the first one.
    fn read_prompts(&mut self, sink: Sink<'_>) -> Result<(), EngineError> {
        let mut tokens = 0;
        let together = self.reading.iter().take_while(|reading| {
            tokens += reading.part().len();
            tokens <= PROMPT_PART
        });
        let count = together.count().max(1).min(self.reading.len());
        let mut readings: Vec<Reading> = Vec::with_capacity(count);
        for reading in self.reading.drain(..count) {
            let others = readings.iter().map(|other| &other.adaptation);
            readings.insert(place_beside(others, &reading.adaptation), reading);
        }
        if readings.is_empty() {
            return Ok(());
        }
        let mut sequences: Vec<Sequence<'_>> = readings
            .iter_mut()
            .map(|reading| {
                let part = reading.part();
                let Reading { request, adaptation, cache, .. } = reading;
                let adaptation = adaptation.as_deref();
                Sequence { ids: &request.prompt[part], cache, adaptation }
            })
            .collect();
        let logits = self.model.extend(&mut sequences)?;
        let logits = logits.chunks_exact(self.model.vocab_size());
        for (reading, logits) in readings.into_iter().zip(logits) {
            if reading.part().is_empty() {
                self.begin_answers(reading, logits, sink);
            } else {
                // It filled the pass.
                self.reading.push_front(reading);
            }
        }
        Ok(())
    }

    /// The answers to a prompt that was read, the logits after which are `logits`.
    fn begin_answers(&mut self, reading: Reading, logits: &[f32], sink: Sink<'_>) {
        let Reading { request, adaptation, constraint, cache, cached_tokens } = reading;
        let limit = self.limit_of(&request);
        // The last one takes the cache over, and with one answer nothing is copied.
        let copies = std::iter::repeat_n(cache, request.n as usize);
        for (index, cache) in (0..).zip(copies) {
            let mut answer = Answer {
                id: request.id,
                index,
                adaptation: adaptation.clone(),
                ids: request.prompt.clone(),
                cache,
                limit,
                chooser: Chooser::new(request.sampling.clone(), index),
                constraint: constraint.clone(),
                cached_tokens,
            };
            let chosen = answer.choose(logits);
            if !self.append(answer, chosen, sink) {
                break;
            }
        }
    }

    fn extend_answers(&mut self, sink: Sink<'_>) -> Result<(), EngineError> {
        if self.answers.is_empty() {
            return Ok(());
        }
        let mut sequences: Vec<Sequence<'_>> = self
            .answers
            .iter_mut()
            .map(|Answer { ids, cache, adaptation, .. }| Sequence {
                ids: &ids[ids.len() - 1..],
                cache,
                adaptation: adaptation.as_deref(),
            })
            .collect();
        let logits = self.model.extend(&mut sequences)?;
        let answers = std::mem::take(&mut self.answers);
        let chosen: Vec<(Answer, Chosen)> = answers
            .into_par_iter()
            .zip(logits.par_chunks_exact(self.model.vocab_size()))
            .map(|(mut answer, logits)| {
                let chosen = answer.choose(logits);
                (answer, chosen)
            })
            .collect();
        let mut failed = Vec::new();
        for (answer, chosen) in chosen {
            let id = answer.id;
            if !failed.contains(&id) && !self.append(answer, chosen, sink) {
                failed.push(id);
            }
        }
        self.answers.retain(|answer| !failed.contains(&answer.id));
        Ok(())
    }

    /// Says what was chosen, and lets the answer run on or ends it. False where the whole request
    /// came to nothing.
    fn append(&mut self, mut answer: Answer, chosen: Chosen, sink: Sink<'_>) -> bool {
        let (id, index) = (answer.id, answer.index);
        let (Choice { token, top }, is_complete) = match chosen {
            Ok(chosen) => chosen,
            Err(stuck) => {
                let (code, message) = match stuck {
                    Stuck::NotNumbers => {
                        let message = "The model's logits are not numbers: its weights, or those of \
                                       its adapter, are damaged.";
                        (ErrorCode::Internal, message.to_owned())
                    }
                    Stuck::Constraint(message) => (ErrorCode::InvalidValue, message),
                };
                sink(FromSampler::Failed { id, code, message });
                return false;
            }
        };
        let cached_tokens = answer.cached_tokens;
        let end = |reason| FromSampler::End { id, index, reason, cached_tokens };
        if answer.chooser.sampling().stop_ids.contains(&token.id) {
            sink(end(EndReason::Stop));
            self.keep(answer);
            return true;
        }
        sink(FromSampler::Token { id, index, token, top });
        answer.ids.push(token.id);
        let reason = match is_complete {
            true => Some(EndReason::Stop),
            false => (answer.ids.len() >= answer.limit).then_some(EndReason::Length),
        };
        if let Some(reason) = reason {
            sink(end(reason));
            self.keep(answer);
            return true;
        }
        let others = self.answers.iter().map(|other| &other.adaptation);
        self.answers.insert(place_beside(others, &answer.adaptation), answer);
        true
    }

    /// Keeps the cache of an answer that has ended for prompts that begin like it.
    fn keep(&mut self, answer: Answer) {
        let Answer { adaptation, ids, cache, .. } = answer;
        let is_loaded = adaptation
            .as_ref()
            .is_none_or(|ours| self.adapters.values().any(|other| Arc::ptr_eq(ours, other)));
        if is_loaded {
            self.prefixes.keep(adaptation, ids, cache);
            let running: usize = self.answers.iter().map(Answer::room).sum();
            self.prefixes.shrink_to(self.max_tokens.saturating_sub(running));
        }
    }
}
