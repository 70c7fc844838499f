//! The child's protocol over pipes.

use std::io::{PipeReader, PipeWriter, Write as _, pipe};
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};

use serde_json::json;
use tunesmith_core::errors::ErrorCode;
use tunesmith_core::protocol::{FromTrainer, ToTrainer, TrainRequest, read_frame, write_frame};
use tunesmith_engine::child::serve;

use crate::support::Bench;

/// A trainer at the other end of two pipes.
struct Trainer {
    input: Option<PipeWriter>,
    output: PipeReader,
    orphaned: Receiver<()>,
    thread: JoinHandle<ExitCode>,
}

impl Trainer {
    fn start() -> Self {
        let (child_input, input) = pipe().expect("pipe");
        let (output, child_output) = pipe().expect("pipe");
        let (sender, orphaned) = mpsc::channel();
        let thread = thread::spawn(move || {
            serve(child_input, child_output, move || sender.send(()).expect("the test waits"))
        });
        Self { input: Some(input), output, orphaned, thread }
    }

    fn train(request: TrainRequest) -> Self {
        let mut trainer = Self::start();
        trainer.say(&ToTrainer::Train(Box::new(request)));
        trainer
    }

    fn say(&mut self, message: &ToTrainer) {
        write_frame(self.input(), message).expect("the trainer reads");
    }

    fn input(&mut self) -> &mut PipeWriter {
        self.input.as_mut().expect("the input is open")
    }

    fn hear(&mut self) -> Option<FromTrainer> {
        read_frame(&mut self.output).expect("a frame")
    }

    /// Everything up to the end of the trainer's output.
    fn rest(&mut self) -> Vec<FromTrainer> {
        std::iter::from_fn(|| self.hear()).collect()
    }

    fn exit(self) -> ExitCode {
        self.thread.join().expect("no panic")
    }
}

fn is(code: ExitCode, expected: ExitCode) -> bool {
    format!("{code:?}") == format!("{expected:?}")
}

#[test]
fn a_job_is_trained_to_its_end() {
    let bench = Bench::new(4);
    let request = bench.request("out", &json!({"batch_size": 2, "n_epochs": 1}));
    let mut trainer = Trainer::train(request);
    let messages = trainer.rest();
    assert!(matches!(messages.first(), Some(FromTrainer::Started(_))), "{messages:?}");
    assert!(matches!(messages.last(), Some(FromTrainer::Finished { .. })), "{messages:?}");
    assert!(is(trainer.exit(), ExitCode::SUCCESS));
}

#[test]
fn stop_brings_a_checkpoint_and_then_stopped() {
    let bench = Bench::new(4);
    let request =
        bench.request("out", &json!({"batch_size": 1, "n_epochs": 50, "checkpoint_steps": 1000}));
    let mut trainer = Trainer::train(request);
    // After the first step the stop comes in the middle of the work.
    while !matches!(trainer.hear(), Some(FromTrainer::Step(_))) {}
    trainer.say(&ToTrainer::Stop);
    let messages = trainer.rest();
    let [.., FromTrainer::Checkpoint(checkpoint), FromTrainer::Stopped] = &messages[..] else {
        panic!("{messages:?}");
    };
    assert!(checkpoint.for_resume_only && checkpoint.dir.join("state/trainer.json").is_file());
    assert!(is(trainer.exit(), ExitCode::SUCCESS));
}

#[test]
fn the_end_of_its_input_orphans_the_trainer() {
    let bench = Bench::new(4);
    let mut trainer = Trainer::train(bench.request("out", &json!({"n_epochs": 50})));
    assert!(matches!(trainer.hear(), Some(FromTrainer::Started(_))));
    let Trainer { input, output, orphaned, thread } = trainer;
    drop(input);
    orphaned.recv().expect("orphaned");
    // In a process of its own the trainer would be gone by now; here its output breaks.
    drop(output);
    assert!(is(thread.join().expect("no panic"), ExitCode::FAILURE));
}

#[test]
fn a_garbage_frame_at_work_orphans_the_trainer_too() {
    let bench = Bench::new(4);
    let mut trainer = Trainer::train(bench.request("out", &json!({"n_epochs": 50})));
    assert!(matches!(trainer.hear(), Some(FromTrainer::Started(_))));
    trainer.input().write_all(&[0xff; 8]).expect("the trainer reads");
    trainer.orphaned.recv().expect("orphaned");
    drop(trainer.output);
    assert!(is(trainer.thread.join().expect("no panic"), ExitCode::FAILURE));
}

#[test]
fn a_first_frame_that_is_garbage_a_stop_or_nothing_is_answered_with_a_failure() {
    for first in [&b"\0\0\0\x02{}"[..], b"\0\0\0\x0f{\"type\":\"stop\"}", b"\0\0", b""] {
        let mut trainer = Trainer::start();
        trainer.input().write_all(first).expect("the trainer reads");
        trainer.input = None;
        let messages = trainer.rest();
        let [FromTrainer::Failed { code, message, .. }] = &messages[..] else {
            panic!("{messages:?}");
        };
        assert_eq!(*code, ErrorCode::TrainerFailed);
        assert!(message.starts_with("The trainer "), "{message}");
        assert!(is(trainer.exit(), ExitCode::FAILURE));
    }
}

#[test]
fn an_error_of_the_job_is_a_failure_with_its_code_and_parameter() {
    let bench = Bench::new(4);
    let request = bench.request("out", &json!({"n_epochs": 1}));
    std::fs::write(&request.training_file, "{\"messages\": []}\n").expect("data");
    let mut trainer = Trainer::train(request);
    let messages = trainer.rest();
    let [FromTrainer::Failed { code, param, .. }] = &messages[..] else {
        panic!("{messages:?}");
    };
    assert_eq!(*code, ErrorCode::InvalidFileFormat);
    assert_eq!(param.as_deref(), Some("training_file"));
    assert!(is(trainer.exit(), ExitCode::FAILURE));
}

#[test]
fn a_device_that_is_not_there_is_one_failure_that_names_it() {
    let bench = Bench::new(4);
    let mut request = bench.request("out", &json!({"n_epochs": 1}));
    request.device = "cuda:63".to_owned();
    let mut trainer = Trainer::train(request);
    let messages = trainer.rest();
    let [FromTrainer::Failed { code, message, .. }] = &messages[..] else {
        panic!("{messages:?}");
    };
    assert_eq!(*code, ErrorCode::TrainerFailed);
    assert!(message.contains("cuda:63") && message.contains("use cpu"), "{message}");
    assert!(is(trainer.exit(), ExitCode::FAILURE));
}
