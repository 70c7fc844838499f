//! The pool of threads to which operations on the CPU hand parts.

/// Runs `work` on a thread of the pool. An operation that begins outside of it wakes a thread of the
/// pool and sleeps until that one is done; within, it takes a part itself at once.
///
/// While `work` waits for a part, its thread may take over what else was given to the pool. So no
/// two works that need the same lock may run at a time.
pub(crate) fn on_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
}
