//! The pool of threads to which operations on the CPU hand parts.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rayon::Yield;

/// How long a thread looks for parts before it may sleep.
const PATIENCE: Duration = Duration::from_millis(5);
/// Spins between two looks.
const SPINS: usize = 64;

/// Works that are running.
static WORKS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Whether this thread runs a work, or looks for parts already.
    static IS_TAKEN: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` on a thread of the pool. An operation that begins outside of it wakes a thread of the
/// pool and sleeps until that one is done; within, it takes a part itself at once.
///
/// While it runs, the other threads look for parts without a pause: one that sleeps takes longer to
/// wake than many a part takes.
///
/// While `work` waits for a part, its thread may take over what else was given to the pool. So no
/// two works that need the same lock may run at a time.
pub(crate) fn on_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| {
        let _taken = Taken::take();
        let _running = Running::begin();
        work()
    })
}

/// A work that is running.
struct Running;

impl Running {
    fn begin() -> Self {
        if WORKS.fetch_add(1, Ordering::Relaxed) == 0 {
            rayon::spawn_broadcast(|_| {
                look_for_parts();
            });
        }
        Self
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        WORKS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Takes parts until no work runs or none gives any; false on a thread that is taken.
fn look_for_parts() -> bool {
    let taken = Taken::take();
    // The thread of a work gets here while it waits for a part: it must go on when that is done.
    if taken.was_taken {
        return false;
    }
    let mut last = Instant::now();
    while WORKS.load(Ordering::Relaxed) > 0 && last.elapsed() < PATIENCE {
        if rayon::yield_now() == Some(Yield::Executed) {
            last = Instant::now();
        } else {
            (0..SPINS).for_each(|_| std::hint::spin_loop());
        }
    }
    true
}

/// A thread that is taken.
struct Taken {
    was_taken: bool,
}

impl Taken {
    fn take() -> Self {
        Self { was_taken: IS_TAKEN.replace(true) }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        IS_TAKEN.set(self.was_taken);
    }
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;

    /// A work of many short parts.
    fn sum(work: u64) -> u64 {
        (0..200).map(|part| (0..64).into_par_iter().map(|x| x ^ part ^ work).sum::<u64>()).sum()
    }

    #[test]
    fn works_at_a_time_and_within_each_other_all_end() {
        std::thread::scope(|scope| {
            for work in 0..8 {
                scope.spawn(move || {
                    for _ in 0..50 {
                        let sums = on_pool(|| (sum(work), on_pool(|| sum(work + 1))));
                        assert_eq!(sums, (sum(work), sum(work + 1)));
                    }
                });
            }
        });
    }

    #[test]
    fn thread_of_a_work_does_not_look_for_parts() {
        on_pool(|| assert!(!look_for_parts()));
        assert!(look_for_parts(), "this thread has no work");
    }
}
