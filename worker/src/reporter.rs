//! Steps and notes on their way into the database: gathered for up to a second, then written
//! together.

use crate::messages::{step_data, step_message};
use crate::retry::retry;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};
use tunesmith_core::metrics::{MAX_ROW_LOSSES, RowLoss, StepMetrics};
use tunesmith_core::protocol::Note;
use tunesmith_store::events::NewEvent;
use tunesmith_store::lease::Lease;
use tunesmith_store::{Store, StoreError};

/// What a trainer has told of and what is not written yet.
pub(crate) struct Reporter {
    store: Store,
    lease: Lease,
    flush_interval: Duration,
    total_steps: u64,
    steps: Vec<StepMetrics>,
    /// By the row's number: what it showed last.
    rows: BTreeMap<u64, RowLoss>,
    /// What there is to say of the steps, and the notes between them.
    events: Vec<NewEvent>,
    /// When the oldest of these is to be written.
    due: Option<Instant>,
}

impl Reporter {
    pub(crate) fn new(store: Store, lease: Lease, flush_interval: Duration) -> Self {
        Self {
            store,
            lease,
            flush_interval,
            total_steps: 0,
            steps: Vec::new(),
            rows: BTreeMap::new(),
            events: Vec::new(),
            due: None,
        }
    }

    /// The N of `Step n/N`, known once the run has begun.
    pub(crate) fn set_total_steps(&mut self, total_steps: u64) {
        self.total_steps = total_steps;
    }

    /// Takes a step in.
    pub(crate) fn add(&mut self, step: StepMetrics) {
        let total = self.total_steps;
        let event = NewEvent::step(step.step, step_message(&step, total), step_data(&step, total));
        // A run that went back to a checkpoint trains a step again: the last time counts.
        self.steps.retain(|other| other.step != step.step);
        self.steps.push(step);
        self.say(event);
    }

    /// Takes rows in; they are written with the step that comes after them.
    pub(crate) fn add_rows(&mut self, rows: Vec<RowLoss>) {
        let kept = rows.into_iter().filter(|loss| loss.row < MAX_ROW_LOSSES);
        self.rows.extend(kept.map(|loss| (loss.row, loss)));
    }

    /// Takes a note in.
    pub(crate) fn add_note(&mut self, note: &Note) {
        self.say(NewEvent::note(note));
    }

    fn say(&mut self, event: NewEvent) {
        self.due.get_or_insert_with(|| Instant::now() + self.flush_interval);
        self.events.push(event);
    }

    /// Returns when [`flush`](Self::flush) should be called: never while there is nothing to write.
    pub(crate) async fn is_due(&self) {
        match self.due {
            Some(due) => sleep_until(due).await,
            None => std::future::pending().await,
        }
    }

    /// Writes what there is. It is forgotten only once it is written, so this may be dropped
    /// half-way and called again.
    pub(crate) async fn flush(&mut self) -> Result<(), StoreError> {
        if !self.rows.is_empty() {
            let rows: Vec<_> = self.rows.values().cloned().collect();
            retry("record_row_losses", || self.store.record_row_losses(&self.lease, &rows)).await?;
            self.rows.clear();
        }
        if !self.events.is_empty() {
            retry("record_steps", || {
                self.store.record_steps(&self.lease, &self.steps, &self.events)
            })
            .await?;
            self.steps.clear();
            self.events.clear();
        }
        self.due = None;
        Ok(())
    }
}
