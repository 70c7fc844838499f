//! What can go wrong in the store.

use tunesmith_core::ids::{BatchId, FileId, JobId, UploadId};
use tunesmith_core::state::JobStatus;

/// An error of the store. Messages are for operators; what a client reads is the caller's choice.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Nothing of that name, or nothing that the caller's project may see.
    #[error("no {kind} {id}")]
    NotFound {
        /// `file`, `job`, `model`, …
        kind: &'static str,
        /// What was asked for.
        id: String,
    },
    /// A list was asked to go on after an entry that it does not have.
    #[error("no entry {after} to list after")]
    UnknownCursor {
        /// The entry.
        after: String,
    },
    /// The name is taken.
    #[error("there is a {kind} {name} already")]
    AlreadyExists {
        /// What kind of thing has the name.
        kind: &'static str,
        /// The name.
        name: String,
    },
    /// An idempotency key came again with another request.
    #[error("the idempotency key was used for another request")]
    IdempotencyConflict,
    /// A request that came again has made a key, the secret of which was shown then and is not kept.
    #[error("the secret of key {key} was shown when it was made")]
    SecretShown {
        /// The key.
        key: String,
    },
    /// The project has as many unfinished jobs as it may.
    #[error("the project has {limit} unfinished jobs")]
    TooManyJobs {
        /// How many it may have.
        limit: u64,
    },
    /// An unfinished job still needs the file.
    #[error("file {file} is used by job {job}")]
    FileInUse {
        /// The file that was to go.
        file: FileId,
        /// A job that needs it.
        job: JobId,
    },
    /// An unfinished batch still needs the file.
    #[error("file {file} is used by batch {batch}")]
    FileInBatch {
        /// The file that was to go.
        file: FileId,
        /// A batch that needs it.
        batch: BatchId,
    },
    /// The batch is not worked on any more.
    #[error("batch {batch} is {status}")]
    BatchEnded {
        /// The batch.
        batch: BatchId,
        /// How it stands.
        status: &'static str,
    },
    /// The job's state forbids what was asked.
    #[error("job {job} is {status}")]
    InvalidState {
        /// The job.
        job: JobId,
        /// Where it stands.
        status: JobStatus,
    },
    /// The upload takes no parts and cannot be completed or cancelled any more.
    #[error("upload {upload} is {status}")]
    UploadEnded {
        /// The upload.
        upload: UploadId,
        /// `completed`, `cancelled` or `expired`.
        status: &'static str,
    },
    /// Parts do not make up what was announced.
    #[error("upload {upload}: {reason}")]
    UploadParts {
        /// The upload.
        upload: UploadId,
        /// What does not fit, for the client.
        reason: String,
    },
    /// Another validator, or the job's owner, was faster. What was found counts no more.
    #[error("job {job} is no longer being validated")]
    Superseded {
        /// The job.
        job: JobId,
    },
    /// The lease ran out, or the job was ended or taken over. Its holder must stop.
    #[error("attempt {attempt} on job {job} no longer holds the lease")]
    StaleLease {
        /// The job.
        job: JobId,
        /// The attempt that wanted to write.
        attempt: u32,
    },
    /// More bytes came than the cap allows. Nothing of them is kept.
    #[error("more than {cap} bytes")]
    TooLarge {
        /// The most that was allowed.
        cap: u64,
    },
    /// The stream to be stored broke off. Nothing of it is kept.
    #[error("the upload broke off: {0}")]
    BrokenStream(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Objects are written once, and this one is there with other content.
    #[error("object {0} is there already, with other content")]
    ObjectExists(String),
    /// A URL that the object store cannot be opened by.
    #[error("object store URL {url}: {reason}")]
    ObjectStoreUrl {
        /// As configured.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The database failed.
    #[error("database: {0}")]
    Database(#[from] sqlx::Error),
    /// The schema could not be brought up to date.
    #[error("migration: {0}")]
    Migration(#[from] sqlx::migrate::MigrateError),
    /// The object store failed.
    #[error("object store: {0}")]
    Objects(#[from] object_store::Error),
    /// A local file could not be read or written.
    #[error("{path}: {source}")]
    LocalFile {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Nothing was heard of an import for so long that its objects were taken for nobody's.
    #[error("the import was given up, as nothing was heard of it for an hour: begin it again")]
    ImportGivenUp,
    /// A value could not be turned into JSON.
    #[error("json: {0}")]
    Json(#[from] serde_json::Error),
}

impl StoreError {
    pub(crate) fn not_found(kind: &'static str, id: impl ToString) -> Self {
        Self::NotFound { kind, id: id.to_string() }
    }

    pub(crate) fn local_file(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::LocalFile { path: path.to_owned(), source }
    }

    /// Whether trying again later may help: the database or the object store did not answer, or
    /// broke off.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Database(error) => match error {
                sqlx::Error::Io(_)
                | sqlx::Error::Tls(_)
                | sqlx::Error::PoolTimedOut
                | sqlx::Error::PoolClosed
                | sqlx::Error::WorkerCrashed => true,
                // Classes 08 (connection), 40 (serialisation, deadlock), 53 (resources) and
                // 57P (shutting down) of the SQL standard's codes.
                sqlx::Error::Database(error) => error.code().is_some_and(|code| {
                    ["08", "40", "53", "57P"].iter().any(|class| code.starts_with(class))
                }),
                _ => false,
            },
            // Object stores retry what they know to be transient; what is left is mostly theirs.
            Self::Objects(error) => matches!(error, object_store::Error::Generic { .. }),
            _ => false,
        }
    }
}
