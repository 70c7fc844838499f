//! A child process that lives no longer than this one.

use super::die_with_parent::die_with_parent;
use rustix::process::{Pid, Signal, kill_process};
use std::io;
use std::process::{Command, ExitStatus};
use tokio::sync::{oneshot, watch};

/// A running child.
#[derive(Debug)]
pub(super) struct Server {
    pid: Pid,
    exit: watch::Receiver<Option<ExitStatus>>,
}

impl Server {
    /// Starts `command` from a thread that does nothing else and lives until the child has ended:
    /// the kernel's signal at the parent's death comes when the spawning *thread* ends, and a
    /// thread of a runtime may end at any time.
    pub(super) async fn spawn(mut command: Command) -> io::Result<Self> {
        die_with_parent(&mut command, Signal::INT);
        let (started, on_start) = oneshot::channel();
        let (exited, exit) = watch::channel(None);
        std::thread::Builder::new().name("postgres".to_owned()).spawn(move || {
            let mut child = match command.spawn() {
                Ok(child) => child,
                Err(error) => return drop(started.send(Err(error))),
            };
            // Nobody to tell means that the starter was cancelled, and so must be the child.
            if started.send(Ok(child.id())).is_err() {
                drop(child.kill());
            }
            match child.wait() {
                Ok(status) => drop(exited.send(Some(status))),
                Err(error) => tracing::error!(%error, "a child could not be waited for"),
            }
        })?;
        let id = on_start.await.map_err(|_| io::Error::other("the spawning thread ended"))??;
        let pid = i32::try_from(id).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| io::Error::other(format!("{id} is no process id")))?;
        Ok(Self { pid, exit })
    }

    /// How the child ended; `None` while it runs.
    pub(super) fn status(&self) -> Option<ExitStatus> {
        *self.exit.borrow()
    }

    /// Waits for the child's end.
    pub(super) async fn exited(&self) -> io::Result<ExitStatus> {
        let mut exit = self.exit.clone();
        let status = exit.wait_for(Option::is_some).await;
        status.ok().and_then(|status| *status).ok_or_else(|| io::Error::other("lost track of it"))
    }

    /// Sends a signal, unless the child has ended.
    pub(super) fn signal(&self, signal: Signal) {
        if self.status().is_none()
            && let Err(error) = kill_process(self.pid, signal)
        {
            tracing::warn!(%error, "PostgreSQL could not be signalled");
        }
    }

    #[cfg(any(test, feature = "test-support"))]
    pub(super) fn pid(&self) -> Pid {
        self.pid
    }
}
