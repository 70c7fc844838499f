use super::*;
use crate::files::Purpose;
use crate::fixtures::{World, checkpoint, resolved, step, step_event, trainer_failed};
use crate::page::PageRequest;
use crate::row_losses::RowOrder;
use std::collections::BTreeSet;
use tunesmith_core::hyperparameters::Precision;
use tunesmith_core::metrics::RowLoss;
use tunesmith_core::protocol::Started;
use tunesmith_core::weights::CheckpointPlace;

fn started(initial_valid_loss: Option<f64>) -> Started {
    Started {
        total_steps: 12,
        resumed_from_step: 0,
        train_rows: 40,
        valid_rows: 8,
        truncated_rows: 0,
        initial_valid_loss,
        device: "cpu".to_owned(),
        precision: Precision::Fp32,
    }
}

fn assert_stale<T: std::fmt::Debug>(result: Result<T, StoreError>, lease: &Lease) {
    match result {
        Err(StoreError::StaleLease { job, attempt }) => {
            assert_eq!((&job, attempt), (&lease.job_id, lease.attempt));
        }
        other => panic!("{other:?}"),
    }
}

/// Every write that a lease allows must be refused, and none may leave a trace.
async fn assert_writes_nothing(world: &World, lease: &Lease) {
    let store = world.store();
    let completed = world.completed().await;
    let before = (world.get(&lease.job_id).await, world.messages(&lease.job_id).await);
    let curve = store.metrics(&world.caller.project_id, &lease.job_id, 0).await.expect("curve");
    assert_stale(store.renew_lease(lease).await, lease);
    assert_stale(store.record_started(lease, &started(Some(9.0))).await, lease);
    assert_stale(
        store.record_steps(lease, &[step(1, 9.0), step(99, 9.0)], &[step_event(99)]).await,
        lease,
    );
    let losses = [RowLoss { row: 0, line: 1, step: 99, loss: 9.0 }];
    assert_stale(store.record_row_losses(lease, &losses).await, lease);
    assert_stale(store.record_checkpoint(lease, &checkpoint(99)).await, lease);
    assert_stale(store.complete_job(lease, &completed).await, lease);
    assert_stale(store.fail_job(lease, trainer_failed()).await, lease);
    assert_stale(store.cancel_job(lease).await, lease);
    assert_stale(store.give_back(lease, GiveBack::WorkerStops).await, lease);
    assert_stale(store.lose_job(lease, trainer_failed()).await, lease);
    let after = (world.get(&lease.job_id).await, world.messages(&lease.job_id).await);
    assert_eq!(after, before);
    let project = &world.caller.project_id;
    assert_eq!(store.metrics(project, &lease.job_id, 0).await.expect("curve"), curve);
    let page = store
        .list_checkpoints(project, &lease.job_id, &PageRequest::first(10))
        .await
        .expect("checkpoints");
    assert!(page.items.iter().all(|checkpoint| checkpoint.step != 99));
    assert_eq!(store.list_models(project).await.expect("models"), []);
    assert!(store.file(project, &completed.result_file).await.is_err());
}

#[tokio::test]
async fn a_stale_attempt_writes_nothing() {
    let world = World::new().await;
    let first = world.running_job().await;
    world.db.expire_lease(&first.job.id).await;
    assert_writes_nothing(&world, &first.lease).await;

    let second = world.claim("second").await.expect("taken over");
    assert_eq!(second.lease.attempt, 2);
    world.store().record_steps(&second.lease, &[step(1, 1.0)], &[]).await.expect("steps");
    assert_writes_nothing(&world, &first.lease).await;
    // The same worker under its old attempt, too: it may have taken the job again itself.
    let impostor = Lease { worker_id: second.lease.worker_id.clone(), ..first.lease.clone() };
    assert_writes_nothing(&world, &impostor).await;
    world.store().renew_lease(&second.lease).await.expect("the holder goes on");
}

#[tokio::test]
async fn nothing_can_be_written_to_a_job_that_has_ended() {
    let world = World::new().await;
    let claimed = world.running_job().await;
    world.store().cancel_job(&claimed.lease).await.expect("cancelled");
    assert_writes_nothing(&world, &claimed.lease).await;
}

#[tokio::test]
async fn two_claimers_never_get_one_job() {
    let world = World::new().await;
    for _ in 0..6 {
        world.queued_job().await;
    }
    let claims = (0..12).map(|index| {
        let store = world.store().clone();
        tokio::spawn(
            async move { store.claim_job(&WorkerId::from(format!("worker-{index}"))).await },
        )
    });
    let claimed = futures::future::join_all(claims).await;
    let claimed: Vec<JobId> = claimed
        .into_iter()
        .filter_map(|claim| claim.expect("task").expect("claim"))
        .map(|claimed| claimed.job.id)
        .collect();
    let distinct: BTreeSet<&JobId> = claimed.iter().collect();
    assert_eq!((claimed.len(), distinct.len()), (6, 6));
}

#[tokio::test]
async fn two_claimers_never_take_over_one_lost_job() {
    let world = World::new().await;
    let lost = world.running_job().await;
    world.db.expire_lease(&lost.job.id).await;
    let claims = (0..8).map(|index| {
        let store = world.store().clone();
        tokio::spawn(
            async move { store.claim_job(&WorkerId::from(format!("worker-{index}"))).await },
        )
    });
    let claimed = futures::future::join_all(claims).await;
    let taken = claimed.into_iter().filter_map(|claim| claim.expect("task").expect("claim"));
    assert_eq!(taken.count(), 1);
    assert_eq!(world.get(&lost.job.id).await.attempt, 2);
}

#[tokio::test]
async fn the_oldest_job_is_taken_first_and_carries_what_a_trainer_needs() {
    let world = World::new().await;
    let old = world.queued_job().await;
    let young = world.queued_job().await;
    let first = world.claim("worker").await.expect("a job");
    assert_eq!(first.job.id, old.id);
    assert_eq!(first.job.status, JobStatus::Running);
    assert_eq!(first.job.resolved, Some(resolved()));
    assert_eq!((first.lease.attempt, first.job.resume), (1, None));
    assert!(first.job.started_at.is_some());
    assert_eq!(world.claim("worker").await.expect("a job").job.id, young.id);
    assert!(world.claim("worker").await.is_none());
}

#[tokio::test]
async fn a_held_job_is_not_taken_and_a_lost_one_goes_on_from_its_checkpoint() {
    let world = World::new().await;
    let first = world.running_job().await;
    assert!(world.claim("second").await.is_none());
    world.store().record_checkpoint(&first.lease, &checkpoint(10)).await.expect("checkpoint");
    world.db.expire_lease(&first.job.id).await;
    let second = world.claim("second").await.expect("lost");
    assert_eq!(second.lease.attempt, 2);
    assert_eq!(
        second.job.resume,
        Some(CheckpointPlace { job: first.job.id.clone(), attempt: 1, step: 10 })
    );
    let messages = world.messages(&first.job.id).await;
    assert!(messages.last().expect("event").contains("worker was lost"), "{messages:?}");
}

#[tokio::test]
async fn renewal_keeps_the_lease_from_running_out() {
    let world = World::new().await;
    let claimed = world.running_job().await;
    let left = || async {
        sqlx::query_scalar::<_, f64>(
            "SELECT extract(epoch FROM lease_expires_at - now())::float8 FROM jobs WHERE id = $1",
        )
        .bind(claimed.job.id.as_str())
        .fetch_one(&world.store().pool)
        .await
        .expect("lease")
    };
    sqlx::query("UPDATE jobs SET lease_expires_at = now() + interval '20 seconds'")
        .execute(&world.store().pool)
        .await
        .expect("age");
    let before = left().await;
    let state = world.store().renew_lease(&claimed.lease).await.expect("renew");
    assert_eq!(state, LeaseState { cancel_requested: false, pause_requested: false });
    assert!(left().await > before);
}

#[tokio::test]
async fn three_losses_without_progress_fail_the_job() {
    let world = World::new().await;
    let mut claimed = world.running_job().await;
    let id = claimed.job.id.clone();
    for attempt in 1..=3 {
        assert_eq!(claimed.lease.attempt, attempt);
        world.db.expire_lease(&id).await;
        if attempt < 3 {
            claimed = world.claim("next").await.expect("another attempt");
        }
    }
    assert!(world.claim("next").await.is_none());
    let job = world.get(&id).await;
    assert_eq!(job.status, JobStatus::Failed);
    assert_eq!(job.error.expect("error").code, ErrorCode::WorkerLost);
}

#[tokio::test]
async fn progress_earns_three_more_attempts() {
    let world = World::new().await;
    let mut claimed = world.running_job().await;
    let id = claimed.job.id.clone();
    for round in 1..=6 {
        world
            .store()
            .record_checkpoint(&claimed.lease, &checkpoint(round))
            .await
            .expect("progress");
        world.db.expire_lease(&id).await;
        claimed = world.claim("next").await.expect("another attempt");
    }
    for _ in 0..2 {
        world.db.expire_lease(&id).await;
        claimed = world.claim("next").await.expect("another attempt");
    }
    assert_eq!(claimed.lease.attempt, 9);
    world.db.expire_lease(&id).await;
    assert!(world.claim("next").await.is_none());
    assert_eq!(world.status(&id).await, JobStatus::Failed);
}

#[tokio::test]
async fn a_job_given_back_spends_no_attempt() {
    let world = World::new().await;
    let mut claimed = world.running_job().await;
    for attempt in 1..=10 {
        assert_eq!(claimed.lease.attempt, attempt, "the fencing token grows all the same");
        world.store().give_back(&claimed.lease, GiveBack::WorkerStops).await.expect("give back");
        assert_eq!(world.status(&claimed.job.id).await, JobStatus::Queued);
        claimed = world.claim("next").await.expect("queued again");
    }
    // The count of losses is where it was: two more may follow.
    for _ in 0..2 {
        world.db.expire_lease(&claimed.job.id).await;
        claimed = world.claim("next").await.expect("another attempt");
    }
    world.db.expire_lease(&claimed.job.id).await;
    assert!(world.claim("next").await.is_none());
}

#[tokio::test]
async fn a_lost_trainer_spends_an_attempt_and_the_third_fails_the_job() {
    let world = World::new().await;
    let mut claimed = world.running_job().await;
    for _ in 0..2 {
        let after = world.store().lose_job(&claimed.lease, trainer_failed()).await.expect("lost");
        assert_eq!(after, AfterLoss::Queued);
        claimed = world.claim("next").await.expect("queued again");
    }
    let after = world.store().lose_job(&claimed.lease, trainer_failed()).await.expect("lost");
    assert_eq!(after, AfterLoss::Ended);
    let job = world.get(&claimed.job.id).await;
    assert_eq!((job.status, job.error), (JobStatus::Failed, Some(trainer_failed())));
}

#[tokio::test]
async fn a_cancel_that_came_too_late_to_be_heard_is_obeyed_on_the_way_out() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let claimed = world.running_job().await;
    store.request_cancel(project, &claimed.job.id).await.expect("cancel");
    store.give_back(&claimed.lease, GiveBack::WorkerStops).await.expect("give back");
    assert_eq!(world.status(&claimed.job.id).await, JobStatus::Cancelled);

    let claimed = world.running_job().await;
    store.request_cancel(project, &claimed.job.id).await.expect("cancel");
    world.db.expire_lease(&claimed.job.id).await;
    assert!(world.claim("next").await.is_none());
    assert_eq!(world.status(&claimed.job.id).await, JobStatus::Cancelled);
}

#[tokio::test]
async fn a_lost_job_that_should_rest_rests() {
    let world = World::new().await;
    let claimed = world.running_job().await;
    world.store().pause_job(&world.caller.project_id, &claimed.job.id).await.expect("pause");
    world.db.expire_lease(&claimed.job.id).await;
    assert!(world.claim("next").await.is_none());
    let job = world.get(&claimed.job.id).await;
    assert_eq!((job.status, job.paused), (JobStatus::Queued, true));
}

#[tokio::test]
async fn steps_come_back_bit_for_bit_and_a_repeated_one_is_seen_once() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let claimed = world.running_job().await;
    let (lease, id) = (&claimed.lease, &claimed.job.id);
    let first = [step(1, 0.1 + 0.2), step(2, 1.0 / 3.0)];
    store.record_steps(lease, &first, &[step_event(1), step_event(2)]).await.expect("steps");
    assert_eq!(store.metrics(project, id, 0).await.expect("curve"), first);
    // A resumed run says step 2 again, and goes on.
    let again = [step(2, 5e-324), step(3, 0.3)];
    store.record_steps(lease, &again, &[step_event(2), step_event(3)]).await.expect("steps");
    let curve = store.metrics(project, id, 0).await.expect("curve");
    assert_eq!(curve, [first[0].clone(), again[0].clone(), again[1].clone()]);
    assert_eq!(store.metrics(project, id, 2).await.expect("curve"), again[1..]);
    assert_eq!(store.last_metrics(project, id).await.expect("last"), Some(again[1].clone()));
    assert_eq!(world.get(id).await.last_step, 3);
    let messages = world.messages(id).await;
    assert_eq!(messages[messages.len() - 3..], ["Step 1", "Step 2", "Step 3"]);
}

#[tokio::test]
async fn a_loss_that_is_no_number_is_refused() {
    let world = World::new().await;
    let claimed = world.running_job().await;
    let error = world.store().record_steps(&claimed.lease, &[step(1, f64::NAN)], &[]).await;
    assert!(matches!(error, Err(StoreError::Database(_))), "{error:?}");
    assert_eq!(world.get(&claimed.job.id).await.last_step, 0);
}

#[tokio::test]
async fn the_facts_of_a_resumed_run_keep_the_first_validation_loss() {
    let world = World::new().await;
    let claimed = world.running_job().await;
    let (store, id) = (world.store(), &claimed.job.id);
    store.record_started(&claimed.lease, &started(Some(2.5))).await.expect("started");
    assert_eq!(world.get(id).await.run, Some(started(Some(2.5))));
    for later in [None, Some(1.5)] {
        let resumed = Started { resumed_from_step: 6, ..started(later) };
        store.record_started(&claimed.lease, &resumed).await.expect("resumed");
        let expected = Started { resumed_from_step: 6, ..started(Some(2.5)) };
        assert_eq!(world.get(id).await.run, Some(expected));
    }
    let messages = world.messages(id).await;
    let starts = messages.iter().filter(|text| *text == "Fine-tuning job started").count();
    assert_eq!(starts, 1);
}

#[tokio::test]
async fn a_new_checkpoint_names_the_one_that_may_go() {
    let world = World::new().await;
    let claimed = world.running_job().await;
    let (store, lease) = (world.store(), &claimed.lease);
    let place = |step| CheckpointPlace { job: claimed.job.id.clone(), attempt: 1, step };
    let private = |step| NewCheckpoint { for_resume_only: true, ..checkpoint(step) };
    let record = |new: NewCheckpoint| async move {
        store.record_checkpoint(lease, &new).await.expect("checkpoint")
    };
    let gone = |step, weights_too| Some(SupersededCheckpoint { place: place(step), weights_too });

    assert_eq!(record(checkpoint(4)).await, None);
    assert_eq!(record(private(6)).await, gone(4, false));
    assert_eq!(record(checkpoint(8)).await, gone(6, true));
    // The same again, and again as one to resume from: it is still shown, so its weights stay.
    assert_eq!(record(checkpoint(8)).await, None);
    assert_eq!(record(private(8)).await, None);
    assert_eq!(record(checkpoint(12)).await, gone(8, false));

    let project = &world.caller.project_id;
    let page = store
        .list_checkpoints(project, &claimed.job.id, &PageRequest::first(2))
        .await
        .expect("checkpoints");
    assert!(page.has_more);
    let shown: Vec<u64> = page.items.iter().map(|checkpoint| checkpoint.step).collect();
    assert_eq!(shown, [12, 8]);
    assert_eq!(page.items[0].metrics, Some(step(12, 1.0)));
    assert_eq!(page.items[0].name, format!("{}:ckpt-step-12", claimed.job.model_name));
    let mut request = PageRequest::first(2);
    request.after = Some(page.items[1].id.to_string());
    let rest = store.list_checkpoints(project, &claimed.job.id, &request).await.expect("page");
    assert_eq!((rest.items.len(), rest.has_more), (1, false));
    let told = world.messages(&claimed.job.id).await;
    let told = told.iter().filter(|text| text.starts_with("Checkpoint created at step")).count();
    assert_eq!(told, 3);
}

#[tokio::test]
async fn a_job_that_succeeds_has_its_model_its_results_and_its_events_at_once() {
    let world = World::new().await;
    let claimed = world.running_job().await;
    let (store, project, id) = (world.store(), &world.caller.project_id, &claimed.job.id);
    store.record_checkpoint(&claimed.lease, &checkpoint(12)).await.expect("checkpoint");
    let completed = world.completed().await;
    store.complete_job(&claimed.lease, &completed).await.expect("complete");

    let job = world.get(id).await;
    assert_eq!(job.status, JobStatus::Succeeded);
    assert_eq!(job.trained_tokens, Some(1234));
    assert_eq!(job.fine_tuned_model(), Some(&*job.model_name));
    assert_eq!(job.result_file.as_ref(), Some(&completed.result_file));
    assert!(job.finished_at.is_some());
    let file = store.file(project, &completed.result_file).await.expect("result file");
    assert_eq!((file.purpose, &*file.filename), (Purpose::FineTuneResults, "step_metrics.csv"));
    let model = store.model(project, &job.model_name).await.expect("model");
    let place = CheckpointPlace { job: id.clone(), attempt: 1, step: 12 };
    assert_eq!(model.place, place.into());
    let messages = world.messages(id).await;
    assert_eq!(
        messages[messages.len() - 2..],
        [
            format!("New fine-tuned model created: {}", job.model_name),
            "The job has successfully completed.".to_owned()
        ]
    );
}

#[tokio::test]
async fn a_job_without_a_checkpoint_cannot_succeed() {
    let world = World::new().await;
    let claimed = world.running_job().await;
    let completed = world.completed().await;
    let error = world.store().complete_job(&claimed.lease, &completed).await;
    assert!(matches!(error, Err(StoreError::Database(_))), "{error:?}");
    assert_eq!(world.status(&claimed.job.id).await, JobStatus::Running);
    assert!(world.store().file(&world.caller.project_id, &completed.result_file).await.is_err());
}

#[tokio::test]
async fn row_losses_are_those_of_the_last_visit_and_only_the_leases_holder_writes_them() {
    let world = World::new().await;
    let ClaimedJob { job, lease } = world.running_job().await;
    let loss = |row, step, loss| RowLoss { row, line: row + 1, step, loss };
    let first = [loss(0, 1, 0.5), loss(1, 1, 2.0)];
    world.store().record_row_losses(&lease, &first).await.expect("written");
    let second = [loss(1, 2, 0.25), loss(2, 2, 0.5)];
    world.store().record_row_losses(&lease, &second).await.expect("written");
    let list = |order, after, limit| {
        world.store().list_row_losses(&world.caller.project_id, &job.id, order, after, limit)
    };
    let ranked = list(RowOrder::Loss, None, 10).await.expect("rows");
    assert_eq!(ranked.items, [loss(0, 1, 0.5), loss(2, 2, 0.5), loss(1, 2, 0.25)]);
    let next = list(RowOrder::Loss, Some(0), 1).await.expect("rows");
    assert_eq!((next.items, next.has_more), (vec![loss(2, 2, 0.5)], true));
    let by_line = list(RowOrder::Line, Some(0), 10).await.expect("rows");
    assert_eq!(by_line.items, [loss(1, 2, 0.25), loss(2, 2, 0.5)]);
    let other = Lease { attempt: lease.attempt + 1, ..lease };
    let refused = world.store().record_row_losses(&other, &first).await;
    assert!(matches!(refused, Err(StoreError::StaleLease { .. })), "{refused:?}");
}
