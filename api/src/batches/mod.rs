//! Works batches off: reads the file of requests, answers each, and writes the files of answers.
//!
//! Any number of processes may do this side by side: a claim keeps a batch to one of them for a
//! minute at a time. Nothing of a batch is in memory but the names of its requests.

mod lines;
mod request;

use crate::background::{Work, work_off_until};
use crate::failure::wire;
use futures::stream;
use lines::Lines;
use request::Request;
use serde_json::json;
use std::collections::HashSet;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::ids::random_text;
use tunesmith_store::batches::{Batch, BatchError, BatchFile, BatchResult};
use tunesmith_store::notify::Channel;
use tunesmith_store::objects::ObjectKey;
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

/// Works until `stopped` turns true.
pub(crate) async fn run(store: Store, stopped: watch::Receiver<bool>) {
    work_off_until(&Batches { store }, stopped).await;
}

struct Batches {
    store: Store,
}

impl Work for Batches {
    const CHANNEL: Channel = Channel::Batches;
    const NAME: &str = "working batches off";

    fn store(&self) -> &Store {
        &self.store
    }

    async fn next(&self) -> Result<Option<Duration>, StoreError> {
        let Some(batch) = self.store.claim_batch().await? else { return Ok(Some(LOOK_EVERY)) };
        work(&self.store, &batch).await?;
        Ok(None)
    }
}

/// Works one batch off; being given up meanwhile is no error.
async fn work(store: &Store, batch: &Batch) -> Result<(), StoreError> {
    let worked = async {
        match check(store, batch).await? {
            Err(errors) => store.fail_batch(&batch.id, &errors).await,
            Ok(checked) => {
                store.begin_batch(&batch.id, checked.total, checked.model.as_deref()).await?;
                refuse_all(store, batch, checked.total).await
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
        claim.keep().await?;
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

/// Answers every request with the reason why this server does not answer it.
async fn refuse_all(store: &Store, batch: &Batch, total: u64) -> Result<(), StoreError> {
    let id = store.begin_file(&batch.project_id).await?;
    let lines = open(store, batch).await?;
    let refusals =
        stream::try_unfold((lines, Claim::new(store, batch)), |(mut lines, mut claim)| {
            let endpoint = batch.endpoint.as_str();
            async move {
                loop {
                    claim.keep().await?;
                    let Some((_, line)) = lines.next().await? else { return Ok(None) };
                    if let Ok(Some(request)) = Request::parse(&line, endpoint) {
                        return Ok::<_, StoreError>(Some((refusal(&request), (lines, claim))));
                    }
                }
            }
        });
    let written = async {
        let key = ObjectKey::File(id.clone());
        let stored = store.objects().put_stream(&key, refusals, u64::MAX).await?;
        let filename = format!("{}_error.jsonl", batch.id);
        let errors = Some(BatchFile { id: id.clone(), filename, stored });
        let result = BatchResult { completed: 0, failed: total, output: None, errors };
        store.complete_batch(batch, &result).await
    };
    let written = written.await;
    if written.is_err()
        && let Err(error) = store.abandon_file(&id).await
    {
        tracing::warn!(%error, file = %id, "the file of a batch that did not end well stays");
    }
    match written {
        // What ends the claim ends the stream, and comes wrapped.
        Err(StoreError::BrokenStream(cause)) => match cause.downcast::<StoreError>() {
            Ok(inner) => Err(*inner),
            Err(cause) => Err(StoreError::BrokenStream(cause)),
        },
        other => other,
    }
}

/// A line of the file of refusals.
fn refusal(request: &Request) -> bytes::Bytes {
    let message = format!(
        "The model '{}' does not answer in batches yet. Send the request by itself.",
        request.model
    );
    let error = ApiError::new(ErrorCode::ModelNotServed, message).with_param("model");
    let text = |length| random_text(&mut rand::rng(), length);
    let line = json!({
        "id": format!("batch_req_{}", text(24)),
        "custom_id": request.custom_id,
        "response": {
            "status_code": error.code.http_status(),
            "request_id": format!("req_{}", text(24)),
            "body": wire(&error),
        },
        "error": null,
    });
    format!("{line}\n").into()
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

    async fn keep(&mut self) -> Result<(), StoreError> {
        if self.renewed.elapsed() >= RENEW_EVERY {
            self.store.keep_batch(&self.batch.id).await?;
            self.renewed = Instant::now();
        }
        Ok(())
    }
}
