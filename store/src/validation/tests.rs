use super::*;
use crate::StoreError;
use crate::events::Level;
use crate::fixtures::{World, resolved};
use tunesmith_core::errors::ErrorCode;

fn validated() -> Validated {
    Validated { resolved: resolved(), events: vec![NewEvent::message(Level::Warn, "a warning")] }
}

fn bad_row() -> ApiError {
    ApiError::new(ErrorCode::InvalidFileFormat, "Line 7: no").with_param("training_file")
}

async fn let_claims_run_out(world: &World) {
    sqlx::query("UPDATE jobs SET validate_after = now() - interval '1 second'")
        .execute(&world.store().pool)
        .await
        .expect("age");
}

#[tokio::test]
async fn files_in_order_queue_the_job() {
    let world = World::new().await;
    let job = world.job().await;
    let claimed = world.store().claim_for_validation().await.expect("claim").expect("a job");
    assert_eq!(claimed.id, job.id);
    assert!(world.claim("worker").await.is_none(), "not queued yet");
    world.store().accept_files(&job.id, validated()).await.expect("accept");
    let job = world.get(&job.id).await;
    assert_eq!((job.status, job.resolved), (JobStatus::Queued, Some(resolved())));
    let messages = world.messages(&job.id).await;
    assert_eq!(messages[2..], ["a warning", "Files validated, moving job to queued state"]);
}

#[tokio::test]
async fn a_broken_file_fails_the_job_with_its_error() {
    let world = World::new().await;
    let job = world.job().await;
    world.store().refuse_files(&job.id, bad_row()).await.expect("refuse");
    let job = world.get(&job.id).await;
    assert_eq!((job.status, job.error), (JobStatus::Failed, Some(bad_row())));
    assert!(job.finished_at.is_some());
    assert_eq!(world.messages(&job.id).await[2], "The job failed: Line 7: no");
}

#[tokio::test]
async fn a_job_is_read_by_one_validator_until_its_claim_runs_out() {
    let world = World::new().await;
    let job = world.job().await;
    let store = world.store();
    assert!(store.claim_for_validation().await.expect("claim").is_some());
    assert!(store.claim_for_validation().await.expect("claim").is_none());
    let_claims_run_out(&world).await;
    store.keep_validating(&job.id).await.expect("keep");
    assert!(store.claim_for_validation().await.expect("claim").is_none());
    let_claims_run_out(&world).await;
    assert!(store.claim_for_validation().await.expect("claim").is_some());
}

#[tokio::test]
async fn of_two_validators_the_first_to_finish_decides() {
    let world = World::new().await;
    let job = world.job().await;
    let store = world.store();
    store.refuse_files(&job.id, bad_row()).await.expect("first");
    let second = store.accept_files(&job.id, validated()).await.expect_err("second");
    assert!(matches!(second, StoreError::Superseded { .. }));
    let third = store.refuse_files(&job.id, bad_row()).await.expect_err("third");
    assert!(matches!(third, StoreError::Superseded { .. }));
    assert!(store.keep_validating(&job.id).await.is_err());
    assert_eq!(world.status(&job.id).await, JobStatus::Failed);
    assert_eq!(world.messages(&job.id).await.len(), 3, "the losers said nothing");
}

#[tokio::test]
async fn a_job_cancelled_meanwhile_stays_cancelled() {
    let world = World::new().await;
    let job = world.job().await;
    world.store().claim_for_validation().await.expect("claim").expect("a job");
    world.store().request_cancel(&world.caller.project_id, &job.id).await.expect("cancel");
    assert!(world.store().accept_files(&job.id, validated()).await.is_err());
    assert_eq!(world.status(&job.id).await, JobStatus::Cancelled);
}

#[tokio::test]
async fn a_running_job_cannot_be_validated_again() {
    let world = World::new().await;
    let claimed = world.running_job().await;
    let error = world.store().accept_files(&claimed.job.id, validated()).await.expect_err("runs");
    assert!(matches!(error, StoreError::Superseded { .. }));
    world.store().renew_lease(&claimed.lease).await.expect("the lease is untouched");
}
