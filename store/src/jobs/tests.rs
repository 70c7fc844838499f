use super::*;
use crate::fixtures::{World, once, tenant, upload};
use crate::idempotency::Idempotency;
use std::collections::BTreeSet;

#[tokio::test]
async fn a_new_job_is_validating_and_says_so() {
    let world = World::new().await;
    let job = world.job().await;
    assert_eq!(job.status, JobStatus::ValidatingFiles);
    assert_eq!(job.metadata["team"], "a");
    assert_eq!(job.hyperparameters["n_epochs"], "auto");
    assert_eq!((job.seed, job.attempt, job.last_step), (7, 0, 0));
    assert!(job.model_name.starts_with("ft:smol:acme::"), "{}", job.model_name);
    assert_eq!(job.fine_tuned_model(), None);
    assert_eq!(world.get(&job.id).await, job);
    assert_eq!(
        world.messages(&job.id).await,
        [
            format!("Created fine-tuning job: {}", job.id),
            format!("Validating training file: {}", world.training_file.id),
        ]
    );
}

#[tokio::test]
async fn a_file_that_is_not_the_callers_makes_no_job() {
    let world = World::new().await;
    let store = world.store();
    let foreign = upload(store, &tenant(store, "other").await, "theirs.jsonl").await;
    for (training, validation) in
        [(foreign.id.clone(), None), (world.training_file.id.clone(), Some(foreign.id.clone()))]
    {
        let mut new = world.new_job();
        (new.training_file, new.validation_file) = (training, validation);
        let error = store.create_job(&world.caller, &new, &once(0)).await.expect_err("foreign");
        assert!(matches!(&error, StoreError::NotFound { id, .. } if *id == foreign.id.as_str()));
    }
    let page = store
        .list_jobs(
            &world.caller.project_id,
            &MetadataFilter::Holds(BTreeMap::new()),
            &PageRequest::first(10),
        )
        .await
        .expect("list");
    assert_eq!(page.items, []);
}

#[tokio::test]
async fn an_idempotency_key_makes_one_job_and_refuses_another_body() {
    let world = World::new().await;
    let store = world.store();
    let keyed = |body| Idempotency { key: Some("k".to_owned()), ..once(body) };
    let new = world.new_job();
    let first = store.create_job(&world.caller, &new, &keyed(1)).await.expect("first");
    let second = store.create_job(&world.caller, &new, &keyed(1)).await.expect("second");
    assert!(first.is_new && !second.is_new);
    assert_eq!(first.job.id, second.job.id);
    let error = store.create_job(&world.caller, &new, &keyed(2)).await.expect_err("other body");
    assert!(matches!(error, StoreError::IdempotencyConflict));

    // The same key of another client is another key.
    let other = tenant(store, "default").await;
    assert_ne!(other.api_key_id, world.caller.api_key_id);
    assert!(store.create_job(&other, &new, &keyed(2)).await.expect("other client").is_new);
}

#[tokio::test]
async fn an_idempotency_key_is_forgotten_after_a_day() {
    let world = World::new().await;
    let store = world.store();
    let keyed = |body| Idempotency { key: Some("k".to_owned()), ..once(body) };
    let new = world.new_job();
    store.create_job(&world.caller, &new, &keyed(1)).await.expect("first");
    sqlx::query("UPDATE creations SET created_at = now() - interval '25 hours'")
        .execute(&store.pool)
        .await
        .expect("age");
    let next = store.create_job(&world.caller, &new, &keyed(2)).await.expect("next day");
    let again = store.create_job(&world.caller, &new, &keyed(2)).await.expect("its retry");
    assert!(next.is_new && !again.is_new);
    assert_eq!(next.job.id, again.job.id);
}

#[tokio::test]
async fn a_retry_finds_its_job_and_a_second_wish_makes_a_second_one() {
    let world = World::new().await;
    let store = world.store();
    let new = world.new_job();
    let retry = |body| Idempotency { is_retry: true, ..once(body) };
    let first = store.create_job(&world.caller, &new, &once(1)).await.expect("first");
    let same = store.create_job(&world.caller, &new, &retry(1)).await.expect("retry");
    assert!(!same.is_new);
    assert_eq!(same.job.id, first.job.id);
    // Not marked as a retry: someone wants the same again.
    assert!(store.create_job(&world.caller, &new, &once(1)).await.expect("wish").is_new);
    // The first try never arrived.
    assert!(store.create_job(&world.caller, &new, &retry(2)).await.expect("lost try").is_new);
    // Too long ago to be the same wish.
    sqlx::query("UPDATE creations SET created_at = now() - interval '61 minutes'")
        .execute(&store.pool)
        .await
        .expect("age");
    assert!(store.create_job(&world.caller, &new, &retry(1)).await.expect("late").is_new);
}

#[tokio::test]
async fn racing_retries_make_one_job() {
    let world = World::new().await;
    let new = world.new_job();
    for key in [None, Some("k".to_owned())] {
        let tries = (0..8).map(|index| {
            let (store, caller, new) = (world.store().clone(), world.caller.clone(), new.clone());
            let mut request = once(if key.is_some() { 1 } else { 2 });
            // The first try itself may be the last to get through.
            request.is_retry = index > 0;
            request.key = key.clone();
            tokio::spawn(async move { store.create_job(&caller, &new, &request).await })
        });
        let made = futures::future::join_all(tries).await;
        let made: Vec<CreatedJob> =
            made.into_iter().map(|job| job.expect("task").expect("job")).collect();
        let new_jobs = made.iter().filter(|job| job.is_new).count();
        let ids: BTreeSet<&JobId> = made.iter().map(|made| &made.job.id).collect();
        if key.is_some() {
            assert_eq!((new_jobs, ids.len()), (1, 1));
        } else {
            // A first try that comes after its own retries cannot be told from a second wish.
            assert!(new_jobs <= 2 && ids.len() == new_jobs, "{new_jobs} of {}", ids.len());
        }
    }
}

#[tokio::test]
async fn a_retry_waits_for_the_try_that_is_still_under_way() {
    let world = World::new().await;
    let new = world.new_job();
    let retries = (0..8).map(|_| {
        let (store, caller, new) = (world.store().clone(), world.caller.clone(), new.clone());
        let request = Idempotency { is_retry: true, ..once(3) };
        tokio::spawn(async move { store.create_job(&caller, &new, &request).await })
    });
    let made = futures::future::join_all(retries).await;
    let ids: BTreeSet<JobId> =
        made.into_iter().map(|job| job.expect("task").expect("job").job.id).collect();
    assert_eq!(ids.len(), 1);
}

#[tokio::test]
async fn jobs_page_newest_first_and_filter_by_metadata() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let mut ids = Vec::new();
    for index in 0..5 {
        let mut new = world.new_job();
        new.metadata.insert("parity".to_owned(), (index % 2).to_string());
        let made = store.create_job(&world.caller, &new, &once(0)).await.expect("job");
        ids.insert(0, made.job.id);
    }
    let all = MetadataFilter::Holds(BTreeMap::new());
    let first = store.list_jobs(project, &all, &PageRequest::first(2)).await.expect("page");
    assert!(first.has_more);
    let mut request = PageRequest::first(3);
    request.after = first.items.last().map(|job| job.id.to_string());
    let rest = store.list_jobs(project, &all, &request).await.expect("page");
    assert!(!rest.has_more);
    let seen: Vec<JobId> = first.items.into_iter().chain(rest.items).map(|job| job.id).collect();
    assert_eq!(seen, ids);

    let odd = MetadataFilter::Holds(BTreeMap::from([
        ("parity".to_owned(), "1".to_owned()),
        ("team".to_owned(), "a".to_owned()),
    ]));
    let page = store.list_jobs(project, &odd, &PageRequest::first(10)).await.expect("page");
    let seen: Vec<JobId> = page.items.into_iter().map(|job| job.id).collect();
    assert_eq!(seen, [ids[1].clone(), ids[3].clone()]);

    let mut bare = world.new_job();
    bare.metadata.clear();
    let bare = store.create_job(&world.caller, &bare, &once(0)).await.expect("job").job.id;
    let page = store.list_jobs(project, &MetadataFilter::Empty, &PageRequest::first(10)).await;
    let seen: Vec<JobId> = page.expect("page").items.into_iter().map(|job| job.id).collect();
    assert_eq!(seen, [bare]);
}

#[tokio::test]
async fn another_project_sees_and_moves_nothing() {
    let world = World::new().await;
    let store = world.store();
    let job = world.queued_job().await.id;
    let other = tenant(store, "other").await.project_id;
    let page = PageRequest::first(10);
    let missing = |result: Result<(), StoreError>| {
        assert!(matches!(result, Err(StoreError::NotFound { .. })), "{result:?}");
    };
    missing(store.job(&other, &job).await.map(drop));
    missing(store.request_cancel(&other, &job).await.map(drop));
    missing(store.pause_job(&other, &job).await.map(drop));
    missing(store.resume_job(&other, &job).await.map(drop));
    missing(store.list_events(&other, &job, &page).await.map(drop));
    missing(store.list_checkpoints(&other, &job, &page).await.map(drop));
    missing(store.metrics(&other, &job, 0).await.map(drop));
    let listed = store
        .list_jobs(&other, &MetadataFilter::Holds(BTreeMap::new()), &page)
        .await
        .expect("list");
    assert_eq!(listed.items, []);
    assert_eq!(world.status(&job).await, JobStatus::Queued);
}

#[tokio::test]
async fn a_waiting_job_is_cancelled_at_once() {
    let world = World::new().await;
    let project = &world.caller.project_id;
    for job in [world.job().await, world.queued_job().await] {
        let cancelled = world.store().request_cancel(project, &job.id).await.expect("cancel");
        assert_eq!(cancelled.status, JobStatus::Cancelled);
        assert!(cancelled.finished_at.is_some());
        assert_eq!(world.messages(&job.id).await.last().expect("event"), "The job was cancelled.");
        let again = world.store().request_cancel(project, &job.id).await.expect_err("ended");
        assert!(matches!(again, StoreError::InvalidState { status: JobStatus::Cancelled, .. }));
    }
    assert!(world.claim("worker").await.is_none(), "a cancelled job is not taken");
}

#[tokio::test]
async fn a_running_job_is_cancelled_by_its_worker() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let claimed = world.running_job().await;
    let asked = store.request_cancel(project, &claimed.job.id).await.expect("cancel");
    assert_eq!((asked.status, asked.cancel_requested), (JobStatus::Running, true));
    let state = store.renew_lease(&claimed.lease).await.expect("renew");
    assert!(state.cancel_requested);
    store.cancel_job(&claimed.lease).await.expect("cancelled");
    assert_eq!(world.status(&claimed.job.id).await, JobStatus::Cancelled);
}

#[tokio::test]
async fn a_running_job_whose_worker_is_lost_is_cancelled_at_once() {
    let world = World::new().await;
    let claimed = world.running_job().await;
    world.db.expire_lease(&claimed.job.id).await;
    let job = world
        .store()
        .request_cancel(&world.caller.project_id, &claimed.job.id)
        .await
        .expect("cancel");
    assert_eq!(job.status, JobStatus::Cancelled);
}

#[tokio::test]
async fn an_ended_job_cannot_be_cancelled_paused_or_resumed() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let claimed = world.running_job().await;
    store.fail_job(&claimed.lease, crate::fixtures::trainer_failed()).await.expect("fail");
    let id = &claimed.job.id;
    for result in [
        store.request_cancel(project, id).await,
        store.pause_job(project, id).await,
        store.resume_job(project, id).await,
    ] {
        let error = result.expect_err("ended");
        assert!(matches!(error, StoreError::InvalidState { status: JobStatus::Failed, .. }));
    }
}

#[tokio::test]
async fn a_paused_job_is_not_taken_until_it_is_resumed() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let job = world.queued_job().await;
    for _ in 0..2 {
        assert!(store.pause_job(project, &job.id).await.expect("pause").paused);
    }
    assert!(world.claim("worker").await.is_none());
    for _ in 0..2 {
        assert!(!store.resume_job(project, &job.id).await.expect("resume").paused);
    }
    let messages = world.messages(&job.id).await;
    assert_eq!(messages[3..], ["The job is paused", "The job was resumed"]);
    assert!(world.claim("worker").await.is_some());
}

#[tokio::test]
async fn a_running_job_hears_of_its_pause_and_rests_after_it_is_given_back() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let claimed = world.running_job().await;
    store.pause_job(project, &claimed.job.id).await.expect("pause");
    assert!(store.renew_lease(&claimed.lease).await.expect("renew").pause_requested);
    store.give_back(&claimed.lease, crate::lease::GiveBack::Paused).await.expect("give back");
    let job = world.get(&claimed.job.id).await;
    assert_eq!((job.status, job.paused), (JobStatus::Queued, true));
    assert!(world.claim("second").await.is_none());
    store.resume_job(project, &job.id).await.expect("resume");
    assert!(world.claim("second").await.is_some());
}

/// The words of a CHECK constraint on one column.
async fn words_of(store: &Store, constraint: &str) -> BTreeSet<String> {
    let definition: String = sqlx::query_scalar(
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = $1",
    )
    .bind(constraint)
    .fetch_one(&store.pool)
    .await
    .expect("constraint");
    definition.split('\'').skip(1).step_by(2).map(str::to_owned).collect()
}

#[tokio::test]
async fn the_words_of_the_schema_are_those_of_the_code() {
    use crate::events::{EventType, Level};
    use crate::files::FileStatus;
    use tunesmith_core::hyperparameters::Method;
    let world = World::new().await;
    let owned = |words: Vec<&'static str>| words.into_iter().map(str::to_owned).collect();
    let methods = owned(Method::ALL.map(Method::as_str).to_vec());
    let cases: [(&str, BTreeSet<String>); 5] = [
        ("jobs_method_check", methods),
        ("jobs_status_check", owned(super::words(&JobStatus::ALL))),
        ("files_status_check", owned(FileStatus::ALL.iter().map(|s| s.as_str()).collect())),
        ("job_events_level_check", owned(Level::ALL.iter().map(|s| s.as_str()).collect())),
        ("job_events_type_check", owned(EventType::ALL.iter().map(|s| s.as_str()).collect())),
    ];
    for (constraint, words) in cases {
        assert_eq!(words_of(world.store(), constraint).await, words, "{constraint}");
    }
    let terminal = JobStatus::ALL.into_iter().filter(|status| status.is_terminal());
    let terminal = owned(terminal.map(JobStatus::as_str).collect());
    assert_eq!(words_of(world.store(), "terminal_means_finished").await, terminal);
}

#[tokio::test]
async fn the_schema_refuses_rows_that_cannot_be() {
    let world = World::new().await;
    let claimed = world.running_job().await;
    for (change, constraint) in [
        ("status = 'resting'", "jobs_status_check"),
        ("status = 'queued'", "running_means_leased"),
        ("worker_id = NULL", "running_means_leased"),
        ("lease_expires_at = NULL", "running_means_leased"),
        (
            "status = 'cancelled', worker_id = NULL, lease_expires_at = NULL",
            "terminal_means_finished",
        ),
        ("finished_at = now()", "terminal_means_finished"),
        ("error = '{}'", "failed_means_error"),
        ("resolved = NULL", "past_validation_means_resolved"),
        ("trained_tokens = 1, result_file = training_file", "succeeded_means_results"),
        ("resume_step = 1", "resume_point_is_whole"),
        (
            "status = 'queued', worker_id = NULL, lease_expires_at = NULL, cancel_requested = true",
            "only_running_jobs_wait_for_cancel",
        ),
        ("attempt = -1", "jobs_attempt_check"),
        ("seed = -1", "jobs_seed_check"),
    ] {
        let error =
            sqlx::query(sqlx::AssertSqlSafe(format!("UPDATE jobs SET {change} WHERE id = $1")))
                .bind(claimed.job.id.as_str())
                .execute(&world.store().pool)
                .await
                .expect_err(change);
        let violated = error.as_database_error().and_then(|error| error.constraint());
        assert_eq!(violated, Some(constraint), "{change}");
    }
}

#[tokio::test]
async fn a_project_has_no_more_unfinished_jobs_than_it_may_and_a_retry_still_finds_its_own() {
    let world = World::new().await;
    let (store, caller) = (world.store(), &world.caller);
    let new = NewJob { most_unfinished: Some(1), ..world.new_job() };
    let requests = [once(1), once(2)];
    let (one, two) = tokio::join!(
        store.create_job(caller, &new, &requests[0]),
        store.create_job(caller, &new, &requests[1])
    );
    let (made, refused, body) = match (one, two) {
        (Ok(made), Err(refused)) => (made, refused, 1),
        (Err(refused), Ok(made)) => (made, refused, 2),
        other => panic!("exactly one finds room: {other:?}"),
    };
    assert!(matches!(refused, StoreError::TooManyJobs { limit: 1 }), "{refused}");
    let retry = Idempotency { is_retry: true, ..once(body) };
    let again = store.create_job(caller, &new, &retry).await.expect("its own");
    assert_eq!(again.job.id, made.job.id);
    store.request_cancel(&caller.project_id, &made.job.id).await.expect("cancelled");
    store.create_job(caller, &new, &once(3)).await.expect("there is room again");
}
