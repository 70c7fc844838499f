use super::*;
use crate::fixtures::{World, once, tenant, upload};
use bytes::Bytes;

#[tokio::test]
async fn a_file_is_there_only_when_it_is_whole() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let id = store.begin_file(project).await.expect("begin");
    let missing = store.file(project, &id).await.expect_err("not whole");
    assert!(matches!(missing, StoreError::NotFound { .. }));
    let listed = store.list_files(project, None, &PageRequest::first(10)).await.expect("list");
    assert_eq!(listed.items, std::slice::from_ref(&world.training_file));

    let key = ObjectKey::File(id.clone());
    let stored = store.objects().put_bytes(&key, Bytes::from_static(b"abc")).await.expect("put");
    let facts = FileFacts {
        filename: "a.jsonl".to_owned(),
        purpose: Purpose::Evals,
        expires_after: Some(Duration::from_secs(3600)),
    };
    let file =
        store.finish_file(&world.caller, &id, &facts, &stored, &once(0)).await.expect("finish");
    assert_eq!(store.file(project, &id).await.expect("whole"), file);
    assert_eq!((file.bytes, file.purpose), (3, Purpose::Evals));
    assert_eq!(file.expires_at, Some(file.created_at + Duration::from_secs(3600)));
    let again = store
        .finish_file(&world.caller, &id, &facts, &stored, &once(0))
        .await
        .expect_err("finished already");
    assert!(matches!(again, StoreError::NotFound { .. }));
}

#[tokio::test]
async fn an_abandoned_file_leaves_neither_row_nor_content() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let id = store.begin_file(project).await.expect("begin");
    let key = ObjectKey::File(id.clone());
    store.objects().put_bytes(&key, Bytes::from_static(b"abc")).await.expect("put");
    store.abandon_file(&id).await.expect("abandon");
    assert!(store.file(project, &id).await.is_err());
    assert!(store.objects().read(&key).await.is_err());
}

#[tokio::test]
async fn pages_go_through_every_file_once_in_both_orders() {
    let world = World::new().await;
    let (store, caller) = (world.store(), &world.caller);
    let mut ids = vec![world.training_file.id.clone()];
    for index in 0..6 {
        ids.push(upload(store, caller, &format!("{index}.jsonl")).await.id);
    }
    for order in [Order::Ascending, Order::Descending] {
        let mut seen = Vec::new();
        let mut request = PageRequest { after: None, limit: 3, order };
        loop {
            let page = store.list_files(&caller.project_id, None, &request).await.expect("page");
            seen.extend(page.items.iter().map(|file| file.id.clone()));
            if !page.has_more {
                break;
            }
            assert_eq!(page.items.len(), 3);
            request.after = page.items.last().map(|file| file.id.to_string());
        }
        if order == Order::Descending {
            seen.reverse();
        }
        assert_eq!(seen, ids);
    }
}

#[tokio::test]
async fn who_deletes_while_paging_does_not_lose_the_place() {
    let world = World::new().await;
    let (store, caller) = (world.store(), &world.caller);
    let second = upload(store, caller, "b.jsonl").await;
    let mut request = PageRequest { limit: 1, ..PageRequest::first(1) };
    let page = store.list_files(&caller.project_id, None, &request).await.expect("page");
    assert_eq!(page.items, std::slice::from_ref(&second));
    store.delete_file(&caller.project_id, &second.id).await.expect("delete");
    request.after = Some(second.id.to_string());
    let page = store.list_files(&caller.project_id, None, &request).await.expect("page");
    assert_eq!(page.items, std::slice::from_ref(&world.training_file));
    request.after = Some("file-never".to_owned());
    let error = store.list_files(&caller.project_id, None, &request).await.expect_err("unknown");
    assert!(matches!(error, StoreError::UnknownCursor { .. }));
}

#[tokio::test]
async fn a_list_is_of_one_purpose_when_it_is_asked_to_be() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    for (purpose, count) in [(Purpose::FineTune, 1), (Purpose::FineTuneResults, 0)] {
        let page =
            store.list_files(project, Some(purpose), &PageRequest::first(10)).await.expect("page");
        assert_eq!(page.items.len(), count, "{}", purpose.as_str());
    }
}

#[tokio::test]
async fn a_file_in_use_stays_until_its_job_has_ended() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let validation = upload(store, &world.caller, "valid.jsonl").await;
    let mut new = world.new_job();
    new.validation_file = Some(validation.id.clone());
    let job =
        store.create_job(&world.caller, &new, &crate::fixtures::once(1)).await.expect("job").job;
    for id in [&world.training_file.id, &validation.id] {
        let error = store.delete_file(project, id).await.expect_err("in use");
        assert!(matches!(&error, StoreError::FileInUse { job: user, .. } if *user == job.id));
    }
    store.request_cancel(project, &job.id).await.expect("cancel");
    for id in [&world.training_file.id, &validation.id] {
        store.delete_file(project, id).await.expect("free");
        assert!(store.file(project, id).await.is_err());
        let content = store.objects().read(&ObjectKey::File(id.clone())).await;
        assert!(matches!(content, Err(StoreError::NotFound { .. })));
        assert!(store.delete_file(project, id).await.is_err(), "deleted twice");
    }
}

#[tokio::test]
async fn a_job_that_is_just_being_made_keeps_its_file() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    for round in 0..10 {
        let file = upload(store, &world.caller, "raced.jsonl").await;
        let mut new = world.new_job();
        new.training_file = file.id.clone();
        let request = crate::fixtures::once(round);
        let (made, deleted) = tokio::join!(
            store.create_job(&world.caller, &new, &request),
            store.delete_file(project, &file.id)
        );
        assert_ne!(made.is_ok(), deleted.is_ok(), "exactly one of the two wins");
    }
}

#[tokio::test]
async fn another_project_sees_and_deletes_nothing() {
    let world = World::new().await;
    let store = world.store();
    let other = tenant(store, "other").await.project_id;
    let id = &world.training_file.id;
    assert!(matches!(store.file(&other, id).await, Err(StoreError::NotFound { .. })));
    assert!(matches!(store.delete_file(&other, id).await, Err(StoreError::NotFound { .. })));
    let mut request = PageRequest::first(10);
    assert_eq!(store.list_files(&other, None, &request).await.expect("list").items, []);
    request.after = Some(id.to_string());
    let error = store.list_files(&other, None, &request).await.expect_err("a foreign cursor");
    assert!(matches!(error, StoreError::UnknownCursor { .. }));
}

#[tokio::test]
async fn expired_files_and_broken_uploads_are_purged_but_not_what_a_job_reads() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    world.job().await;
    let expired = upload(store, &world.caller, "old.jsonl").await;
    let broken = store.begin_file(project).await.expect("begin");
    let fresh = store.begin_file(project).await.expect("begin");
    sqlx::query("UPDATE files SET expires_at = now() WHERE bytes IS NOT NULL")
        .execute(&store.pool)
        .await
        .expect("expire");
    sqlx::query("UPDATE files SET created_at = now() - interval '2 days' WHERE id = $1")
        .bind(broken.as_str())
        .execute(&store.pool)
        .await
        .expect("age");
    assert!(store.file(project, &expired.id).await.is_err(), "gone before it is purged");
    assert_eq!(store.purge_files().await.expect("purge"), 2);
    assert!(store.objects().read(&expired.object()).await.is_err());
    assert!(store.objects().read(&world.training_file.object()).await.is_ok());
    let left: Vec<String> =
        sqlx::query_scalar("SELECT id FROM files WHERE deleted_at IS NULL ORDER BY sequence")
            .fetch_all(&store.pool)
            .await
            .expect("rows");
    assert_eq!(left, [world.training_file.id.as_str(), fresh.as_str()]);
}
