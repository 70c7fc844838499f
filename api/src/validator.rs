//! Reads the files of new jobs, row by row, and lets each job queue or fail.
//!
//! Any number of processes may do this side by side: a claim keeps a job to one of them for a
//! minute, and whoever is first decides.

use crate::background::{Work, work_off};
use crate::tokenizers::Tokenizers;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tracing::Instrument as _;
use tunesmith_core::dataset::{
    ChatTokenizer, ReadOptions, Report, RowReader, Shape, TokenizeOptions, check_training_examples,
    is_text_name, tokenize_pair, tokenize_windows,
};
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::hyperparameters::{
    DataFacts, Hyperparameters, Method, ResolvedHyperparameters,
};
use tunesmith_core::ids::FileId;
use tunesmith_core::spans;
use tunesmith_store::events::{Level, NewEvent};
use tunesmith_store::jobs::Job;
use tunesmith_store::notify::Channel;
use tunesmith_store::objects::ObjectKey;
use tunesmith_store::validation::{VALIDATION_CLAIM, Validated};
use tunesmith_store::{Store, StoreError};

/// A notification may be lost: look this often without one.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Validates until `stopped` turns true; a job at hand is finished first.
pub(crate) async fn run(store: Store, tokenizers: Arc<Tokenizers>, stopped: watch::Receiver<bool>) {
    let validator = Validator { store, tokenizers };
    work_off(&validator, stopped).await;
}

struct Validator {
    store: Store,
    tokenizers: Arc<Tokenizers>,
}

/// How the files of a job turned out.
type Outcome = Result<Validated, ApiError>;

impl Work for Validator {
    const CHANNEL: Channel = Channel::Validation;
    const NAME: &str = "validating jobs";

    fn store(&self) -> &Store {
        &self.store
    }

    async fn next(&self) -> Result<Option<Duration>, StoreError> {
        let Some(job) = self.store.claim_for_validation().await? else {
            return Ok(Some(LOOK_EVERY));
        };
        let span =
            tracing::info_span!(target: spans::TARGET, "validate a job's files", job_id = %job.id);
        let told = match self.validate(&job).instrument(span).await {
            Ok(Ok(validated)) => self.store.accept_files(&job.id, validated).await,
            Ok(Err(error)) => self.store.refuse_files(&job.id, error).await,
            Err(error) => Err(error),
        };
        match told {
            Ok(()) => Ok(None),
            // Cancelled meanwhile, or another validator was faster: nothing is left to do.
            Err(StoreError::Superseded { .. }) => Ok(None),
            Err(error) => {
                tracing::warn!(job = %job.id, "the job's files are validated again in a minute");
                Err(error)
            }
        }
    }
}

impl Validator {
    async fn validate(&self, job: &Job) -> Result<Outcome, StoreError> {
        let base = self.store.base_model_by_id(&job.base_model_id).await?;
        let tokenizer = match self.tokenizers.of(&base).await? {
            Ok(tokenizer) => tokenizer,
            Err(error) => return Ok(Err(error)),
        };
        let directory = tempfile::tempdir()
            .map_err(|source| StoreError::LocalFile { path: std::env::temp_dir(), source })?;
        let training =
            match self.fetch(&job.training_file, "training_file", directory.path()).await? {
                Ok(file) => file,
                Err(error) => return Ok(Err(error)),
            };
        let validation = match &job.validation_file {
            None => None,
            Some(id) => match self.fetch(id, "validation_file", directory.path()).await? {
                Ok(file) => Some(file),
                Err(error) => return Ok(Err(error)),
            },
        };
        let files = Files { training, validation };
        let (method, request) = (job.method, job.hyperparameters.clone());
        let superseded = Superseded::default();
        let stop = superseded.clone();
        let layers = base.num_hidden_layers();
        let reading = tokio::task::spawn_blocking(move || {
            let (asked, _) = Hyperparameters::parse_for(method, &request, "hyperparameters")?;
            if let Some(layers) = layers {
                asked.check_layers(layers, "hyperparameters")?;
            }
            files.check(&asked, base.context_length, &tokenizer, &stop)
        });
        self.while_claimed(job, reading, &superseded).await
    }

    /// Renews the claim until `reading` is done.
    async fn while_claimed(
        &self,
        job: &Job,
        mut reading: tokio::task::JoinHandle<Outcome>,
        superseded: &Superseded,
    ) -> Result<Outcome, StoreError> {
        loop {
            match tokio::time::timeout(VALIDATION_CLAIM / 3, &mut reading).await {
                Ok(Ok(outcome)) => return Ok(outcome),
                Ok(Err(panic)) => {
                    // Reading the same rows again would end the same way.
                    tracing::error!(job = %job.id, error = %panic, "reading a job's files failed");
                    return Ok(Err(ApiError::new(
                        ErrorCode::Internal,
                        "The server failed while it read the job's files. Give whoever runs it \
                         this job's id.",
                    )));
                }
                Err(_elapsed) => {
                    if let Err(error) = self.store.keep_validating(&job.id).await {
                        superseded.0.store(true, Ordering::Relaxed);
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Copies a file to the local disk. One that is gone is the job's error, not ours.
    async fn fetch(
        &self,
        id: &FileId,
        param: &'static str,
        directory: &Path,
    ) -> Result<Result<LocalFile, ApiError>, StoreError> {
        let path = directory.join(param);
        match self.store.objects().download(&ObjectKey::File(id.clone()), &path).await {
            Ok(_) => {
                let name = self.store.filename(id).await?;
                let is_text = name.as_deref().is_some_and(is_text_name);
                Ok(Ok(LocalFile { param, path, is_text }))
            }
            Err(StoreError::NotFound { .. }) => Ok(Err(ApiError::new(
                ErrorCode::InvalidTrainingFile,
                format!("The file {id} is gone. Upload it again and start a new job."),
            )
            .with_param(param))),
            Err(error) => Err(error),
        }
    }
}

/// Tells the reading thread that nobody waits for its answer any more.
#[derive(Clone, Default)]
struct Superseded(Arc<AtomicBool>);

struct LocalFile {
    param: &'static str,
    path: PathBuf,
    /// Whether its name says that it is plain text.
    is_text: bool,
}

struct Files {
    training: LocalFile,
    validation: Option<LocalFile>,
}

impl Files {
    /// Reads every row twice: once for what it says, and, when the hyperparameters are resolved,
    /// once for its tokens.
    fn check(
        &self,
        asked: &Hyperparameters,
        context_length: u64,
        tokenizer: &ChatTokenizer,
        superseded: &Superseded,
    ) -> Outcome {
        let method = asked.method;
        let training = self.training.read(method, superseded)?;
        let is_text = training.format.shape == Shape::Text;
        if !is_text {
            check_training_examples(training.rows)?;
        }
        let mut events = vec![read_as("Training", &training)];
        if let Some(validation) = &self.validation {
            events.push(read_as("Validation", &validation.read(method, superseded)?));
        }
        let facts = |examples| DataFacts { examples, context_length };
        let mut resolved = asked.resolve(&facts(training.rows));
        let tokenized = self.training.tokenize(tokenizer, &resolved, superseded)?;
        if is_text {
            // A text trains in as many windows as it needs: these are the examples.
            check_training_examples(tokenized.sequences)?;
            events.extend(windows(training.rows, tokenized.sequences, resolved.max_seq_length));
            resolved = asked.resolve(&facts(tokenized.sequences));
        }
        events.extend(cut(self.training.param, tokenized.truncated, resolved.max_seq_length));
        if let Some(file) = &self.validation {
            let Tokenized { truncated, .. } = file.tokenize(tokenizer, &resolved, superseded)?;
            events.extend(cut(file.param, truncated, resolved.max_seq_length));
        }
        Ok(Validated { resolved, events })
    }
}

impl LocalFile {
    fn rows(&self, method: Method) -> Result<RowReader<BufReader<File>>, ApiError> {
        let file = File::open(&self.path).map_err(|error| {
            ApiError::new(
                ErrorCode::Internal,
                format!("The server lost its copy of a file: {error}"),
            )
            .with_param(self.param)
        })?;
        let Self { param, is_text, .. } = *self;
        let options = ReadOptions { method: Some(method), is_text, param };
        RowReader::open(BufReader::new(file), &options)
    }

    fn read(&self, method: Method, superseded: &Superseded) -> Result<Report, ApiError> {
        let mut rows = self.rows(method)?;
        for row in rows.by_ref() {
            row?;
            superseded.check()?;
        }
        // The reader refuses a file without rows, so there is a report.
        rows.report().ok_or_else(|| {
            ApiError::new(ErrorCode::InvalidFileFormat, "The file has no rows.")
                .with_param(self.param)
        })
    }

    /// What the rows become.
    fn tokenize(
        &self,
        tokenizer: &ChatTokenizer,
        resolved: &ResolvedHyperparameters,
        superseded: &Superseded,
    ) -> Result<Tokenized, ApiError> {
        let options = TokenizeOptions::from(resolved);
        let mut tokenized = Tokenized { sequences: 0, truncated: 0 };
        for row in self.rows(resolved.method)? {
            superseded.check()?;
            match resolved.method {
                Method::Supervised => {
                    let windows = tokenize_windows(tokenizer, &row?, &options, self.param)?;
                    tokenized.sequences += windows.len();
                    tokenized.truncated += usize::from(windows.iter().any(|row| row.truncated));
                }
                Method::Dpo => {
                    let pair = tokenize_pair(tokenizer, &row?, &options, self.param)?;
                    tokenized.sequences += 1;
                    tokenized.truncated += usize::from(pair.is_truncated());
                }
            }
        }
        Ok(tokenized)
    }
}

/// What a file's rows become.
struct Tokenized {
    /// Examples: windows of texts, and any other row as one.
    sequences: usize,
    /// Rows that are cut.
    truncated: usize,
}

impl Superseded {
    /// The error is seen by nobody: whoever would read it has gone.
    fn check(&self) -> Result<(), ApiError> {
        if self.0.load(Ordering::Relaxed) {
            return Err(ApiError::new(
                ErrorCode::Internal,
                "The job is no longer being validated.",
            ));
        }
        Ok(())
    }
}

fn read_as(which: &str, report: &Report) -> NewEvent {
    NewEvent::message(Level::Info, format!("{which} file: {report}"))
}

fn windows(texts: usize, windows: usize, max_seq_length: u64) -> Option<NewEvent> {
    (windows > texts).then(|| {
        let message = format!(
            "The {texts} text(s) of the training file train in {windows} windows of at most \
             {max_seq_length} tokens"
        );
        NewEvent::message(Level::Info, message)
    })
}

fn cut(param: &str, rows: usize, max_seq_length: u64) -> Option<NewEvent> {
    (rows > 0).then(|| {
        let file = param.replace('_', " ");
        NewEvent::message(
            Level::Warn,
            format!(
                "{rows} row(s) of the {file} are longer than max_seq_length = {max_seq_length} \
                 tokens and are cut at that length"
            ),
        )
    })
}

#[cfg(test)]
mod tests;
