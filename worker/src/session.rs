//! One job, from the moment it is claimed until the worker lets go of it.

use crate::checkpoints::Checkpoints;
use crate::child::ChildError;
use crate::config::WorkerConfig;
use crate::lease::{LeaseKeeper, Orders};
use crate::model_cache::{CachedModel, ModelCache};
use crate::prepare::prepare;
use crate::reporter::Reporter;
use crate::retry::retry;
use crate::trainer::Trainer;
use crate::transfer::TransferError;
use crate::work_dir::WorkDir;
use std::path::Path;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, Span};
use tunesmith_core::errors::ApiError;
use tunesmith_core::protocol::{Finished, FromTrainer};
use tunesmith_core::spans;
use tunesmith_store::jobs::Job;
use tunesmith_store::lease::{ClaimedJob, GiveBack, Lease, LeaseState};
use tunesmith_store::{Store, StoreError};

/// Why a session cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    /// The lease is gone; nothing more may be written.
    #[error("the lease is lost")]
    Stale,
    /// The job is at fault.
    #[error("{0}")]
    Job(ApiError),
    /// The trainer, this machine or a service it needs is at fault: another attempt may do better.
    #[error("{0}")]
    Attempt(String),
}

impl From<StoreError> for SessionError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::StaleLease { .. } => Self::Stale,
            other => Self::Attempt(other.to_string()),
        }
    }
}

impl From<TransferError> for SessionError {
    fn from(error: TransferError) -> Self {
        match error {
            TransferError::Store(error) => error.into(),
            other => Self::Attempt(other.to_string()),
        }
    }
}

impl From<ChildError> for SessionError {
    fn from(error: ChildError) -> Self {
        Self::Attempt(error.to_string())
    }
}

/// How training ended; what is written for it follows from this.
#[derive(Debug)]
pub(crate) enum Ending {
    /// The run has come to its end.
    Finished {
        /// What the trainer said of it.
        finished: Finished,
        /// Loss on the validation rows before the first step.
        initial_valid_loss: Option<f64>,
    },
    /// It can go on elsewhere, or later.
    GiveBack(GiveBack),
    /// Its owner wants its end.
    Cancelled,
    /// The job is at fault.
    Failed(ApiError),
    /// Something else is.
    Lost(String),
}

/// What the worker should know of a session that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The job is no longer ours, as it should be.
    LetGo,
    /// The attempt was lost, and the next one may be lost in the same way.
    Lost,
}

/// What every session of a worker shares.
pub(crate) struct Context {
    pub(crate) store: Store,
    pub(crate) config: WorkerConfig,
    pub(crate) cache: ModelCache,
    pub(crate) work_dir: WorkDir,
}

/// A job and the right to write for it.
pub(crate) struct Claim<'a> {
    pub(crate) context: &'a Context,
    pub(crate) job: Job,
    pub(crate) lease: Lease,
}

/// A claimed job at work.
pub(crate) struct Session<'a> {
    claim: Claim<'a>,
    shutdown: &'a CancellationToken,
    reporter: Reporter,
    checkpoints: Checkpoints,
    /// Kept here and not in the future that trains, so that it can be waited for after that
    /// future was dropped.
    trainer: Option<Trainer>,
    /// What the trainer reads, kept until it has exited.
    base_model: Option<CachedModel>,
}

impl<'a> Session<'a> {
    pub(crate) fn new(
        context: &'a Context,
        claimed: ClaimedJob,
        shutdown: &'a CancellationToken,
    ) -> Self {
        let ClaimedJob { job, lease } = claimed;
        let (store, flush_interval) = (&context.store, context.config.flush_interval);
        let reporter = Reporter::new(store.clone(), lease.clone(), flush_interval);
        let checkpoints = Checkpoints::new(store.clone(), lease.clone());
        let claim = Claim { context, job, lease };
        Self { claim, shutdown, reporter, checkpoints, trainer: None, base_model: None }
    }

    /// Works on the job until it is let go of. `asked_at` is when its claim was sent.
    pub(crate) async fn run(mut self, asked_at: Instant) -> Outcome {
        let Claim { context, job, lease } = &self.claim;
        let job_id = job.id.clone();
        tracing::info!(%job_id, attempt = lease.attempt, model = job.model, "a job begins");
        let keeper = keep_lease(context, lease, asked_at);
        let dir = context.work_dir.job_dir(job_id.as_str());
        let outcome = tokio::select! {
            biased;
            () = keeper.lost() => Outcome::LetGo,
            outcome = async {
                match &dir {
                    Ok(dir) => self.work(&keeper, dir.path()).await,
                    Err(error) => {
                        let reason = format!("the worker could not make a directory: {error}");
                        self.claim.let_go(&keeper, Ending::Lost(reason)).await
                    }
                }
            } => outcome,
        };
        drop(keeper);
        self.end_trainer(Duration::ZERO).await;
        if let Ok(dir) = dir
            && let Ok(Err(error)) = tokio::task::spawn_blocking(move || dir.close()).await
        {
            tracing::warn!(%job_id, %error, "a job's directory stays until the worker ends");
        }
        outcome
    }

    /// Trains and writes what came of it.
    async fn work(&mut self, keeper: &LeaseKeeper, dir: &Path) -> Outcome {
        let trained = tokio::select! {
            biased;
            () = keeper.cancelled() => Ok(Ending::Cancelled),
            trained = self.train(keeper, dir).instrument(part("train")) => trained,
        };
        let grace = match &trained {
            Ok(Ending::Finished { .. } | Ending::GiveBack(_) | Ending::Failed(_)) => {
                self.claim.context.config.exit_grace
            }
            _ => Duration::ZERO,
        };
        self.end_trainer(grace).await;
        // The steps that were still to be written belong to the curve, however it ended.
        let flushed = self.reporter.flush().await;
        let ending = match trained.and_then(|ending| Ok(flushed.map(|()| ending)?)) {
            Ok(ending) => ending,
            Err(SessionError::Stale) => return self.claim.lease_is_lost(),
            Err(SessionError::Job(error)) => Ending::Failed(error),
            Err(SessionError::Attempt(reason)) => Ending::Lost(reason),
        };
        self.claim.let_go(keeper, ending).instrument(part("let go")).await
    }

    /// From the first download to the trainer's last word.
    async fn train(&mut self, keeper: &LeaseKeeper, dir: &Path) -> Result<Ending, SessionError> {
        let Claim { context, job, lease } = &self.claim;
        let (store, config, job_id) = (&context.store, &context.config, &job.id);
        let (request, base_model) = tokio::select! {
            biased;
            reason = give_back_wanted(keeper, self.shutdown) => return Ok(Ending::GiveBack(reason)),
            request = prepare(context, job, dir).instrument(part("prepare")) => request?,
        };
        self.base_model = base_model;
        let trainer = self.trainer.insert(Trainer::start(&config.trainer, request).await?);
        let mut initial_valid_loss = job.run.as_ref().and_then(|run| run.initial_valid_loss);
        let mut stopping: Option<(GiveBack, Instant)> = None;
        let ending = loop {
            tokio::select! {
                biased;
                reason = give_back_wanted(keeper, self.shutdown), if stopping.is_none() => {
                    tracing::info!(%job_id, ?reason, "the trainer is asked to stop");
                    trainer.stop().await?;
                    stopping = Some((reason, Instant::now() + config.stop_grace));
                }
                reason = grace_is_over(stopping) => {
                    tracing::warn!(
                        %job_id,
                        "the trainer did not stop in time; the steps since its last checkpoint \
                         will be trained again"
                    );
                    trainer.kill();
                    break Ending::GiveBack(reason);
                }
                () = self.reporter.is_due() => self.reporter.flush().await?,
                done = self.checkpoints.advance(), if !self.checkpoints.is_idle() => done?,
                message = trainer.next(), if self.checkpoints.has_room() => match message {
                    Ok(Some(FromTrainer::Started(run))) => {
                        initial_valid_loss = initial_valid_loss.or(run.initial_valid_loss);
                        self.reporter.set_total_steps(run.total_steps);
                        retry("record_started", || store.record_started(lease, &run)).await?;
                    }
                    Ok(Some(FromTrainer::Rows { rows })) => self.reporter.add_rows(rows),
                    Ok(Some(FromTrainer::Step(metrics))) => self.reporter.add(metrics),
                    Ok(Some(FromTrainer::Checkpoint(checkpoint))) => {
                        // A checkpoint is never seen before the steps that led to it.
                        self.reporter.flush().await?;
                        self.checkpoints.add(checkpoint);
                    }
                    Ok(Some(FromTrainer::Note(note))) => self.reporter.add_note(&note),
                    Ok(Some(FromTrainer::Finished(finished))) => {
                        break Ending::Finished { finished, initial_valid_loss };
                    }
                    Ok(Some(FromTrainer::Stopped)) => {
                        break match stopping {
                            Some((reason, _)) => Ending::GiveBack(reason),
                            None => Ending::Lost("the trainer stopped unasked".to_owned()),
                        };
                    }
                    Ok(Some(FromTrainer::Failed { code, message, param })) => {
                        break Ending::Failed(ApiError { code, message, param });
                    }
                    Ok(None) => {
                        let exit = trainer.wait(config.exit_grace).await?;
                        break Ending::Lost(exit.to_string());
                    }
                    Err(error) => break Ending::Lost(error.to_string()),
                },
            }
        };
        // What it left complete on the disk counts, however it ended.
        self.reporter.flush().await?;
        self.checkpoints.finish().await?;
        Ok(ending)
    }

    /// Waits up to `grace` for the trainer to exit, if there is one, then kills it: whatever it
    /// still had to say counts no more.
    async fn end_trainer(&mut self, grace: Duration) {
        let Some(mut trainer) = self.trainer.take() else { return };
        if let Err(error) = trainer.wait(grace).await {
            tracing::warn!(job_id = %self.claim.job.id, %error, "the trainer cannot be waited for");
        }
    }
}

/// The span of a part of a job.
fn part(name: &'static str) -> Span {
    tracing::info_span!(target: spans::TARGET, "part", otel.name = name)
}

/// Renews the lease from now on. `asked_at` is when its claim was sent.
fn keep_lease(context: &Context, lease: &Lease, asked_at: Instant) -> LeaseKeeper {
    let (store, lease) = (context.store.clone(), lease.clone());
    LeaseKeeper::start(lease.job_id.clone(), asked_at, context.config.renew_interval, move || {
        let (store, lease) = (store.clone(), lease.clone());
        async move {
            match store.renew_lease(&lease).await {
                Ok(LeaseState { cancel_requested: true, .. }) => Ok(Some(Orders::Cancel)),
                Ok(LeaseState { pause_requested: true, .. }) => Ok(Some(Orders::Pause)),
                Ok(_) => Ok(Some(Orders::Continue)),
                Err(StoreError::StaleLease { .. }) => Ok(None),
                Err(error) => Err(error),
            }
        }
    })
}

/// Returns once the job should go back into the queue, and why.
async fn give_back_wanted(keeper: &LeaseKeeper, shutdown: &CancellationToken) -> GiveBack {
    tokio::select! {
        biased;
        () = shutdown.cancelled() => GiveBack::WorkerStops,
        () = keeper.paused() => GiveBack::Paused,
    }
}

/// Returns once a trainer that was asked to stop has had its time; never if none was asked.
async fn grace_is_over(stopping: Option<(GiveBack, Instant)>) -> GiveBack {
    match stopping {
        Some((reason, until)) => {
            sleep_until(until).await;
            reason
        }
        None => std::future::pending().await,
    }
}
