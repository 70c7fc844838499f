//! The trainer: a child process that a crash or an out-of-memory kill can take without the worker.

use crate::config::TrainerCommand;
use futures::StreamExt as _;
use std::fmt;
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio_util::codec::{FramedRead, LengthDelimitedCodec};
use tokio_util::task::AbortOnDropHandle;
use tunesmith_core::ids::JobId;
use tunesmith_core::protocol::{
    self, FromTrainer, MAX_FRAME_BYTES, TRAINER_MEMORY, ToTrainer, TrainRequest,
};

/// What goes wrong between a worker and its trainer. None of it is the job's fault as far as the
/// worker can tell, so each costs the job an attempt.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TrainerError {
    /// The operating system did not start it.
    #[error("the trainer {program} did not start: {source}")]
    Start {
        /// The executable.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// A pipe to or from it failed in a way that its exit does not explain.
    #[error("the pipe to the trainer failed: {0}")]
    Pipe(#[from] io::Error),
    /// It wrote something else than a frame of the protocol on its standard output.
    #[error("the trainer wrote something that is not in the protocol: {0}")]
    Protocol(String),
}

/// How a trainer ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Exit {
    status: ExitStatus,
    /// Whether the worker killed it, as it did not exit in its time.
    is_ours: bool,
}

/// A running trainer. Dropping it kills the process.
pub(crate) struct Trainer {
    child: Child,
    /// Kept open while the trainer runs: its end tells the trainer that the worker is gone.
    stdin: ChildStdin,
    messages: FramedRead<ChildStdout, LengthDelimitedCodec>,
    /// Copies its log until it has exited.
    log: Option<AbortOnDropHandle<()>>,
}

impl Trainer {
    /// Starts the program and hands it the request.
    pub(crate) async fn start(
        command: &TrainerCommand,
        request: TrainRequest,
    ) -> Result<Self, TrainerError> {
        let job_id = request.job_id.clone();
        let start_error =
            |source| TrainerError::Start { program: command.program.display().to_string(), source };
        let (name, value) = TRAINER_MEMORY;
        let mut child = Command::new(&command.program)
            .args(&command.args)
            .env(name, std::env::var_os(name).unwrap_or_else(|| value.into()))
            .envs(command.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A Ctrl-C in the worker's terminal is the worker's to obey: it drains, and a trainer
            // in a process group of its own lives to write its checkpoint.
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
        let log = Some(AbortOnDropHandle::new(tokio::spawn(log_lines(stderr, job_id))));
        let mut trainer = Self { child, stdin, messages, log };
        trainer.send(&ToTrainer::Train(Box::new(request))).await?;
        Ok(trainer)
    }

    /// The next message; `None` once the trainer has closed its standard output, which it does by
    /// exiting. May be dropped and called again without losing a message.
    pub(crate) async fn next(&mut self) -> Result<Option<FromTrainer>, TrainerError> {
        let Some(frame) = self.messages.next().await else { return Ok(None) };
        let frame = frame.map_err(|error| TrainerError::Protocol(error.to_string()))?;
        serde_json::from_slice(&frame)
            .map(Some)
            .map_err(|error| TrainerError::Protocol(error.to_string()))
    }

    /// Asks for a checkpoint and an exit.
    pub(crate) async fn stop(&mut self) -> Result<(), TrainerError> {
        self.send(&ToTrainer::Stop).await
    }

    /// Waits up to `grace` for the process to exit, then kills it. May be called again.
    pub(crate) async fn wait(&mut self, grace: Duration) -> Result<Exit, TrainerError> {
        let exit = match tokio::time::timeout(grace, self.child.wait()).await {
            Ok(status) => Exit { status: status?, is_ours: false },
            Err(_) => {
                self.child.start_kill()?;
                Exit { status: self.child.wait().await?, is_ours: true }
            }
        };
        // What it said last is worth a moment; a grandchild that holds the pipe open is not.
        if let Some(log) = self.log.take() {
            let _ = tokio::time::timeout(Duration::from_millis(200), log).await;
        }
        Ok(exit)
    }

    /// Kills the process at once; [`wait`](Self::wait) reaps it.
    pub(crate) fn kill(&mut self) {
        // One that is gone already cannot be killed, which is as good.
        let _ = self.child.start_kill();
    }

    async fn send(&mut self, message: &ToTrainer) -> Result<(), TrainerError> {
        let frame = protocol::encode(message)?;
        let sent = async {
            self.stdin.write_all(&frame).await?;
            self.stdin.flush().await
        };
        match sent.await {
            // It is gone. Its exit status, which the reader's side comes to, says more.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            sent => Ok(sent?),
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SIGKILL: i32 = 9;
        match (self.status.code(), self.status.signal()) {
            _ if self.is_ours => write!(f, "the trainer fell silent and did not exit"),
            (_, Some(SIGKILL)) => write!(
                f,
                "the trainer was killed by signal 9 (SIGKILL), which is also how the system ends \
                 a process when memory runs out"
            ),
            (_, Some(signal)) => write!(f, "the trainer was killed by signal {signal}"),
            (Some(code), None) => {
                write!(f, "the trainer exited with status {code} without a result")
            }
            (None, None) => write!(f, "the trainer ended without a result"),
        }
    }
}

/// Writes the trainer's log lines into the worker's log until the stream ends.
async fn log_lines(stderr: ChildStderr, job_id: JobId) {
    let mut reader = BufReader::new(stderr);
    let mut line = Vec::new();
    loop {
        line.clear();
        match reader.read_until(b'\n', &mut line).await {
            Ok(0) => return,
            Ok(_) => {
                let text = String::from_utf8_lossy(&line);
                tracing::info!(target: "tunesmith::trainer", %job_id, "{}", text.trim_end());
            }
            Err(error) => {
                tracing::warn!(%job_id, %error, "the trainer's log can no longer be read");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(script: &str) -> TrainerCommand {
        TrainerCommand {
            program: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            env: Vec::new(),
        }
    }

    fn request() -> TrainRequest {
        let hyperparameters = tunesmith_core::hyperparameters::Hyperparameters::default().resolve(
            &tunesmith_core::hyperparameters::DataFacts { examples: 10, context_length: 64 },
        );
        TrainRequest {
            job_id: "ftjob-1".into(),
            spec: tunesmith_core::job::TrainSpec {
                model: "tiny".to_owned(),
                seed: 1,
                hyperparameters,
            },
            base_model_dir: "/nowhere".into(),
            training_file: "/nowhere".into(),
            validation_file: None,
            resume_from: None,
            output_dir: "/nowhere".into(),
            device: "cpu".to_owned(),
        }
    }

    async fn start(script: &str) -> Trainer {
        Trainer::start(&command(script), request()).await.expect("start")
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named() {
        let command = TrainerCommand {
            program: "/no/such/trainer".into(),
            args: Vec::new(),
            env: Vec::new(),
        };
        let error = Trainer::start(&command, request()).await.err().expect("no start");
        assert!(error.to_string().contains("/no/such/trainer"), "{error}");
    }

    #[tokio::test]
    async fn a_child_that_dies_at_once_ends_the_messages_and_leaves_its_status() {
        let mut trainer = start("exit 7").await;
        assert_eq!(trainer.next().await.expect("end"), None);
        trainer.stop().await.expect("a closed pipe is not an error");
        let exit = trainer.wait(Duration::from_secs(10)).await.expect("exit");
        assert_eq!(exit.to_string(), "the trainer exited with status 7 without a result");
    }

    #[tokio::test]
    async fn text_on_standard_output_is_a_protocol_error() {
        let mut trainer = start("echo hello world").await;
        assert!(matches!(trainer.next().await, Err(TrainerError::Protocol(_))));
    }

    #[tokio::test]
    async fn a_torn_frame_is_a_protocol_error_and_not_an_end() {
        let mut trainer = start(r"printf '\000\000\000\020{'").await;
        assert!(matches!(trainer.next().await, Err(TrainerError::Protocol(_))));
    }

    #[tokio::test]
    async fn a_child_that_does_not_exit_is_killed_after_its_grace() {
        let mut trainer = start("exec sleep 600").await;
        let exit = trainer.wait(Duration::ZERO).await.expect("exit");
        assert_eq!(exit.status.signal(), Some(9));
        assert_eq!(exit.to_string(), "the trainer fell silent and did not exit");
    }

    #[tokio::test]
    async fn the_request_is_the_first_frame_on_standard_input() {
        let dir = tempfile::tempdir().expect("temp dir");
        let seen = dir.path().join("seen");
        let mut trainer = start(&format!("head -c 30 > {}", seen.display())).await;
        trainer.wait(Duration::from_secs(10)).await.expect("status");
        let seen = std::fs::read(seen).expect("what the child read");
        let length = u32::from_be_bytes([seen[0], seen[1], seen[2], seen[3]]) as usize;
        assert_eq!(
            length + 4,
            protocol::encode(&ToTrainer::Train(Box::new(request()))).expect("frame").len()
        );
        assert!(seen[4..].starts_with(br#"{"type":"train","#), "{seen:?}");
    }
}
