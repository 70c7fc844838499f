//! Keeping a job's lease, and knowing without asking when it may be gone.

use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, OwnedMutexGuard, watch};
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::task::AbortOnDropHandle;
use tunesmith_core::ids::JobId;
use tunesmith_store::lease::LEASE_DURATION;

/// What the job's owner wants, as the last renewal brought it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Orders {
    /// Train on.
    Continue,
    /// Write a checkpoint and give the job back.
    Pause,
    /// End the job.
    Cancel,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Held(Orders),
    Lost,
}

/// A lease that a task of its own renews until this is dropped.
pub(crate) struct LeaseKeeper {
    state: watch::Receiver<State>,
    renewals: Arc<Mutex<()>>,
    _keeper: AbortOnDropHandle<()>,
}

impl LeaseKeeper {
    /// Keeps a lease that was asked for at `asked_at`, by calling `renew` again and again.
    ///
    /// `renew` answers `None` when the lease is no longer ours. The time until which the lease
    /// surely holds counts from *before* the last successful renewal was sent: the database began
    /// to count later than that, so it can only expire later there than here. (A machine that was
    /// suspended has a monotonic clock that stood still; there the fence in every write decides.)
    pub(crate) fn start<F, Fut, E>(
        job_id: JobId,
        asked_at: Instant,
        renew_interval: Duration,
        renew: F,
    ) -> Self
    where
        F: FnMut() -> Fut + Send + 'static,
        Fut: Future<Output = Result<Option<Orders>, E>> + Send,
        E: Display + Send,
    {
        let (sender, state) = watch::channel(State::Held(Orders::Continue));
        let renewals = Arc::new(Mutex::new(()));
        let gate = Arc::clone(&renewals);
        let keeper = tokio::spawn(async move {
            let why =
                keep_until_lost(&job_id, asked_at, renew_interval, &gate, &sender, renew).await;
            tracing::warn!(%job_id, "{why}: the trainer is stopped and nothing more is written");
            sender.send_replace(State::Lost);
        });
        Self { state, renewals, _keeper: AbortOnDropHandle::new(keeper) }
    }

    /// Returns once the lease is lost or may be.
    pub(crate) async fn lost(&self) {
        self.reached(|state| state == State::Lost).await;
    }

    /// Returns once the owner wants the job to end.
    pub(crate) async fn cancelled(&self) {
        self.reached(|state| state == State::Held(Orders::Cancel)).await;
    }

    /// Returns once the owner wants the job to rest.
    pub(crate) async fn paused(&self) {
        self.reached(|state| state == State::Held(Orders::Pause)).await;
    }

    /// Holds renewals back while the write that ends the lease is under way: a renewal that came
    /// after it would find no lease and report one that was given up as one that was lost. The
    /// worker's own clock runs on.
    pub(crate) async fn settle(&self) -> OwnedMutexGuard<()> {
        Arc::clone(&self.renewals).lock_owned().await
    }

    async fn reached(&self, wanted: impl Fn(State) -> bool) {
        let mut state = self.state.clone();
        // The channel closes only when the keeper panicked, and then nothing renews the lease:
        // that counts as lost, and as nothing else.
        if state.wait_for(|&state| wanted(state)).await.is_err() && !wanted(State::Lost) {
            std::future::pending::<()>().await;
        }
    }
}

/// Renews until the lease is lost; says why it is.
async fn keep_until_lost<F, Fut, E>(
    job_id: &JobId,
    asked_at: Instant,
    renew_interval: Duration,
    gate: &Mutex<()>,
    sender: &watch::Sender<State>,
    mut renew: F,
) -> &'static str
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<Option<Orders>, E>>,
    E: Display,
{
    const RAN_OUT: &str = "the lease may have run out, as no renewal came through";
    let mut surely_until = asked_at + LEASE_DURATION;
    let mut due = asked_at + renew_interval;
    loop {
        sleep_until(due.min(surely_until)).await;
        let sent_at = Instant::now();
        let renewal = timeout_at(surely_until, async {
            let _alone = gate.lock().await;
            renew().await
        });
        match renewal.await {
            Ok(Ok(Some(orders))) => {
                surely_until = sent_at + LEASE_DURATION;
                due = sent_at + renew_interval;
                sender.send_if_modified(|state| {
                    let next = State::Held(orders);
                    std::mem::replace(state, next) != next
                });
            }
            Ok(Ok(None)) => return "the lease is lost to another worker or to a cancelled job",
            Ok(Err(error)) => {
                tracing::warn!(%job_id, %error, "a lease could not be renewed; trying again");
                due = Instant::now() + renew_interval / 10;
            }
            Err(_) => return RAN_OUT,
        }
        if Instant::now() >= surely_until {
            return RAN_OUT;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};
    use tunesmith_store::lease::LEASE_RENEWAL;

    /// A lease whose n-th renewal, from 1, does what `renew` says.
    fn lease<Fut>(renew: impl Fn(u32) -> Fut + Send + 'static) -> LeaseKeeper
    where
        Fut: Future<Output = Result<Option<Orders>, &'static str>> + Send + 'static,
    {
        let count = AtomicU32::new(0);
        LeaseKeeper::start("ftjob-1".into(), Instant::now(), LEASE_RENEWAL, move || {
            renew(count.fetch_add(1, Ordering::SeqCst) + 1)
        })
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_is_no_longer_ours_is_lost_at_the_next_renewal() {
        let begin = Instant::now();
        let lease = lease(async |n| Ok((n < 3).then_some(Orders::Continue)));
        lease.lost().await;
        assert_eq!(begin.elapsed().as_secs(), 30, "the third renewal found no lease");
    }

    #[tokio::test(start_paused = true)]
    async fn renewals_that_fail_are_tried_again_until_the_own_clock_says_lost() {
        let begin = Instant::now();
        let lease = lease(async |n| if n == 1 { Ok(Some(Orders::Continue)) } else { Err("down") });
        lease.lost().await;
        assert_eq!(begin.elapsed().as_secs(), 40, "30 s after the renewal at 10 s was sent");
    }

    #[tokio::test(start_paused = true)]
    async fn a_renewal_that_never_answers_does_not_hold_the_own_clock_up() {
        let begin = Instant::now();
        let lease = lease(|_| std::future::pending());
        lease.lost().await;
        assert_eq!(begin.elapsed().as_secs(), 30);
    }

    #[tokio::test(start_paused = true)]
    async fn the_time_counts_from_when_a_renewal_was_sent_and_not_from_its_answer() {
        let begin = Instant::now();
        let lease = lease(async |n| {
            if n > 1 {
                return Err("down");
            }
            tokio::time::sleep(Duration::from_secs(15)).await;
            Ok(Some(Orders::Continue))
        });
        lease.lost().await;
        assert_eq!(begin.elapsed().as_secs(), 40, "sent at 10 s, answered at 25 s");
    }

    #[tokio::test(start_paused = true)]
    async fn orders_arrive_with_the_renewal() {
        let begin = Instant::now();
        let lease = lease(async |n| {
            Ok(Some(match n {
                1 => Orders::Continue,
                2 => Orders::Pause,
                _ => Orders::Cancel,
            }))
        });
        lease.paused().await;
        assert_eq!(begin.elapsed().as_secs(), 20);
        lease.cancelled().await;
        assert_eq!(begin.elapsed().as_secs(), 30);
    }

    #[tokio::test(start_paused = true)]
    async fn no_renewal_is_sent_while_the_last_write_is_under_way() {
        let sent = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&sent);
        let lease = lease(move |n| {
            count.store(n, Ordering::SeqCst);
            async { Ok(None) }
        });
        let settling = lease.settle().await;
        tokio::time::sleep(Duration::from_secs(29)).await;
        assert_eq!(sent.load(Ordering::SeqCst), 0);
        drop(settling);
        lease.lost().await;
        assert_eq!(sent.load(Ordering::SeqCst), 1);
    }
}
