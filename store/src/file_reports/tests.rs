use super::*;
use crate::fixtures::World;
use serde_json::json;

#[tokio::test]
async fn report_is_made_once_and_tells_the_files_owner_at_a_glance() {
    let world = World::new().await;
    let (store, file) = (world.store(), &world.training_file);
    let model = Some(&world.base_model);
    // The upload has asked for it.
    assert_eq!(store.want_report(&file.id, model).await.expect("asked"), ReportState::InProgress);
    let claim = store.claim_report().await.expect("claim").expect("a report to make");
    assert_eq!((&claim.file.id, claim.base_model_id.as_ref()), (&file.id, model));
    assert_eq!(store.claim_report().await.expect("claim"), None, "one maker at a time");
    assert!(store.keep_report(&claim).await.expect("kept"));
    store.finish_report(&claim, &json!({"rows": 7}), Some("Line 1: no.")).await.expect("made");
    assert!(!store.keep_report(&claim).await.expect("kept"));
    store.finish_report(&claim, &json!({"rows": 8}), None).await.expect("too late");
    let state = store.want_report(&file.id, model).await.expect("asked");
    let ReportState::Done { report, .. } = state else { panic!("{state:?}") };
    assert_eq!(report, json!({"rows": 7}));
    let file = store.file(&world.caller.project_id, &file.id).await.expect("file");
    assert_eq!(file.status_details.as_deref(), Some("Line 1: no."));
}

#[tokio::test]
async fn each_base_model_has_its_own_report_and_none_is_one_too() {
    let world = World::new().await;
    let (store, file) = (world.store(), &world.training_file);
    store.want_report(&file.id, None).await.expect("asked");
    let claims = [
        store.claim_report().await.expect("claim").expect("one"),
        store.claim_report().await.expect("claim").expect("another"),
    ];
    assert_ne!(claims[0].base_model_id, claims[1].base_model_id);
    assert_eq!(store.default_base_model().await.expect("asked").as_ref(), Some(&world.base_model));
}

#[tokio::test]
async fn report_that_takes_its_makers_down_is_given_up() {
    let world = World::new().await;
    let (store, file) = (world.store(), &world.training_file);
    let model = Some(&world.base_model);
    for _ in 0..MAX_TRIES {
        store.claim_report().await.expect("claim").expect("a report to make");
        sqlx::query("UPDATE file_reports SET make_after = now()")
            .execute(&store.pool)
            .await
            .expect("the claim runs out");
    }
    assert_eq!(store.claim_report().await.expect("claim"), None);
    assert_eq!(store.want_report(&file.id, model).await.expect("asked"), ReportState::GivenUp);
}

#[tokio::test]
async fn report_goes_with_its_file() {
    let world = World::new().await;
    let store = world.store();
    let file = &world.training_file;
    let claim = store.claim_report().await.expect("claim").expect("a report to make");
    store.finish_report(&claim, &json!({}), None).await.expect("made");
    store.delete_file(&world.caller.project_id, &file.id).await.expect("deleted");
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM file_reports")
        .fetch_one(&store.pool)
        .await
        .expect("count");
    assert_eq!(left, 0);
}

#[tokio::test]
async fn report_that_was_postponed_is_tried_as_often_as_before() {
    let world = World::new().await;
    let store = world.store();
    for _ in 0..2 * MAX_TRIES {
        let claim = store.claim_report().await.expect("claim").expect("a report to make");
        store.postpone_report(&claim).await.expect("postponed");
        sqlx::query("UPDATE file_reports SET make_after = now()")
            .execute(&store.pool)
            .await
            .expect("time passes");
    }
}
