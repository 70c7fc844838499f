//! Checkpoints on their way into the object store, one after another, while training goes on.

use crate::retry::retry;
use crate::session::SessionError;
use crate::transfer::upload_dir;
use futures::future::BoxFuture;
use std::collections::VecDeque;
use tunesmith_core::protocol::{CheckpointWritten, STATE_DIR, WEIGHTS_DIR};
use tunesmith_core::weights::CheckpointPlace;
use tunesmith_store::Store;
use tunesmith_store::lease::{Lease, NewCheckpoint, SupersededCheckpoint};
use tunesmith_store::objects::ObjectPrefix;

/// Checkpoints that may wait on the local disk. When more are written, the trainer's messages are
/// left in the pipe until there is room, and it comes to wait as well: a slow object store slows
/// training down instead of filling the disk.
const MAX_WAITING: usize = 2;

/// The queue of one job.
pub(crate) struct Checkpoints {
    store: Store,
    lease: Lease,
    waiting: VecDeque<CheckpointWritten>,
    current: Option<BoxFuture<'static, Result<(), SessionError>>>,
}

impl Checkpoints {
    pub(crate) fn new(store: Store, lease: Lease) -> Self {
        Self { store, lease, waiting: VecDeque::new(), current: None }
    }

    /// Takes a checkpoint in that lies complete on the local disk.
    pub(crate) fn add(&mut self, checkpoint: CheckpointWritten) {
        self.waiting.push_back(checkpoint);
    }

    /// Whether another may be added.
    pub(crate) fn has_room(&self) -> bool {
        self.waiting.len() < MAX_WAITING
    }

    /// Whether everything is stored and recorded.
    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.current.is_none()
    }

    /// Works on the oldest checkpoint until it is recorded; at once if there is none. May be
    /// dropped half-way and called again: it goes on where it was.
    pub(crate) async fn advance(&mut self) -> Result<(), SessionError> {
        if self.current.is_none() {
            let Some(next) = self.waiting.pop_front() else { return Ok(()) };
            self.current = Some(Box::pin(keep(self.store.clone(), self.lease.clone(), next)));
        }
        if let Some(current) = &mut self.current {
            let done = current.await;
            self.current = None;
            done?;
        }
        Ok(())
    }

    /// Works until everything is recorded.
    pub(crate) async fn finish(&mut self) -> Result<(), SessionError> {
        while !self.is_idle() {
            self.advance().await?;
        }
        Ok(())
    }
}

/// Stores a checkpoint's files, then points the job at it, then lets go of what it replaces.
async fn keep(
    store: Store,
    lease: Lease,
    checkpoint: CheckpointWritten,
) -> Result<(), SessionError> {
    let objects = store.objects();
    let place = CheckpointPlace {
        job: lease.job_id.clone(),
        attempt: lease.attempt,
        step: checkpoint.step,
    };
    let weights = ObjectPrefix::CheckpointWeights(place.clone());
    upload_dir(objects, &weights, &checkpoint.dir.join(WEIGHTS_DIR)).await?;
    let state = ObjectPrefix::CheckpointState(place);
    upload_dir(objects, &state, &checkpoint.dir.join(STATE_DIR)).await?;
    let new = NewCheckpoint {
        step: checkpoint.step,
        metrics: checkpoint.metrics,
        for_resume_only: checkpoint.for_resume_only,
    };
    let superseded = retry("record_checkpoint", || store.record_checkpoint(&lease, &new)).await?;
    tracing::info!(job_id = %lease.job_id, step = new.step, "a checkpoint is stored");
    if let Some(superseded) = superseded {
        discard(&store, superseded).await;
    }
    if let Err(error) = tokio::fs::remove_dir_all(&checkpoint.dir).await {
        let path = checkpoint.dir.display();
        tracing::warn!(%path, %error, "a stored checkpoint stays on disk");
    }
    Ok(())
}

/// Removes the objects of a checkpoint that nothing will resume from. What stays is only litter.
async fn discard(store: &Store, superseded: SupersededCheckpoint) {
    let SupersededCheckpoint { place, weights_too } = superseded;
    let mut prefixes = vec![ObjectPrefix::CheckpointState(place.clone())];
    if weights_too {
        prefixes.push(ObjectPrefix::CheckpointWeights(place));
    }
    for prefix in prefixes {
        if let Err(error) = store.objects().delete_prefix(&prefix).await {
            tracing::warn!(%error, "objects of a replaced checkpoint stay in the object store");
        }
    }
}
