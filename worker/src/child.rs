//! A child process that speaks frames on its standard input and output: one that a crash or an
//! out-of-memory kill can take without its parent. A trainer is one, and a sampler's child.

use futures::StreamExt as _;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio_util::codec::{FramedRead, LengthDelimitedCodec};
use tokio_util::task::AbortOnDropHandle;
use tunesmith_core::protocol::{self, MAX_FRAME_BYTES};

/// A child's command line. It speaks frames (see [`tunesmith_core::protocol`]) on standard input
/// and output, and logs to standard error.
#[derive(Debug, Clone)]
pub struct ChildCommand {
    /// The executable: as a rule the parent's own.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Environment variables on top of the parent's own.
    pub env: Vec<(OsString, OsString)>,
}

/// What goes wrong between a parent and its child.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// The operating system did not start it.
    #[error("the {who} {program} did not start: {source}")]
    Start {
        /// What it is to its parent.
        who: &'static str,
        /// The executable.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// A pipe to or from it failed in a way that its exit does not explain.
    #[error("the pipe to the child failed: {0}")]
    Pipe(#[from] io::Error),
    /// It wrote something else than a frame of the protocol on its standard output.
    #[error("the {who} wrote something that is not in the protocol: {reason}")]
    Protocol {
        /// What it is to its parent.
        who: &'static str,
        /// What is wrong.
        reason: String,
    },
}

/// How a child ended.
#[derive(Debug, Clone, Copy)]
pub struct Exit {
    who: &'static str,
    status: ExitStatus,
    /// Whether the parent killed it, as it did not exit in its time.
    is_ours: bool,
}

/// A running child, which is sent `S` and says `R`. Dropping it kills the process.
#[derive(Debug)]
pub struct FramedChild<S, R> {
    who: &'static str,
    child: Child,
    /// Kept open while the child runs: its end tells the child that its parent is gone.
    stdin: Option<ChildStdin>,
    messages: FramedRead<ChildStdout, LengthDelimitedCodec>,
    /// Copies its log until it has exited.
    log: Option<AbortOnDropHandle<()>>,
    speaks: PhantomData<fn(S) -> R>,
}

impl<S: Serialize, R: DeserializeOwned> FramedChild<S, R> {
    /// Starts the program. `who` it is goes into errors, and each line of its standard error to
    /// `log`.
    ///
    /// # Errors
    /// [`ChildError::Start`].
    pub fn start(
        who: &'static str,
        command: &ChildCommand,
        log: impl Fn(&str) + Send + 'static,
    ) -> Result<Self, ChildError> {
        let start_error = |source| ChildError::Start {
            who,
            program: command.program.display().to_string(),
            source,
        };
        let mut child = Command::new(&command.program)
            .args(&command.args)
            .envs(command.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A Ctrl-C in the parent's terminal is the parent's to obey: it drains, and a child
            // in a process group of its own lives to finish.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(start_error)?;
        let (Some(stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(start_error(io::ErrorKind::BrokenPipe.into()));
        };
        let messages = LengthDelimitedCodec::builder()
            .big_endian()
            .length_field_length(4)
            .max_frame_length(MAX_FRAME_BYTES)
            .new_read(stdout);
        let log = Some(AbortOnDropHandle::new(tokio::spawn(log_lines(stderr, log))));
        Ok(Self { who, child, stdin: Some(stdin), messages, log, speaks: PhantomData })
    }

    /// The next message; `None` once the child has closed its standard output, which it does by
    /// exiting. May be dropped and called again without losing a message.
    ///
    /// # Errors
    /// [`ChildError::Protocol`].
    pub async fn next(&mut self) -> Result<Option<R>, ChildError> {
        let Some(frame) = self.messages.next().await else { return Ok(None) };
        let frame = frame.map_err(|error| self.protocol(&error))?;
        serde_json::from_slice(&frame).map(Some).map_err(|error| self.protocol(&error))
    }

    /// Sends a message. One that is gone hears nothing, which its exit status says more of.
    ///
    /// # Errors
    /// [`ChildError::Pipe`].
    pub async fn send(&mut self, message: &S) -> Result<(), ChildError> {
        let frame = protocol::encode(message)?;
        let Some(stdin) = &mut self.stdin else { return Ok(()) };
        let sent = async {
            stdin.write_all(&frame).await?;
            stdin.flush().await
        };
        match sent.await {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            sent => Ok(sent?),
        }
    }

    /// Ends its standard input, which tells it to exit.
    pub fn close(&mut self) {
        self.stdin = None;
    }

    /// Waits up to `grace` for the process to exit, then kills it. May be called again.
    ///
    /// # Errors
    /// [`ChildError::Pipe`].
    pub async fn wait(&mut self, grace: Duration) -> Result<Exit, ChildError> {
        let who = self.who;
        let exit = match tokio::time::timeout(grace, self.child.wait()).await {
            Ok(status) => Exit { who, status: status?, is_ours: false },
            Err(_) => {
                self.child.start_kill()?;
                Exit { who, status: self.child.wait().await?, is_ours: true }
            }
        };
        // What it said last is worth a moment; a grandchild that holds the pipe open is not.
        if let Some(log) = self.log.take() {
            let _ = tokio::time::timeout(Duration::from_millis(200), log).await;
        }
        Ok(exit)
    }

    /// Kills the process at once; [`wait`](Self::wait) reaps it.
    pub fn kill(&mut self) {
        // One that is gone already cannot be killed, which is as good.
        let _ = self.child.start_kill();
    }

    fn protocol(&self, reason: &dyn fmt::Display) -> ChildError {
        ChildError::Protocol { who: self.who, reason: reason.to_string() }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SIGKILL: i32 = 9;
        let who = self.who;
        match (self.status.code(), self.status.signal()) {
            _ if self.is_ours => write!(f, "the {who} fell silent and did not exit"),
            (_, Some(SIGKILL)) => write!(
                f,
                "the {who} was killed by signal 9 (SIGKILL), which is also how the system ends \
                 a process when memory runs out"
            ),
            (_, Some(signal)) => write!(f, "the {who} was killed by signal {signal}"),
            (Some(code), None) => write!(f, "the {who} exited with status {code} without a result"),
            (None, None) => write!(f, "the {who} ended without a result"),
        }
    }
}

/// Hands the child's log lines on until the stream ends.
async fn log_lines(stderr: ChildStderr, log: impl Fn(&str)) {
    let mut reader = BufReader::new(stderr);
    let mut line = Vec::new();
    loop {
        line.clear();
        match reader.read_until(b'\n', &mut line).await {
            Ok(0) => return,
            Ok(_) => log(String::from_utf8_lossy(&line).trim_end()),
            Err(error) => {
                tracing::warn!(%error, "a child's log can no longer be read");
                return;
            }
        }
    }
}
