//! Whole jobs: a real database, a real object store, a worker, and a trainer that is a process of
//! its own and follows a script.

mod support;
mod tuned_bases;

use serde_json::json;
use std::time::Duration;
use support::{World, eventually, is_alive};
use tunesmith_core::errors::ErrorCode;
use tunesmith_core::state::JobStatus;
use tunesmith_core::weights::CheckpointPlace;
use tunesmith_store::events::EventType;
use tunesmith_store::jobs::Job;
use tunesmith_store::objects::{ObjectKey, ObjectPrefix};

/// The step at which the job's last attempt began.
fn resumed_from(job: &Job) -> u64 {
    job.run.as_ref().expect("it ran").resumed_from_step
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_nothing_disturbs_leaves_everything_in_its_place() {
    let world = World::new().await;
    let id = world.queued_job().await;
    let script = json!({"total_steps": 5, "checkpoint_steps": 2, "validation": true});
    let worker = world.start(world.config(&script));
    let job = world.ended(&id).await;
    worker.drain().await;

    assert_eq!(job.status, JobStatus::Succeeded);
    assert_eq!(job.attempt, 1);
    assert_eq!(job.trained_tokens, Some(50));
    world.assert_each_step_once(&id, 5).await;
    assert_eq!(world.checkpoint_steps(&id).await, [2, 4, 5]);

    // A checkpoint is told of as soon as it is stored, which is after its own step and at any
    // place among the later ones.
    let messages = world.messages(&id).await;
    let is_checkpoint = |message: &String| message.starts_with("Checkpoint created at step");
    let others: Vec<&String> = messages.iter().filter(|message| !is_checkpoint(message)).collect();
    let curve = world.curve(&id).await;
    let step = |n: usize| {
        let valid = curve[n - 1].valid_loss;
        let valid = valid.map(|loss| format!(", validation loss={loss:.4}")).unwrap_or_default();
        format!("Step {n}/5: training loss={:.4}{valid}", curve[n - 1].train_loss)
    };
    assert_eq!(
        others,
        [
            &format!("Created fine-tuning job: {id}"),
            &format!("Validating training file: {}", job.training_file),
            "Files validated, moving job to queued state",
            "Fine-tuning job started",
            &step(1),
            &step(2),
            &step(3),
            &step(4),
            &step(5),
            &format!("New fine-tuned model created: {}", job.model_name),
            "The job has successfully completed.",
        ]
    );
    assert!(step(2).contains("validation loss="));
    for n in [2, 4, 5] {
        let place = |start: String| messages.iter().position(|message| message.starts_with(&start));
        let checkpoint = place(format!("Checkpoint created at step {n} with Snapshot ID: ftckpt_"));
        assert!(checkpoint.expect("told") > place(format!("Step {n}/5")).expect("told"));
    }

    let model = world.store.model(&world.project, &job.model_name).await.expect("model");
    let weights = world.store.objects().list(&model.weights()).await.expect("list");
    let names: Vec<&str> = weights.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]);

    let objects = world.store.objects();
    let result = ObjectKey::File(job.result_file.expect("result file"));
    let csv = objects.read(&result).await.expect("content");
    let csv = std::str::from_utf8(&csv).expect("text");
    let mut lines = csv.lines();
    assert_eq!(
        lines.next(),
        Some("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy")
    );
    let cells: Vec<Vec<f64>> = lines
        .map(|line| line.split(',').map(|cell| cell.parse().expect("a number")).collect())
        .collect();
    assert_eq!(cells.len(), 5);
    assert!(cells.iter().flatten().all(|cell| cell.is_finite()));
    assert_eq!(cells[0][3], 9.0, "the loss before the first step");
    assert_eq!(cells[2][3], cells[1][3], "the last evaluation is carried");

    for step in [2, 4, 5] {
        let place = CheckpointPlace { job: id.clone(), attempt: 1, step };
        let state = ObjectPrefix::CheckpointState(place);
        assert_eq!(objects.list(&state).await.expect("list"), [], "state of step {step}");
    }
    let left: Vec<_> = std::fs::read_dir(world.dir.path().join("work")).expect("read").collect();
    assert_eq!(left.len(), 1, "only the lock of the work directory is left: {left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_from_a_tuned_model_gets_its_adapter_and_fails_by_name_once_that_is_gone() {
    let world = World::new().await;
    let script = json!({"total_steps": 2, "checkpoint_steps": 2});
    let worker = world.start(world.config(&script));
    let tuned = world.ended(&world.queued_job().await).await.model_name;
    worker.drain().await;
    let model = world.store.model(&world.project, &tuned).await.expect("model");

    // Killed after step 3, the second attempt goes on from the first one's checkpoint alone.
    let script = json!({
        "total_steps": 4, "checkpoint_steps": 2, "die_after_steps": 3, "die_only_when_fresh": true,
        "starts_from_weights": true,
    });
    let worker = world.start(world.config(&script));
    let job = world.ended(&world.queued_job_from(&model).await).await;
    assert_eq!((job.status, job.attempt), (JobStatus::Succeeded, 2), "{:?}", job.error);
    assert_eq!((&job.model, job.start.as_ref()), (&tuned, Some(&model.place)));

    world.store.objects().delete_prefix(&model.weights()).await.expect("delete");
    let job = world.ended(&world.queued_job_from(&model).await).await;
    let error = job.error.expect("an error");
    assert_eq!((error.code, error.param.as_deref()), (ErrorCode::ModelNotFound, Some("model")));
    assert!(error.message.contains(&tuned), "{}", error.message);
    worker.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_stops_early_ends_well_with_the_checkpoint_that_it_names() {
    let world = World::new().await;
    let id = world.queued_job().await;
    // Killed after step 5, so that the named checkpoint, of step 4, is of the first attempt.
    let script = json!({
        "total_steps": 20, "checkpoint_steps": 2, "validation": true, "stop_early_at_step": 6,
        "die_after_steps": 5, "die_only_when_fresh": true,
    });
    let worker = world.start(world.config(&script));
    let job = world.ended(&id).await;
    worker.drain().await;

    assert_eq!(job.status, JobStatus::Succeeded, "{:?}", job.error);
    assert_eq!((job.attempt, job.trained_tokens, job.last_step), (2, Some(60), 6));
    assert_eq!(job.run.expect("it ran").total_steps, 6, "the total is what was done");
    world.assert_each_step_once(&id, 6).await;
    let model = world.store.model(&world.project, &job.model_name).await.expect("model");
    let place = CheckpointPlace { job: id.clone(), attempt: 1, step: 4 };
    assert_eq!(model.place, place.into());
    let weights = world.store.objects().list(&model.weights()).await.expect("list");
    assert_eq!(weights.len(), 3, "{weights:?}");
    let messages = world.messages(&id).await;
    let notes = messages.iter().filter(|message| *message == "The loss rises.").count();
    assert_eq!(notes, 1, "{messages:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_trainer_goes_on_from_its_checkpoint_and_the_curve_is_the_same() {
    let world = World::new().await;
    let calm = json!({"total_steps": 9, "checkpoint_steps": 2, "validation": true});
    let expected = world.undisturbed_curve(calm).await;

    let id = world.queued_job().await;
    let script = json!({
        "total_steps": 9, "checkpoint_steps": 2, "validation": true,
        "die_after_steps": 5, "die_only_when_fresh": true,
    });
    let worker = world.start(world.config(&script));
    let job = world.ended(&id).await;
    worker.drain().await;

    assert_eq!(job.status, JobStatus::Succeeded);
    assert_eq!(job.attempt, 2);
    assert_eq!(resumed_from(&job), 4);
    assert_eq!(world.curve(&id).await, expected);
    world.assert_each_step_once(&id, 9).await;
    assert_eq!(world.checkpoint_steps(&id).await, [2, 4, 6, 8, 9]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_makes_progress_survives_any_number_of_losses() {
    let world = World::new().await;
    let id = world.queued_job().await;
    let script = json!({"total_steps": 10, "checkpoint_steps": 1, "die_after_steps": 2});
    let worker = world.start(world.config(&script));
    let job = world.ended(&id).await;
    worker.drain().await;

    assert_eq!(job.status, JobStatus::Succeeded, "{:?}", job.error);
    assert!(job.attempt > 3, "attempt {}", job.attempt);
    world.assert_each_step_once(&id, 10).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_losses_without_progress_fail_the_job_and_name_the_signal() {
    let world = World::new().await;
    let id = world.queued_job().await;
    let script = json!({"total_steps": 9, "checkpoint_steps": 9, "die_after_steps": 3});
    let worker = world.start(world.config(&script));
    let job = world.ended(&id).await;
    worker.drain().await;

    assert_eq!(job.status, JobStatus::Failed);
    assert_eq!(job.attempt, 3);
    let error = job.error.expect("error");
    assert_eq!(error.code, ErrorCode::WorkerLost);
    assert!(error.message.contains("signal 9 (SIGKILL)"), "{}", error.message);
    world.assert_each_step_once(&id, 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trainer_that_cannot_be_started_is_named_in_the_jobs_error() {
    let world = World::new().await;
    let id = world.queued_job().await;
    let mut config = world.config(&json!({}));
    config.trainer.program = "/no/such/trainer".into();
    let worker = world.start(config);
    let job = world.ended(&id).await;
    worker.drain().await;

    let error = job.error.expect("error");
    assert_eq!(error.code, ErrorCode::WorkerLost);
    assert!(error.message.contains("/no/such/trainer"), "{}", error.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trainer_that_does_not_speak_the_protocol_is_a_lost_one() {
    let world = World::new().await;
    let id = world.queued_job().await;
    let mut config = world.config(&json!({}));
    config.trainer.program = "/bin/sh".into();
    config.trainer.args = vec!["-c".into(), "echo hello; exec sleep 600".into()];
    let worker = world.start(config);
    let job = world.ended(&id).await;
    worker.drain().await;

    let error = job.error.expect("error");
    assert_eq!(error.code, ErrorCode::WorkerLost);
    assert!(error.message.contains("not in the protocol"), "{}", error.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_files_content_is_gone_fails_and_names_the_parameter() {
    let world = World::new().await;
    let id = world.queued_job().await;
    let key = ObjectKey::File(world.job(&id).await.training_file);
    world.store.objects().delete(&key).await.expect("delete");
    let script = json!({"total_steps": 1, "checkpoint_steps": 1});
    let worker = world.start(world.config(&script));
    let job = world.ended(&id).await;
    worker.drain().await;

    let error = job.error.expect("error");
    assert_eq!(error.code, ErrorCode::InvalidTrainingFile);
    assert_eq!(error.param.as_deref(), Some("training_file"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_is_never_seen_before_its_steps() {
    let world = World::new().await;
    let id = world.queued_job().await;
    let script = json!({
        "total_steps": 9, "checkpoint_steps": 4, "wait_at_step": 6, "wait_for": world.gate(),
    });
    let mut config = world.config(&script);
    // Nothing but the checkpoint makes the worker write its steps.
    config.flush_interval = Duration::from_secs(3600);
    let worker = world.start(config);
    let job = world.job_when(&id, |job| job.resume.is_some()).await;
    assert_eq!(job.last_step, 4);
    world.assert_each_step_once(&id, 4).await;

    world.open_gate();
    world.ended(&id).await;
    worker.drain().await;
    world.assert_each_step_once(&id, 9).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_trainer_says_of_a_failure_is_the_jobs_error() {
    let world = World::new().await;
    let id = world.queued_job().await;
    let script = json!({"total_steps": 5, "checkpoint_steps": 5, "fail_at_step": 3});
    let worker = world.start(world.config(&script));
    let job = world.ended(&id).await;
    worker.drain().await;

    assert_eq!(job.status, JobStatus::Failed);
    assert_eq!(job.attempt, 1, "the same would happen again");
    let error = job.error.expect("error");
    assert_eq!(error.code, ErrorCode::NonFiniteLoss);
    assert_eq!(error.param.as_deref(), Some("hyperparameters.learning_rate"));
    world.assert_each_step_once(&id, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crashed_workers_job_goes_to_the_next_worker_once_the_lease_has_run_out() {
    let world = World::new().await;
    let calm = json!({"total_steps": 8, "checkpoint_steps": 2});
    let expected = world.undisturbed_curve(calm).await;

    let id = world.queued_job().await;
    let script = json!({
        "total_steps": 8, "checkpoint_steps": 2, "pid_file": world.pid_file(),
        "wait_at_step": 5, "wait_for": world.gate(),
    });
    let first = world.start(world.config(&script));
    world.reached(&id, 5).await;
    world.job_when(&id, |job| job.resume.as_ref().is_some_and(|place| place.step == 4)).await;
    first.crash().await;
    let [pid] = world.trainer_pids()[..] else { panic!("one trainer") };
    eventually(async || (!is_alive(pid)).then_some(())).await;
    assert_eq!(world.job(&id).await.status, JobStatus::Running, "the lease still runs");

    world.open_gate();
    world.db.expire_lease(&id).await;
    let second = world.start(world.config(&script));
    let job = world.ended(&id).await;
    second.drain().await;

    assert_eq!(job.status, JobStatus::Succeeded);
    assert_eq!(job.attempt, 2);
    assert_eq!(resumed_from(&job), 4);
    assert_eq!(world.curve(&id).await, expected);
    world.assert_each_step_once(&id, 8).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_lease_was_taken_over_kills_its_trainer_and_writes_nothing_more() {
    let world = World::new().await;
    let id = world.queued_job().await;
    let script = |mark: f64| {
        json!({
            "total_steps": 8, "checkpoint_steps": 2, "pid_file": world.pid_file(),
            "wait_at_step": 5, "wait_for": world.gate(), "mark": mark,
        })
    };
    // The first hears of its loss from a write: its next renewal is far away.
    let mut config = world.config(&script(1.0));
    config.renew_interval = Duration::from_secs(20);
    let first = world.start(config);
    world.reached(&id, 5).await;
    world.job_when(&id, |job| job.resume.as_ref().is_some_and(|place| place.step == 4)).await;

    world.db.expire_lease(&id).await;
    let second = world.start(world.config(&script(2.0)));
    eventually(async || (world.trainer_pids().len() == 2).then_some(())).await;
    world.open_gate();
    let job = world.ended(&id).await;
    let pid = world.trainer_pids()[0];
    eventually(async || (!is_alive(pid)).then_some(())).await;

    assert_eq!(job.status, JobStatus::Succeeded);
    assert_eq!(job.attempt, 2);
    world.assert_each_step_once(&id, 8).await;
    let marks: Vec<f64> = world.curve(&id).await.iter().map(|step| step.grad_norm).collect();
    assert_eq!(marks, [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0]);
    for step in [6, 8] {
        let name = format!("{}:ckpt-step-{step}", job.model_name);
        let model = world.store.model(&world.project, &name).await.expect("checkpoint");
        let place = CheckpointPlace { job: id.clone(), attempt: 2, step };
        assert_eq!(model.place, place.into());
    }

    // Nor is the first any worse for it.
    second.drain().await;
    let next = world.queued_job().await;
    assert_eq!(world.ended(&next).await.status, JobStatus::Succeeded);
    first.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_ends_in_the_middle_and_its_trainer_with_it() {
    let world = World::new().await;
    let id = world.queued_job().await;
    let script = json!({
        "total_steps": 9, "checkpoint_steps": 2, "pid_file": world.pid_file(),
        "wait_at_step": 3, "wait_for": world.gate(),
    });
    let worker = world.start(world.config(&script));
    world.reached(&id, 3).await;
    world.store.request_cancel(&world.project, &id).await.expect("cancel");
    let job = world.ended(&id).await;

    assert_eq!(job.status, JobStatus::Cancelled);
    let [pid] = world.trainer_pids()[..] else { panic!("one trainer") };
    assert!(!is_alive(pid));
    world.assert_each_step_once(&id, 3).await;
    worker.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_job_rests_and_goes_on_where_it_stopped() {
    let world = World::new().await;
    let calm = json!({"total_steps": 9, "checkpoint_steps": 4});
    let expected = world.undisturbed_curve(calm).await;

    let id = world.queued_job().await;
    let script = json!({
        "total_steps": 9, "checkpoint_steps": 4, "pid_file": world.pid_file(),
        "wait_at_step": 5, "wait_for": world.gate(),
    });
    let worker = world.start(world.config(&script));
    world.reached(&id, 5).await;
    world.store.pause_job(&world.project, &id).await.expect("pause");
    let job = world.job_when(&id, |job| job.status == JobStatus::Queued).await;
    assert!(job.paused);
    let stopped_at = job.resume.expect("checkpoint").step;
    assert_eq!(stopped_at, job.last_step, "no step is lost");
    assert_eq!(world.checkpoint_steps(&id).await, [4], "the one to resume from is not shown");

    // Other jobs pass it meanwhile.
    world.open_gate();
    let other = world.queued_job().await;
    assert_eq!(world.ended(&other).await.status, JobStatus::Succeeded);
    assert_eq!(world.job(&id).await.status, JobStatus::Queued);

    world.store.resume_job(&world.project, &id).await.expect("resume");
    let job = world.ended(&id).await;
    worker.drain().await;
    assert_eq!(job.status, JobStatus::Succeeded);
    assert_eq!(resumed_from(&job), stopped_at);
    assert_eq!(world.curve(&id).await, expected);
    world.assert_each_step_once(&id, 9).await;
    assert_eq!(world.checkpoint_steps(&id).await, [4, 8, 9]);
    let private = CheckpointPlace { job: id.clone(), attempt: 1, step: stopped_at };
    let weights = ObjectPrefix::CheckpointWeights(private);
    let left = world.store.objects().list(&weights).await.expect("list");
    assert_eq!(left, [], "what was only there to resume from is gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_worker_gives_its_job_back_after_the_step_at_hand() {
    let world = World::new().await;
    let calm = json!({"total_steps": 9, "checkpoint_steps": 9});
    let expected = world.undisturbed_curve(calm).await;

    let id = world.queued_job().await;
    let script = json!({
        "total_steps": 9, "checkpoint_steps": 9, "wait_at_step": 3, "wait_for": world.gate(),
    });
    let worker = world.start(world.config(&script));
    world.reached(&id, 3).await;
    worker.drain().await;
    let job = world.job(&id).await;
    assert_eq!(job.status, JobStatus::Queued);
    assert!(!job.paused);
    let stopped_at = job.resume.expect("checkpoint").step;
    assert_eq!(stopped_at, job.last_step);

    world.open_gate();
    let worker = world.start(world.config(&script));
    let job = world.ended(&id).await;
    worker.drain().await;
    assert_eq!(job.status, JobStatus::Succeeded);
    assert_eq!(resumed_from(&job), stopped_at);
    assert_eq!(world.curve(&id).await, expected);
    world.assert_each_step_once(&id, 9).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn drains_without_a_checkpoint_spend_no_attempt() {
    let world = World::new().await;
    let id = world.queued_job().await;
    let script = json!({
        "total_steps": 4, "checkpoint_steps": 4, "pid_file": world.pid_file(),
        "wait_at_step": 2, "wait_for": world.gate(), "ignore_stop": true,
    });
    for drains in 1..=5 {
        let mut config = world.config(&script);
        config.stop_grace = Duration::ZERO;
        let worker = world.start(config);
        eventually(async || (world.trainer_pids().len() == drains).then_some(())).await;
        world.reached(&id, 2).await;
        worker.drain().await;
        let job = world.job(&id).await;
        assert_eq!((job.status, job.resume), (JobStatus::Queued, None), "drain {drains}");
    }
    assert!(world.trainer_pids().into_iter().all(|pid| !is_alive(pid)));

    world.open_gate();
    let worker = world.start(world.config(&script));
    let job = world.ended(&id).await;
    worker.drain().await;
    assert_eq!(job.status, JobStatus::Succeeded, "{:?}", job.error);
    world.assert_each_step_once(&id, 4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_workers_share_the_queue() {
    let world = World::new().await;
    let script = json!({
        "total_steps": 3, "checkpoint_steps": 3, "wait_at_step": 1, "wait_for": world.gate(),
    });
    let mut jobs = Vec::new();
    for _ in 0..4 {
        jobs.push(world.queued_job().await);
    }
    let workers = [world.start(world.config(&script)), world.start(world.config(&script))];
    // Each holds one job: the first two, in the order in which they came.
    world.reached(&jobs[0], 1).await;
    world.reached(&jobs[1], 1).await;
    assert_eq!(world.job(&jobs[2]).await.status, JobStatus::Queued);

    world.open_gate();
    for id in &jobs {
        let job = world.ended(id).await;
        assert_eq!((job.status, job.attempt), (JobStatus::Succeeded, 1));
        world.assert_each_step_once(id, 3).await;
    }
    for worker in workers {
        worker.drain().await;
    }
    let models = world.dir.path().join("cache/models");
    let cached: Vec<_> = std::fs::read_dir(models)
        .expect("cache")
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .collect();
    assert_eq!(cached.len(), 1, "one base model, fetched once, and nothing half-done: {cached:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notification_wakes_an_idle_worker() {
    let world = World::new().await;
    let script = json!({"total_steps": 1, "checkpoint_steps": 1});
    let mut config = world.config(&script);
    // Far beyond the test's patience: only a notification can make it look.
    config.poll_interval = Duration::from_secs(3600);
    let worker = world.start(config);
    let first = world.queued_job().await;
    assert_eq!(world.ended(&first).await.status, JobStatus::Succeeded);
    let second = world.queued_job().await;
    assert_eq!(world.ended(&second).await.status, JobStatus::Succeeded);
    worker.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_event_carries_its_figures() {
    let world = World::new().await;
    let id = world.queued_job().await;
    let script = json!({"total_steps": 2, "checkpoint_steps": 2, "validation": true});
    let worker = world.start(world.config(&script));
    world.ended(&id).await;
    worker.drain().await;

    let curve = world.curve(&id).await;
    let events = world.events(&id).await;
    let data: Vec<_> = events
        .into_iter()
        .filter(|event| event.kind == EventType::Metrics)
        .filter_map(|event| event.data)
        .collect();
    assert_eq!(
        data,
        [
            json!({
                "step": 1,
                "total_steps": 2,
                "train_loss": curve[0].train_loss,
                "train_mean_token_accuracy": curve[0].train_mean_token_accuracy,
            }),
            json!({
                "step": 2,
                "total_steps": 2,
                "train_loss": curve[1].train_loss,
                "train_mean_token_accuracy": curve[1].train_mean_token_accuracy,
                "valid_loss": curve[1].valid_loss,
                "valid_mean_token_accuracy": curve[1].valid_mean_token_accuracy,
            }),
        ]
    );
}
