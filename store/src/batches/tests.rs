use super::*;
use crate::fixtures::{World, once, tenant};
use crate::idempotency::Idempotency;
use crate::objects::ObjectKey;
use bytes::Bytes;

fn new_batch(world: &World) -> NewBatch {
    NewBatch {
        endpoint: "/v1/chat/completions".to_owned(),
        input_file: world.training_file.id.clone(),
        metadata: BTreeMap::new(),
        output_expires_after: Some(Duration::from_secs(3600)),
    }
}

async fn batch(world: &World) -> Batch {
    world.store().create_batch(&world.caller, &new_batch(world), &once(1)).await.expect("made")
}

async fn now(world: &World, batch: &Batch) -> Batch {
    world.store().batch(&world.caller.project_id, &batch.id).await.expect("there")
}

async fn errors_file(world: &World) -> BatchFile {
    let id = world.store().begin_file(&world.caller.project_id).await.expect("begin");
    let key = ObjectKey::File(id.clone());
    let stored = world.store().objects().put_bytes(&key, Bytes::from_static(b"{}\n")).await;
    BatchFile { id, filename: "errors.jsonl".to_owned(), stored: stored.expect("stored") }
}

#[tokio::test]
async fn a_batch_is_claimed_begun_and_completed_with_its_files() {
    let world = World::new().await;
    let store = world.store();
    let made = batch(&world).await;
    assert_eq!(made.status, BatchStatus::Validating);
    assert_eq!(made.expires_at, made.created_at + Duration::from_secs(86_400));
    let claimed = store.claim_batch().await.expect("claim").expect("one waits");
    assert_eq!(claimed.id, made.id);
    assert_eq!(store.claim_batch().await.expect("claim"), None, "one at a time");
    store.begin_batch(&made.id, 2, Some("m")).await.expect("begun");
    store.keep_batch(&made.id, 0, 0).await.expect("kept");
    let result =
        BatchResult { failed: 2, errors: Some(errors_file(&world).await), ..Default::default() };
    store.complete_batch(&claimed, &result).await.expect("completed");
    let done = now(&world, &made).await;
    assert_eq!((done.status, done.total, done.failed), (BatchStatus::Completed, 2, 2));
    assert!(done.status.is_terminal() && done.completed_at.is_some());
    let file = done.error_file.expect("errors");
    let file = store.file(&world.caller.project_id, &file).await.expect("whole");
    assert_eq!(file.purpose, Purpose::BatchOutput);
    assert_eq!(file.expires_at, Some(file.created_at + Duration::from_secs(3600)));
    let again = store.cancel_batch(&world.caller.project_id, &made.id).await;
    assert!(matches!(again, Err(StoreError::BatchEnded { status: "completed", .. })), "{again:?}");
}

#[tokio::test]
async fn a_batch_that_is_given_up_is_cancelled_and_its_worker_hears_of_it() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let made = batch(&world).await;
    let claimed = store.claim_batch().await.expect("claim").expect("one waits");
    store.begin_batch(&made.id, 1, None).await.expect("begun");
    for _ in 0..2 {
        let cancelling = store.cancel_batch(project, &made.id).await.expect("cancelling");
        assert_eq!(cancelling.status, BatchStatus::Cancelling);
    }
    assert!(store.keep_batch(&made.id, 0, 0).await.is_err());
    let file = errors_file(&world).await;
    let result = BatchResult { failed: 1, errors: Some(file.clone()), ..Default::default() };
    let late = store.complete_batch(&claimed, &result).await;
    assert!(matches!(late, Err(StoreError::BatchEnded { .. })), "{late:?}");
    assert!(store.file(project, &file.id).await.is_err(), "its file is not there");
    assert_eq!(store.claim_batch().await.expect("claim"), None);
    let done = now(&world, &made).await;
    assert_eq!(done.status, BatchStatus::Cancelled);
    assert!(done.cancelled_at.is_some() && done.cancelling_at.is_some());
}

#[tokio::test]
async fn a_batch_whose_worker_died_is_taken_up_and_one_out_of_time_expires() {
    let world = World::new().await;
    let store = world.store();
    let made = batch(&world).await;
    store.claim_batch().await.expect("claim").expect("one waits");
    store.begin_batch(&made.id, 1, None).await.expect("begun");
    sqlx::query("UPDATE batches SET claimed_until = now()")
        .execute(&store.pool)
        .await
        .expect("time");
    let again = store.claim_batch().await.expect("claim").expect("taken up");
    assert_eq!((again.id, again.status), (made.id.clone(), BatchStatus::InProgress));
    sqlx::query("UPDATE batches SET claimed_until = now(), expires_at = now()")
        .execute(&store.pool)
        .await
        .expect("time");
    assert_eq!(store.claim_batch().await.expect("claim"), None);
    assert_eq!(now(&world, &made).await.status, BatchStatus::Expired);
}

#[tokio::test]
async fn a_retried_request_finds_its_batch_and_another_project_finds_none() {
    let world = World::new().await;
    let (store, caller) = (world.store(), &world.caller);
    let made = batch(&world).await;
    let retry = Idempotency { is_retry: true, ..once(1) };
    let again = store.create_batch(caller, &new_batch(&world), &retry).await.expect("its own");
    assert_eq!(again.id, made.id);
    let second = store.create_batch(caller, &new_batch(&world), &once(1)).await.expect("another");
    assert_ne!(second.id, made.id);
    let other = tenant(store, "other").await;
    let foreign = store.create_batch(&other, &new_batch(&world), &once(1)).await;
    assert!(matches!(foreign, Err(StoreError::NotFound { kind: "file", .. })), "{foreign:?}");
    assert!(store.batch(&other.project_id, &made.id).await.is_err());
    assert!(store.cancel_batch(&other.project_id, &made.id).await.is_err());
    let page = store.list_batches(&other.project_id, &PageRequest::first(10)).await.expect("list");
    assert_eq!(page.items, []);
    let page = store.list_batches(&caller.project_id, &PageRequest::first(1)).await.expect("list");
    assert_eq!((page.items[0].id.clone(), page.has_more), (second.id, true));
}

#[tokio::test]
async fn a_file_that_a_batch_still_reads_stays() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let made = batch(&world).await;
    let error = store.delete_file(project, &world.training_file.id).await.expect_err("in use");
    assert!(matches!(error, StoreError::FileInBatch { .. }), "{error}");
    store.fail_batch(&made.id, &[]).await.expect("failed");
    store.delete_file(project, &world.training_file.id).await.expect("free");
}
