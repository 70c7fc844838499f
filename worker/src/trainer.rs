//! The trainer: a child process that a crash or an out-of-memory kill can take without the worker.

use crate::child::{ChildCommand, ChildError, Exit, FramedChild};
use std::time::Duration;
use tunesmith_core::protocol::{FromTrainer, TRAINER_MEMORY, ToTrainer, TrainRequest};

/// A running trainer. Dropping it kills the process. None of what goes wrong with it is the job's
/// fault as far as the worker can tell, so each costs the job an attempt.
pub(crate) struct Trainer(FramedChild<ToTrainer, FromTrainer>);

impl Trainer {
    /// Starts the program and hands it the request.
    pub(crate) async fn start(
        command: &ChildCommand,
        request: TrainRequest,
    ) -> Result<Self, ChildError> {
        let job_id = request.job_id.clone();
        let (name, value) = TRAINER_MEMORY;
        let mut command = command.clone();
        // What the user has set, or the command has, comes first.
        if std::env::var_os(name).is_none() && !command.env.iter().any(|(set, _)| set == name) {
            command.env.push((name.into(), value.into()));
        }
        let log = move |line: &str| {
            tracing::info!(target: "tunesmith::trainer", %job_id, "{line}");
        };
        let mut trainer = Self(FramedChild::start("trainer", &command, log)?);
        trainer.0.send(&ToTrainer::Train(Box::new(request))).await?;
        Ok(trainer)
    }

    /// The next message; `None` once the trainer has closed its standard output, which it does by
    /// exiting. May be dropped and called again without losing a message.
    pub(crate) async fn next(&mut self) -> Result<Option<FromTrainer>, ChildError> {
        self.0.next().await
    }

    /// Asks for a checkpoint and an exit.
    pub(crate) async fn stop(&mut self) -> Result<(), ChildError> {
        self.0.send(&ToTrainer::Stop).await
    }

    /// Waits up to `grace` for the process to exit, then kills it. May be called again.
    pub(crate) async fn wait(&mut self, grace: Duration) -> Result<Exit, ChildError> {
        self.0.wait(grace).await
    }

    /// Kills the process at once; [`wait`](Self::wait) reaps it.
    pub(crate) fn kill(&mut self) {
        self.0.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tunesmith_core::protocol;

    fn command(script: &str) -> ChildCommand {
        ChildCommand {
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
            start_from: None,
            spec: tunesmith_core::job::TrainSpec {
                start_from: None,
                model: "tiny".to_owned(),
                base_is_tuned: false,
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
        let command =
            ChildCommand { program: "/no/such/trainer".into(), args: Vec::new(), env: Vec::new() };
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
        assert!(matches!(trainer.next().await, Err(ChildError::Protocol { .. })));
    }

    #[tokio::test]
    async fn a_torn_frame_is_a_protocol_error_and_not_an_end() {
        let mut trainer = start(r"printf '\000\000\000\020{'").await;
        assert!(matches!(trainer.next().await, Err(ChildError::Protocol { .. })));
    }

    #[tokio::test]
    async fn a_child_that_does_not_exit_is_killed_after_its_grace() {
        let mut trainer = start("exec sleep 600").await;
        let exit = trainer.wait(Duration::ZERO).await.expect("exit");
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
