//! Reads new files to train on, and keeps what they are found to be.
//!
//! This happens beside the validation of jobs, after the upload was answered. A file is read as a
//! stream out of the object store: neither memory nor disk grows with it.

use crate::background::{Work, work_off};
use crate::tokenizers::Tokenizers;
use futures::TryStreamExt as _;
use serde_json::{Value, json};
use std::io::{self, BufReader};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::io::{StreamReader, SyncIoBridge};
use tracing::Instrument as _;
use tunesmith_core::dataset::{
    ChatTokenizer, FileReport, ReadOptions, ReportError, ReportOptions, TokenizeOptions,
    is_text_name,
};
use tunesmith_core::ids::FileId;
use tunesmith_core::spans;
use tunesmith_store::base_models::BaseModel;
use tunesmith_store::file_reports::{REPORT_CLAIM, ReportClaim};
use tunesmith_store::notify::Channel;
use tunesmith_store::objects::ObjectKey;
use tunesmith_store::{Store, StoreError};

/// A notification may be lost: look this often without one.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Bytes that are taken out of the object store's stream at a time.
const BUFFER: usize = 256 << 10;

/// Makes reports until `stopped` turns true.
pub(crate) async fn run(store: Store, tokenizers: Arc<Tokenizers>, stopped: watch::Receiver<bool>) {
    let maker = ReportMaker { store, tokenizers };
    work_off(&maker, stopped).await;
}

struct ReportMaker {
    store: Store,
    tokenizers: Arc<Tokenizers>,
}

/// Tells the reading thread to stop when nobody waits for it any more, however that came.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Work for ReportMaker {
    const CHANNEL: Channel = Channel::Reports;
    const NAME: &str = "reporting on files";

    fn store(&self) -> &Store {
        &self.store
    }

    async fn next(&self) -> Result<Option<Duration>, StoreError> {
        let Some(claim) = self.store.claim_report().await? else { return Ok(Some(LOOK_EVERY)) };
        let file_id = &claim.file.id;
        let span = tracing::info_span!(target: spans::TARGET, "report on a file", %file_id);
        match self.make(&claim).instrument(span).await {
            Ok(None) => {}
            Ok(Some((report, complaint))) => {
                self.store.finish_report(&claim, &report, complaint.as_deref()).await?;
            }
            Err(error) => {
                tracing::warn!(file = %claim.file.id, "the report on the file is made again soon");
                self.store.postpone_report(&claim).await?;
                return Err(error);
            }
        }
        Ok(None)
    }
}

impl ReportMaker {
    /// The report, and what it says at a glance; `None` when nobody wants it any more.
    async fn make(
        &self,
        claim: &ReportClaim,
    ) -> Result<Option<(Value, Option<String>)>, StoreError> {
        let base = self.base_model(claim).await?;
        // A model whose tokenizer cannot be used says so when a job is made with it.
        let counter = match &base {
            Some(base) => self.tokenizers.of(base).await?.ok().map(|tokenizer| (base, tokenizer)),
            None => None,
        };
        let model = counter.as_ref().map(|(base, _)| base.name.clone());
        let tokenizer = counter.map(|(base, tokenizer)| {
            let max_seq_length = usize::try_from(base.context_length).unwrap_or(usize::MAX);
            (tokenizer, TokenizeOptions { max_seq_length, prompt_loss_weight: 0.0 })
        });
        let is_text = is_text_name(&claim.file.filename);
        let read = ReadOptions { method: None, is_text, param: "file" };
        let reading = read_file(&self.store, &claim.file.id, read, tokenizer, 0);
        // Deleted just now, and its report with it; or not wanted any more. After a crash the claim
        // runs out, and another try or two may do better.
        let Some(Ok(report)) = self.while_claimed(claim, reading).await? else {
            return Ok(None);
        };
        let mut json = serde_json::to_value(&report)?;
        json["model"] = json!(model);
        Ok(Some((json, report.complaint())))
    }

    /// The model whose tokens are counted, unless it went meanwhile.
    async fn base_model(&self, claim: &ReportClaim) -> Result<Option<BaseModel>, StoreError> {
        let Some(id) = &claim.base_model_id else { return Ok(None) };
        match self.store.base_model_by_id(id).await {
            Ok(base) => Ok(Some(base)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Renews the claim until `reading` is done; `None` when the report is not wanted any more.
    async fn while_claimed<T>(
        &self,
        claim: &ReportClaim,
        reading: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<Option<T>, StoreError> {
        let mut reading = std::pin::pin!(reading);
        loop {
            match tokio::time::timeout(REPORT_CLAIM / 3, &mut reading).await {
                Ok(made) => return made.map(Some),
                Err(_elapsed) => {
                    if !self.store.keep_report(claim).await? {
                        return Ok(None);
                    }
                }
            }
        }
    }
}

/// Why a file that is there could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unread {
    /// Its content is gone.
    Gone,
    /// The reader crashed over it, and would again.
    Crashed,
}

/// Reads a file's content on a thread of its own: what it is, and its tokens where `tokenizer` is
/// there to count them.
pub(crate) async fn read_file(
    store: &Store,
    file: &FileId,
    read: ReadOptions<'static>,
    tokenizer: Option<(Arc<ChatTokenizer>, TokenizeOptions)>,
    shown_rows: usize,
) -> Result<Result<FileReport, Unread>, StoreError> {
    let content = match store.objects().get(&ObjectKey::File(file.clone())).await {
        Ok(content) => content.stream.map_err(io::Error::other),
        Err(StoreError::NotFound { .. }) => return Ok(Err(Unread::Gone)),
        Err(error) => return Err(error),
    };
    let content = SyncIoBridge::new(StreamReader::new(content));
    let stop = Arc::new(AtomicBool::new(false));
    let _stop_on_drop = StopOnDrop(Arc::clone(&stop));
    let reading = tokio::task::spawn_blocking(move || {
        let options = ReportOptions {
            read,
            tokenizer: tokenizer.as_ref().map(|(tokenizer, options)| (&**tokenizer, *options)),
            shown_rows,
        };
        let content = BufReader::with_capacity(BUFFER, content);
        FileReport::make(content, &options, || !stop.load(Ordering::Relaxed))
    });
    match reading.await {
        Ok(Ok(report)) => Ok(Ok(report)),
        Ok(Err(ReportError::Io(error))) => Err(StoreError::BrokenStream(Box::new(error))),
        // Nobody waits any more, so nobody reads this.
        Ok(Err(error @ ReportError::Stopped)) => Err(StoreError::BrokenStream(Box::new(error))),
        Err(panic) => {
            tracing::error!(%file, error = %panic, "reading a file failed");
            Ok(Err(Unread::Crashed))
        }
    }
}

#[cfg(test)]
mod tests;
