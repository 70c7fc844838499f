//! A trainer in a process of its own, killed in the middle of a step.

use std::io;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use tunesmith_core::protocol::{FromTrainer, ToTrainer, TrainRequest, read_frame, write_frame};
use tunesmith_engine::child::serve;

use crate::resume::{check_equal, resumed, ten_steps};
use crate::support::{Bench, Transcript, finish};

/// The last step that the killed trainer reports; its checkpoint is that of step 4.
const LAST_STEP: u64 = 5;
/// How often a kill may come after its step was over, before the test gives up.
const TRIES: usize = 20;

#[test]
#[ignore = "the process that the test below starts and kills"]
fn trainer_process() {
    // What the test harness prints goes to standard output, so the frames go to standard error.
    let code = serve(io::stdin(), io::stderr(), || std::process::exit(3));
    assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::SUCCESS));
}

fn start(request: &TrainRequest) -> Child {
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "--ignored", "--nocapture", "kill::trainer_process"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a process");
    let input = child.stdin.as_mut().expect("piped");
    write_frame(input, &ToTrainer::Train(Box::new(request.clone()))).expect("the request");
    child
}

/// What a trainer said until it was killed with SIGKILL within the step after [`LAST_STEP`]; None
/// when the kill came too late for that.
fn killed_within_a_step(request: &TrainRequest) -> Option<Transcript> {
    let mut child = start(request);
    let mut output = child.stderr.take().expect("piped");
    let mut transcript = Transcript::default();
    let mut seconds = Vec::new();
    while transcript.steps.last().is_none_or(|step| step.step < LAST_STEP) {
        let message = read_frame(&mut output).expect("a frame").expect("the trainer goes on");
        if let FromTrainer::Step(metrics) = &message {
            seconds.push(metrics.elapsed_seconds);
        }
        transcript.take(message);
    }
    // Half a step on, some of its micro-batches are done and others are not.
    let step_seconds = (seconds[seconds.len() - 1] - seconds[0]) / (seconds.len() - 1) as f64;
    thread::sleep(Duration::from_secs_f64(step_seconds / 2.0));
    child.kill().expect("SIGKILL");
    child.wait().expect("its end");
    // A frame that the kill tore apart is no message.
    while let Ok(Some(message)) = read_frame(&mut output) {
        transcript.take(message);
    }
    (transcript.steps.len() as u64 == LAST_STEP).then_some(transcript)
}

fn killed_and_resumed(adapter: Value) {
    let bench = Bench::new(400);
    // Many passes to a step: nearly all of its time is between its first pass and its last.
    let mut fields = ten_steps(adapter);
    fields["gradient_accumulation_steps"] = json!(64);
    fields["eval_steps"] = json!(4);
    let straight = finish(&bench.request("straight", &fields));
    let first = (0..TRIES)
        .find_map(|attempt| {
            killed_within_a_step(&bench.request(&format!("first-{attempt}"), &fields))
        })
        .expect("a kill within a step");
    assert_eq!(first.checkpoints.last().map(|written| written.step), Some(4));
    let from: &Path = first.checkpoint(4);
    let second = finish(&resumed(&bench, "second", &fields, from));
    check_equal(&straight, &first, &second, 4);
}

#[test]
fn a_trainer_killed_in_the_middle_of_an_accumulation_is_resumed_bit_equal_with_lora() {
    killed_and_resumed(json!({"type": "lora", "r": 3, "dropout": 0.2}));
}

#[test]
fn a_trainer_killed_in_the_middle_of_an_accumulation_is_resumed_bit_equal_with_all_weights() {
    killed_and_resumed(json!({"type": "full"}));
}
