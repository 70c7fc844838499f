//! Works batches off: reads the file of requests, answers each, and writes the files of answers.
//!
//! Any number of processes may do this side by side: a claim keeps a batch to one of them for a
//! minute at a time, and who takes up what another has left begins it anew. Nothing of a batch is in
//! memory but the names of its requests and those that are being answered.

mod lines;
mod request;

use crate::background::{Work, work_off_until};
use crate::failure::{Failure, invalid_value, wire};
use crate::serving::{AnswerReply as _, AnswerRequest, ChatRequest, CompletionRequest, Serving};
use bytes::Bytes;
use futures::{TryStreamExt as _, stream};
use lines::Lines;
use request::Request;
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tunesmith_core::errors::ErrorCode;
use tunesmith_core::ids::{FileId, random_text};
use tunesmith_store::batches::{Batch, BatchError, BatchFile, BatchResult};
use tunesmith_store::notify::Channel;
use tunesmith_store::objects::{ObjectKey, Stored};
use tunesmith_store::{Store, StoreError};

/// OpenAI's limits.
const MAX_REQUESTS: usize = 50_000;
pub(crate) const MAX_INPUT_BYTES: u64 = 200 << 20;
/// So many mistakes are told; more of them help nobody.
const MAX_ERRORS: usize = 100;
/// A notification may be lost: look this often without one.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// How often a claim is renewed; well within the minute that it lasts.
const RENEW_EVERY: Duration = Duration::from_secs(15);
/// Requests of a batch that are answered side by side.
const AT_ONCE: usize = 16;
/// When a request is sent again that nobody can answer for now.
const AGAIN_AFTER: Duration = Duration::from_secs(2);
/// How often a request may break a sampler down.
const MAX_TRIES: u32 = 3;
/// The other endpoint is that of completions.
const CHAT: &str = "/v1/chat/completions";

/// Works until `stopped` turns true.
pub(crate) async fn run(serving: Serving, stopped: watch::Receiver<bool>) {
    work_off_until(&Batches { serving }, stopped).await;
}

struct Batches {
    serving: Serving,
}

impl Work for Batches {
    const CHANNEL: Channel = Channel::Batches;
    const NAME: &str = "working batches off";

    fn store(&self) -> &Store {
        &self.serving.store
    }

    async fn next(&self) -> Result<Option<Duration>, StoreError> {
        let claimed = self.serving.store.claim_batch().await?;
        let Some(batch) = claimed else { return Ok(Some(LOOK_EVERY)) };
        work(&self.serving, &batch).await?;
        Ok(None)
    }
}

/// Works one batch off; being given up meanwhile is no error.
async fn work(serving: &Serving, batch: &Batch) -> Result<(), StoreError> {
    let store = &serving.store;
    let worked = async {
        match check(store, batch).await? {
            Err(errors) => store.fail_batch(&batch.id, &errors).await,
            Ok(checked) => {
                store.begin_batch(&batch.id, checked.total, checked.model.as_deref()).await?;
                answer_all(serving, batch).await
            }
        }
    };
    match worked.await {
        Err(StoreError::BatchEnded { .. }) => Ok(()),
        other => other,
    }
}

/// A file in order.
struct Checked {
    total: u64,
    /// The model, if all requests name the same.
    model: Option<String>,
}

/// Reads the whole file; the inner error is what is wrong with it.
async fn check(
    store: &Store,
    batch: &Batch,
) -> Result<Result<Checked, Vec<BatchError>>, StoreError> {
    let mut lines = match open(store, batch).await {
        Ok(lines) => lines,
        Err(StoreError::NotFound { .. }) => {
            return Ok(Err(vec![mistake("input_file_gone", "The input file is gone.", None)]));
        }
        Err(other) => return Err(other),
    };
    let mut claim = Claim::new(store, batch);
    let (mut errors, mut seen, mut models) = (Vec::new(), HashSet::new(), HashSet::new());
    while errors.len() < MAX_ERRORS {
        claim.keep(Counts::default()).await?;
        let Some((number, line)) = lines.next().await? else { break };
        match Request::parse(&line, &batch.endpoint) {
            Ok(None) => {}
            Ok(Some(_)) if seen.len() == MAX_REQUESTS => {
                let message = format!("The file has more than {MAX_REQUESTS} requests.");
                errors.push(mistake("too_many_requests", &message, Some(number)));
                break;
            }
            Ok(Some(request)) => {
                models.insert(request.model);
                if let Some(twice) = seen.replace(request.custom_id) {
                    let message = format!("The custom_id {twice} stands on an earlier line too.");
                    errors.push(mistake("duplicate_custom_id", &message, Some(number)));
                }
            }
            Err(error) => errors.push(BatchError { line: Some(number), ..error }),
        }
    }
    if errors.is_empty() && seen.is_empty() {
        errors.push(mistake("empty_file", "The file has no requests.", None));
    }
    if !errors.is_empty() {
        return Ok(Err(errors));
    }
    let model = if models.len() == 1 { models.into_iter().next() } else { None };
    Ok(Ok(Checked { total: seen.len() as u64, model }))
}

fn mistake(code: &str, message: &str, line: Option<u64>) -> BatchError {
    BatchError { code: code.to_owned(), message: message.to_owned(), param: None, line }
}

/// How many requests were answered and how many were not.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    completed: u64,
    failed: u64,
}

/// Answers every request, and stores the answers and what went wrong in a file each.
async fn answer_all(serving: &Serving, batch: &Batch) -> Result<(), StoreError> {
    let store = &serving.store;
    let (answers, errors) =
        (store.begin_file(&batch.project_id).await?, store.begin_file(&batch.project_id).await?);
    let (to_answers, answer_lines) = mpsc::channel(1);
    let (to_errors, error_lines) = mpsc::channel(1);
    let worked = async {
        let (answers_stored, errors_stored, counts) = tokio::join!(
            put(store, &answers, answer_lines),
            put(store, &errors, error_lines),
            answer_lines_of(serving, batch, to_answers, to_errors),
        );
        let (answers_stored, errors_stored, counts) = (answers_stored?, errors_stored?, counts?);
        let file = |count: u64, id: &FileId, kind, stored| {
            let filename = format!("{}_{kind}.jsonl", batch.id);
            (count > 0).then(|| BatchFile { id: id.clone(), filename, stored })
        };
        let Counts { completed, failed } = counts;
        let output = file(completed, &answers, "output", answers_stored);
        let errors = file(failed, &errors, "error", errors_stored);
        store.complete_batch(batch, &BatchResult { completed, failed, output, errors }).await?;
        Ok(counts)
    };
    let worked = worked.await;
    let counts = worked.as_ref().copied().unwrap_or_default();
    for (id, lines) in [(&answers, counts.completed), (&errors, counts.failed)] {
        if lines == 0
            && let Err(error) = store.abandon_file(id).await
        {
            tracing::warn!(%error, file = %id, "a file of a batch that is not needed stays");
        }
    }
    worked.map(|_| ())
}

/// Stores lines as they come.
async fn put(
    store: &Store,
    id: &FileId,
    lines: mpsc::Receiver<Bytes>,
) -> Result<Stored, StoreError> {
    let lines = stream::unfold(lines, |mut lines| async move {
        let line = lines.recv().await?;
        Some((Ok::<_, Infallible>(line), lines))
    });
    store.objects().put_stream(&ObjectKey::File(id.clone()), lines, u64::MAX).await
}

/// Answers the requests, some at a time, and says in their order what came of them.
async fn answer_lines_of(
    serving: &Serving,
    batch: &Batch,
    to_answers: mpsc::Sender<Bytes>,
    to_errors: mpsc::Sender<Bytes>,
) -> Result<Counts, StoreError> {
    let lines = open(&serving.store, batch).await?;
    let begun = (lines, batch.endpoint.clone());
    let requests = stream::try_unfold(begun, |(mut lines, endpoint)| async move {
        while let Some((_, line)) = lines.next().await? {
            if let Ok(Some(request)) = Request::parse(&line, &endpoint) {
                return Ok::<_, StoreError>(Some((request, (lines, endpoint))));
            }
        }
        Ok(None)
    });
    let (asked, of) = (serving.clone(), Arc::new(batch.clone()));
    let answers = requests.map_ok(move |request| {
        let (serving, batch) = (asked.clone(), Arc::clone(&of));
        async move { Ok(answer(&serving, &batch, request).await) }
    });
    let mut answers = pin!(answers.try_buffered(AT_ONCE));
    let (mut claim, mut counts) = (Claim::new(&serving.store, batch), Counts::default());
    loop {
        claim.keep(counts).await?;
        let answered = tokio::select! {
            answered = answers.try_next() => answered?,
            // Answers may take long; the claim may not.
            () = tokio::time::sleep(RENEW_EVERY) => continue,
        };
        let Some((line, is_answered)) = answered else { return Ok(counts) };
        let (to, count) = match is_answered {
            true => (&to_answers, &mut counts.completed),
            false => (&to_errors, &mut counts.failed),
        };
        *count += 1;
        if to.send(line).await.is_err() {
            // Its file could not be stored, which the other end says.
            return Ok(counts);
        }
    }
}

/// The line that tells what came of a request, and whether it is an answer.
async fn answer(serving: &Serving, batch: &Batch, request: Request) -> (Bytes, bool) {
    let mut tries = 0;
    let (status, body) = loop {
        tries += 1;
        let failure = match ask(serving, batch, &request.body).await {
            Ok(body) => break (200, body),
            Err(failure) => failure,
        };
        let again = match failure.code() {
            // A sampler comes, or has room, in time; else the batch expires.
            ErrorCode::ModelNotServed | ErrorCode::RateLimitExceeded | ErrorCode::Unavailable => {
                true
            }
            ErrorCode::SamplerFailed | ErrorCode::Internal => tries < MAX_TRIES,
            _ => false,
        };
        if !again {
            break (failure.code().http_status(), wire(&failure.into_error()));
        }
        tokio::time::sleep(AGAIN_AFTER).await;
    };
    let text = |length| random_text(&mut rand::rng(), length);
    let line = json!({
        "id": format!("batch_req_{}", text(24)),
        "custom_id": request.custom_id,
        "response": {
            "status_code": status,
            "request_id": format!("req_{}", text(24)),
            "body": body,
        },
        "error": null,
    });
    (format!("{line}\n").into(), status == 200)
}

/// The reply that a request by itself would get.
async fn ask(
    serving: &Serving,
    batch: &Batch,
    body: &Map<String, Value>,
) -> Result<Value, Failure> {
    match batch.endpoint.as_str() {
        CHAT => ask_as::<ChatRequest>(serving, batch, body).await,
        _ => ask_as::<CompletionRequest>(serving, batch, body).await,
    }
}

async fn ask_as<R: AnswerRequest>(
    serving: &Serving,
    batch: &Batch,
    body: &Map<String, Value>,
) -> Result<Value, Failure> {
    let request = R::parse(body)?;
    if request.streams() {
        return Err(invalid_value("stream", true, "false in a batch").into());
    }
    let answers = request.begin(serving, &batch.project_id, true).await?;
    serde_json::to_value(answers.whole().await?).map_err(Failure::internal)
}

async fn open(store: &Store, batch: &Batch) -> Result<Lines, StoreError> {
    let content = store.objects().get(&ObjectKey::File(batch.input_file.clone())).await?;
    Ok(Lines::new(content.stream))
}

/// A claim that is renewed in time.
struct Claim<'a> {
    store: &'a Store,
    batch: &'a Batch,
    renewed: Instant,
}

impl<'a> Claim<'a> {
    fn new(store: &'a Store, batch: &'a Batch) -> Self {
        Self { store, batch, renewed: Instant::now() }
    }

    /// Renews the claim when it is time, and says how far the work has come.
    async fn keep(&mut self, Counts { completed, failed }: Counts) -> Result<(), StoreError> {
        if self.renewed.elapsed() >= RENEW_EVERY {
            self.store.keep_batch(&self.batch.id, completed, failed).await?;
            self.renewed = Instant::now();
        }
        Ok(())
    }
}
