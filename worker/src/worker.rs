//! The loop that takes jobs.

use crate::config::WorkerConfig;
use crate::model_cache::ModelCache;
use crate::retry;
use crate::session::{Context, Outcome, Session};
use crate::work_dir::WorkDir;
use std::io;
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;
use tunesmith_core::ids::WorkerId;
use tunesmith_core::spans;
use tunesmith_store::Store;
use tunesmith_store::lease::ClaimedJob;
use tunesmith_store::notify::{Channel, Listener};

/// Why a worker cannot work at all.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// Its directory cannot be used.
    #[error("the worker's directory {path} cannot be used: {source}")]
    WorkDir {
        /// As configured.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A worker: one job at a time, until it is told to stop.
#[derive(Debug)]
pub struct Worker {
    id: WorkerId,
    store: Store,
    config: WorkerConfig,
}

impl Worker {
    /// A worker with a name of its own.
    #[must_use]
    pub fn new(store: Store, config: WorkerConfig) -> Self {
        Self { id: WorkerId::generate(&mut rand::rng()), store, config }
    }

    /// Its name in the database and in logs.
    #[must_use]
    pub fn id(&self) -> &WorkerId {
        &self.id
    }

    /// Works until `shutdown` is cancelled. A job at hand then gets a checkpoint and goes back
    /// into the queue, which costs it no attempt. Dropping the future instead kills the trainer
    /// at once and leaves the job to the next worker after its lease has run out.
    ///
    /// # Errors
    /// Only at the start: [`WorkerError::WorkDir`]. A database that is away is waited for.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), WorkerError> {
        // What a killed worker left may be large, so it goes off the runtime's threads.
        let (root, id) = (self.config.work_dir.clone(), self.id.clone());
        let work_dir = tokio::task::spawn_blocking(move || WorkDir::create(&root, id.as_str()))
            .await
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(|source| WorkerError::WorkDir {
                path: self.config.work_dir.clone(),
                source,
            })?;
        let context = Context {
            store: self.store,
            cache: ModelCache::new(&self.config.cache_dir, self.config.tuned_cache_bytes),
            config: self.config,
            work_dir,
        };
        tracing::info!(worker_id = %self.id, device = context.config.device, "the worker is ready");
        let mut queue = Queue { context: &context, id: &self.id, listener: None };
        while let Some((claimed, asked_at)) = queue.next(&shutdown).await {
            let span = tracing::info_span!(
                target: spans::TARGET,
                "job",
                job_id = %claimed.job.id,
                attempt = claimed.lease.attempt,
                model = claimed.job.model,
                worker_id = %self.id,
            );
            let session = Session::new(&context, claimed, &shutdown);
            let outcome = session.run(asked_at).instrument(span).await;
            if outcome == Outcome::Lost {
                // Whatever took this attempt may take the next one: others get the chance.
                pause(context.config.poll_interval, &shutdown).await;
            }
        }
        tracing::info!(worker_id = %self.id, "the worker has stopped");
        Ok(())
    }
}

/// Waits, or returns early on a shutdown.
async fn pause(duration: Duration, shutdown: &CancellationToken) {
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = tokio::time::sleep(duration) => {}
    }
}

/// Where jobs come from.
struct Queue<'a> {
    context: &'a Context,
    id: &'a WorkerId,
    /// There while its connection is.
    listener: Option<Listener>,
}

impl Queue<'_> {
    /// The next job and when it was asked for; `None` on a shutdown.
    async fn next(&mut self, shutdown: &CancellationToken) -> Option<(ClaimedJob, Instant)> {
        let store = &self.context.store;
        let mut waits = retry::waits();
        while !shutdown.is_cancelled() {
            // Listening comes first, so that a job that arrives during the look is heard of.
            if self.listener.is_none() {
                match store.listen(Channel::Queue).await {
                    Ok(listener) => self.listener = Some(listener),
                    Err(error) => tracing::warn!(%error, "the queue cannot be listened to"),
                }
            }
            let asked_at = Instant::now();
            // Not raced with the shutdown: a claim that is dropped on its way may have been
            // granted, and would hold the job for the time of a lease.
            match store.claim_job(self.id).await {
                Ok(Some(claimed)) => return Some((claimed, asked_at)),
                Ok(None) => {
                    waits = retry::waits();
                    self.wait(shutdown).await;
                }
                Err(error) => {
                    tracing::warn!(%error, "no job can be claimed; trying again");
                    pause(waits.next().unwrap_or(self.context.config.poll_interval), shutdown)
                        .await;
                }
            }
        }
        None
    }

    /// Waits for a notification, for as long as an idle worker waits, or for a shutdown.
    async fn wait(&mut self, shutdown: &CancellationToken) {
        let at_most = self.context.config.poll_interval;
        let Some(listener) = &mut self.listener else { return pause(at_most, shutdown).await };
        let heard = tokio::select! {
            () = shutdown.cancelled() => return,
            heard = listener.wait(at_most) => heard,
        };
        if let Err(error) = heard {
            tracing::warn!(%error, "the queue can no longer be listened to; polling");
            self.listener = None;
            pause(at_most, shutdown).await;
        }
    }
}
