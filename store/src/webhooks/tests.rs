use super::*;
use crate::fixtures::{World, once, tenant, trainer_failed};
use crate::jobs::Job;
use serde_json::Value;

async fn endpoint(world: &World, events: &[WebhookEvent]) -> WebhookEndpoint {
    let new = NewWebhookEndpoint {
        name: "mine".to_owned(),
        url: "https://hooks.example/x".to_owned(),
        event_types: events.to_vec(),
        secret: "whsec_AAAA".to_owned(),
    };
    world.store().create_webhook_endpoint(&world.caller, &new, &once(0)).await.expect("made")
}

async fn due(world: &World) -> Vec<Delivery> {
    world.store().claim_deliveries(10).await.expect("claim")
}

/// Makes every delivery due, as if its time had come.
async fn let_time_pass(world: &World) {
    sqlx::query(
        "UPDATE webhook_deliveries SET next_attempt_at = now() WHERE next_attempt_at > now()",
    )
    .execute(&world.store().pool)
    .await
    .expect("time");
}

async fn cancelled(world: &World) -> Job {
    let job = world.job().await;
    world.store().request_cancel(&world.caller.project_id, &job.id).await.expect("cancelled")
}

#[tokio::test]
async fn the_end_of_a_job_is_noted_once_for_each_endpoint_that_wants_to_hear_of_it() {
    let world = World::new().await;
    let ends = [WebhookEvent::JobSucceeded, WebhookEvent::JobFailed, WebhookEvent::JobCancelled];
    endpoint(&world, &ends).await;
    endpoint(&world, &[WebhookEvent::JobCancelled]).await;
    let stranger = tenant(world.store(), "other").await;
    let foreign = NewWebhookEndpoint {
        name: "foreign".to_owned(),
        url: "https://foreign.example/".to_owned(),
        event_types: ends.to_vec(),
        secret: "whsec_BBBB".to_owned(),
    };
    world.store().create_webhook_endpoint(&stranger, &foreign, &once(0)).await.expect("made");

    let job = cancelled(&world).await;
    let told = due(&world).await;
    assert_eq!(told.len(), 2);
    assert_eq!(told[0].event_id, told[1].event_id, "one event");
    assert!(told.iter().all(|delivery| delivery.url == "https://hooks.example/x"));
    let body: Value = serde_json::from_str(&told[0].body).expect("JSON");
    assert_eq!(body["type"], "fine_tuning.job.cancelled");
    assert_eq!(body["data"], serde_json::json!({"id": job.id}));
    assert_eq!((&body["object"], &body["id"]), (&"event".into(), &told[0].event_id.clone().into()));
    assert!(body["created_at"].is_i64());

    // The other ends, by a worker.
    let claimed = world.running_job().await;
    let completed = world.completed().await;
    world
        .store()
        .record_checkpoint(&claimed.lease, &crate::fixtures::checkpoint(12))
        .await
        .expect("checkpoint");
    world.store().complete_job(&claimed.lease, &completed).await.expect("succeeded");
    let claimed = world.running_job().await;
    world.store().fail_job(&claimed.lease, trainer_failed()).await.expect("failed");
    let mut types: Vec<String> = due(&world)
        .await
        .iter()
        .map(|delivery| {
            let body: Value = serde_json::from_str(&delivery.body).expect("JSON");
            body["type"].as_str().expect("type").to_owned()
        })
        .collect();
    types.sort();
    assert_eq!(types, ["fine_tuning.job.failed", "fine_tuning.job.succeeded"]);
}

#[tokio::test]
async fn a_delivery_has_one_hand_at_a_time_and_another_if_that_one_dies() {
    let world = World::new().await;
    endpoint(&world, &[WebhookEvent::JobCancelled]).await;
    cancelled(&world).await;
    let first = due(&world).await;
    assert_eq!((first.len(), first[0].attempt), (1, 1));
    assert_eq!(due(&world).await, []);
    let wait = world.store().next_delivery_in().await.expect("due").expect("one waits");
    assert!(wait > Duration::from_secs(30) && wait <= CLAIM, "{wait:?}");
    let_time_pass(&world).await;
    let second = due(&world).await;
    assert_eq!((second[0].attempt, &second[0].event_id), (2, &first[0].event_id));
    // The first was not dead, only slow: its failure does not touch the second's attempt.
    world.store().record_attempt(&first[0], false, Some(500), None).await.expect("late");
    assert_eq!(due(&world).await, []);
    world.store().record_attempt(&second[0], true, Some(204), None).await.expect("arrived");
    let_time_pass(&world).await;
    assert_eq!(due(&world).await, []);
    assert_eq!(world.store().next_delivery_in().await.expect("due"), None);
}

#[tokio::test]
async fn a_delivery_comes_again_later_and_later_and_is_given_up_after_three_days() {
    let world = World::new().await;
    endpoint(&world, &[WebhookEvent::JobCancelled]).await;
    cancelled(&world).await;
    let store = world.store();
    for (index, seconds) in BACKOFF_SECONDS.into_iter().enumerate() {
        let delivery = due(&world).await.pop().expect("due");
        assert_eq!(delivery.attempt as usize, index + 1);
        store.record_attempt(&delivery, false, None, Some("refused")).await.expect("noted");
        let wait = store.next_delivery_in().await.expect("due").expect("one waits").as_secs_f64();
        assert!(wait > seconds - 5.0 && wait <= seconds, "{index}: {wait}");
        let_time_pass(&world).await;
    }
    assert!((2.5..4.0).contains(&(BACKOFF_SECONDS.iter().sum::<f64>() / 86_400.0)));
    let last = due(&world).await.pop().expect("due");
    store.record_attempt(&last, false, Some(503), None).await.expect("noted");
    assert_eq!(store.next_delivery_in().await.expect("due"), None);
    assert_eq!(store.purge_deliveries().await.expect("purge"), 0);
    sqlx::query("UPDATE webhook_deliveries SET created_at = now() - interval '31 days'")
        .execute(&store.pool)
        .await
        .expect("aged");
    assert_eq!(store.purge_deliveries().await.expect("purge"), 1);
}

#[tokio::test]
async fn a_replaced_secret_signs_for_a_day_if_it_is_kept() {
    let world = World::new().await;
    let made = endpoint(&world, &[WebhookEvent::JobCancelled]).await;
    let rotate = async |secret, keep| {
        let asked = once(7);
        let rotated =
            world.store().rotate_webhook_secret(&world.caller, &made.id, secret, keep, &asked);
        rotated.await.expect("rotated")
    };
    rotate("whsec_CCCC", true).await;
    cancelled(&world).await;
    assert_eq!(due(&world).await[0].secrets, ["whsec_CCCC", "whsec_AAAA"]);
    rotate("whsec_DDDD", false).await;
    let_time_pass(&world).await;
    assert_eq!(due(&world).await[0].secrets, ["whsec_DDDD"]);
}

#[tokio::test]
async fn an_endpoint_is_changed_and_deleted_with_what_it_was_to_be_told() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let made = endpoint(&world, &[WebhookEvent::JobCancelled]).await;
    let same = store.change_webhook_endpoint(project, &made.id, &WebhookChange::default()).await;
    assert_eq!(same.expect("unchanged"), made, "nothing changed, nor did its time");
    let change = WebhookChange { name: Some("other".to_owned()), ..WebhookChange::default() };
    let changed = store.change_webhook_endpoint(project, &made.id, &change).await.expect("changed");
    assert_eq!((changed.name.as_str(), &changed.url), ("other", &made.url));
    assert!(changed.updated_at > made.updated_at);
    cancelled(&world).await;
    let other = tenant(store, "other").await.project_id;
    assert!(store.delete_webhook_endpoint(&other, &made.id).await.is_err());
    assert!(store.webhook_endpoint(&other, &made.id).await.is_err());
    store.delete_webhook_endpoint(project, &made.id).await.expect("deleted");
    assert_eq!(due(&world).await, []);
    assert!(store.webhook_endpoint(project, &made.id).await.is_err());
}
