//! Steps on their way into the database: gathered for up to a second, then written together.

use crate::messages::{step_data, step_message};
use crate::retry::retry;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};
use tunesmith_core::metrics::StepMetrics;
use tunesmith_store::events::NewEvent;
use tunesmith_store::lease::Lease;
use tunesmith_store::{Store, StoreError};

/// Steps that a trainer has told of and that are not written yet.
pub(crate) struct Reporter {
    store: Store,
    lease: Lease,
    flush_interval: Duration,
    total_steps: u64,
    steps: Vec<StepMetrics>,
    /// When the oldest of `steps` is to be written.
    due: Option<Instant>,
}

impl Reporter {
    pub(crate) fn new(store: Store, lease: Lease, flush_interval: Duration) -> Self {
        Self { store, lease, flush_interval, total_steps: 0, steps: Vec::new(), due: None }
    }

    /// The N of `Step n/N`, known once the run has begun.
    pub(crate) fn set_total_steps(&mut self, total_steps: u64) {
        self.total_steps = total_steps;
    }

    /// Takes a step in.
    pub(crate) fn add(&mut self, step: StepMetrics) {
        self.due.get_or_insert_with(|| Instant::now() + self.flush_interval);
        self.steps.push(step);
    }

    /// Returns when [`flush`](Self::flush) should be called: never while there is nothing to write.
    pub(crate) async fn is_due(&self) {
        match self.due {
            Some(due) => sleep_until(due).await,
            None => std::future::pending().await,
        }
    }

    /// Writes what there is. Steps are forgotten only once they are written, so this may be
    /// dropped half-way and called again.
    pub(crate) async fn flush(&mut self) -> Result<(), StoreError> {
        if !self.steps.is_empty() {
            let events: Vec<_> = self.steps.iter().map(|step| self.event(step)).collect();
            retry("record_steps", || self.store.record_steps(&self.lease, &self.steps, &events))
                .await?;
            self.steps.clear();
        }
        self.due = None;
        Ok(())
    }

    fn event(&self, step: &StepMetrics) -> NewEvent {
        let total = self.total_steps;
        NewEvent::step(step.step, step_message(step, total), step_data(step, total))
    }
}
