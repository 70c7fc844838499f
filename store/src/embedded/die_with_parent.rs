//! A child that gets a signal when its parent dies, however the parent dies.
//!
//! This is the one place with unsafe code in this crate: what must be done lies between `fork` and
//! `exec`, and the standard library's hook for that is unsafe because only functions that are safe
//! in a forked child of a threaded process may be called there. The two below are bare system
//! calls that neither allocate nor lock.
#![expect(unsafe_code, reason = "Command::pre_exec has no safe form; see above")]

use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal};
use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

/// Lets the child of `command` get `signal` when the *thread* that spawns it ends. Only a thread
/// that lives as long as the child should may spawn it.
///
/// The kernel forgets the wish when the child changes its user; the standard library does that
/// before it calls this hook.
pub(super) fn die_with_parent(command: &mut Command, signal: Signal) {
    let parent: Pid = getpid();
    let hook = move || {
        set_parent_process_death_signal(Some(signal))?;
        // The parent may have died before the wish was heard.
        if getppid() == Some(parent) { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    };
    // SAFETY: `hook` makes two system calls and touches nothing but the values it owns.
    unsafe {
        command.pre_exec(hook);
    }
}
