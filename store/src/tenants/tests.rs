use super::*;
use crate::test_db::TestDb;
use tunesmith_core::ids::JobId;

#[tokio::test]
async fn a_key_opens_its_project_and_no_other_text_does() {
    let db = TestDb::new().await;
    let store = db.store();
    let project = store.ensure_default_project().await.expect("project");
    let key = store.create_api_key(&project, "first").await.expect("key");
    let caller = store.authenticate(&key.secret).await.expect("database").expect("known");
    assert_eq!((&caller.project_id, &caller.api_key_id), (&project, &key.id));
    let job = JobId::from("ftjob-none".to_owned());
    let found = store.authenticate_for_job(&key.secret, &job).await.expect("database");
    let (whose, found) = found.expect("known");
    assert_eq!(*whose, caller);
    assert!(found.is_none(), "a job that is not there");
    for wrong in ["", "sk-", &key.secret[1..], &format!("{} ", key.secret)] {
        assert_eq!(store.authenticate(wrong).await.expect("database"), None, "{wrong:?}");
        let found = store.authenticate_for_job(wrong, &job).await.expect("database");
        assert!(found.is_none(), "{wrong:?}");
    }
}

#[tokio::test]
async fn the_default_project_is_made_once_even_by_many_at_a_time() {
    let db = TestDb::new().await;
    let made = (0..8).map(|_| {
        let store = db.store().clone();
        tokio::spawn(async move { store.ensure_default_project().await.expect("project") })
    });
    let made = futures::future::join_all(made).await;
    let made: std::collections::BTreeSet<ProjectId> =
        made.into_iter().map(|project| project.expect("task")).collect();
    assert_eq!(made.len(), 1);
}

#[tokio::test]
async fn the_secret_of_a_key_is_nowhere_in_the_database() {
    let db = TestDb::new().await;
    let store = db.store();
    let project = store.ensure_default_project().await.expect("project");
    let key = store.create_api_key(&project, "first").await.expect("key");
    let row: String = sqlx::query_scalar("SELECT api_keys::text FROM api_keys")
        .fetch_one(&store.pool)
        .await
        .expect("row");
    assert!(!row.contains(&key.secret) && !row.contains(&hex::encode(&key.secret)), "{row}");
}
