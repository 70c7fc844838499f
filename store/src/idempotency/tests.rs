use super::*;
use crate::batches::NewBatch;
use crate::files::{File, FileFacts, Purpose};
use crate::fixtures::{World, once, tenant};
use crate::imports::Importing;
use crate::models::NewImportedAdapter;
use crate::objects::{ObjectKey, ObjectPrefix};
use crate::page::PageRequest;
use crate::tenants::Administrator;
use crate::uploads::NewUpload;
use crate::webhooks::{NewWebhookEndpoint, WebhookEvent};
use bytes::Bytes;
use std::collections::BTreeMap;
use tunesmith_core::hyperparameters::AdapterConfig;
use tunesmith_core::ids::{FileId, ImportedAdapterId, UploadId};

fn keyed(key: &str, body: u8) -> Idempotency {
    Idempotency { key: Some(key.to_owned()), ..once(body) }
}

fn retry(body: u8) -> Idempotency {
    Idempotency { is_retry: true, ..once(body) }
}

fn facts() -> FileFacts {
    FileFacts { filename: "rows.jsonl".to_owned(), purpose: Purpose::UserData, expires_after: None }
}

fn new_upload() -> NewUpload {
    NewUpload { file: facts(), mime_type: "text/plain".to_owned(), bytes: 5 }
}

fn new_endpoint(secret: &str) -> NewWebhookEndpoint {
    NewWebhookEndpoint {
        name: "here".to_owned(),
        url: "https://example.com/".to_owned(),
        event_types: vec![WebhookEvent::JobSucceeded],
        secret: secret.to_owned(),
    }
}

/// Sends a file; gives the id that its content came under beside what was made.
async fn file(world: &World, asked: &Idempotency) -> (FileId, Result<File, StoreError>) {
    let store = world.store();
    let id = store.begin_file(&world.caller.project_id).await.expect("begun");
    let key = ObjectKey::File(id.clone());
    let stored = store.objects().put_bytes(&key, Bytes::from_static(b"{}\n")).await.expect("put");
    let made = store.finish_file(&world.caller, &id, &facts(), &stored, asked).await;
    (id, made)
}

async fn administrator(world: &World) -> Administrator {
    let organization = &world.caller.organization_id;
    let key = world.store().create_admin_key(organization, "a", None).await.expect("key");
    let known = world.store().authenticate_administrator(&key.secret).await;
    known.expect("database").expect("known")
}

#[tokio::test]
async fn a_key_makes_one_of_each_kind_and_refuses_another_body() {
    let world = World::new().await;
    let (store, caller) = (world.store(), &world.caller);
    let new = new_upload();
    let first = store.create_upload(caller, &new, &keyed("u", 1)).await.expect("upload");
    assert_eq!(store.create_upload(caller, &new, &keyed("u", 1)).await.expect("again"), first);
    let other = store.create_upload(caller, &new, &keyed("u", 2)).await.expect_err("other body");
    assert!(matches!(other, StoreError::IdempotencyConflict), "{other}");

    let batch = NewBatch {
        endpoint: "/v1/chat/completions".to_owned(),
        input_file: world.training_file.id.clone(),
        metadata: BTreeMap::new(),
        output_expires_after: None,
    };
    let first = store.create_batch(caller, &batch, &keyed("b", 1)).await.expect("batch");
    assert_eq!(store.create_batch(caller, &batch, &keyed("b", 1)).await.expect("again"), first);
    let other = store.create_batch(caller, &batch, &keyed("b", 2)).await.expect_err("other body");
    assert!(matches!(other, StoreError::IdempotencyConflict), "{other}");

    let (_, first) = file(&world, &keyed("f", 1)).await;
    let (_, second) = file(&world, &keyed("f", 1)).await;
    assert_eq!(second.expect("again"), first.expect("file"));
    let (_, other) = file(&world, &keyed("f", 2)).await;
    assert!(matches!(other, Err(StoreError::IdempotencyConflict)), "{other:?}");

    let (new, same) = (new_endpoint("one"), new_endpoint("two"));
    let first =
        store.create_webhook_endpoint(caller, &new, &keyed("w", 1)).await.expect("endpoint");
    let again = store.create_webhook_endpoint(caller, &same, &keyed("w", 1)).await.expect("again");
    assert_eq!((&again.id, again.secret), (&first.id, "one".to_owned()));

    let rotate = |secret, asked| {
        let id = &first.id;
        async move { store.rotate_webhook_secret(caller, id, secret, true, &asked).await }
    };
    rotate("three", keyed("r", 1)).await.expect("rotated");
    assert_eq!(rotate("four", keyed("r", 1)).await.expect("again").secret, "three");
    let other = rotate("four", keyed("r", 2)).await.expect_err("other body");
    assert!(matches!(other, StoreError::IdempotencyConflict), "{other}");
    assert_eq!(rotate("four", once(1)).await.expect("rotated").secret, "four");
}

#[tokio::test]
async fn a_part_that_comes_again_with_its_key_is_stored_once() {
    let world = World::new().await;
    let (store, caller) = (world.store(), &world.caller);
    let begin =
        async || store.create_upload(caller, &new_upload(), &once(1)).await.expect("upload").id;
    let send = async |upload: &UploadId, content: &'static [u8], asked: Idempotency| {
        let content = futures::stream::iter([Ok::<_, StoreError>(Bytes::from_static(content))]);
        store.add_upload_part(caller, upload, content, &asked).await
    };
    let (upload, other) = (begin().await, begin().await);
    // The hash that the request brings says nothing of the content.
    let first = send(&upload, b"12345", keyed("p", 1)).await.expect("part");
    assert_eq!(send(&upload, b"12345", keyed("p", 2)).await.expect("again"), first);
    for (upload, content) in [(&upload, b"12346"), (&other, b"12345")] {
        let error = send(upload, content, keyed("p", 1)).await.expect_err("another part");
        assert!(matches!(error, StoreError::IdempotencyConflict), "{error}");
    }
    let prefix = ObjectPrefix::UploadParts(upload.clone());
    assert_eq!(store.objects().list(&prefix).await.expect("list").len(), 1);
    // Parts may be alike, and so the second is none that has come before.
    let second = send(&upload, b"12345", retry(1)).await.expect("part");
    assert_ne!(second.id, first.id);
}

#[tokio::test]
async fn an_adapter_that_comes_again_with_its_key_is_one_model() {
    let world = World::new().await;
    let (store, caller) = (world.store(), &world.caller);
    let import = async |asked: Idempotency| {
        let new = NewImportedAdapter {
            id: ImportedAdapterId::generate(&mut rand::rng()),
            base_model_id: world.base_model.clone(),
            base_model: "smol".to_owned(),
            tuned: None,
            suffix: None,
            adapter: AdapterConfig::default(),
        };
        store.begin_import(&Importing::Adapter(new.id.clone())).await.expect("begun");
        store.import_adapter(caller, &new, &asked).await
    };
    let first = import(keyed("a", 1)).await.expect("model");
    assert_eq!(import(keyed("a", 1)).await.expect("again"), first);
    assert_eq!(import(retry(1)).await.expect("a marked retry"), first);
    let other = import(keyed("a", 2)).await.expect_err("other body");
    assert!(matches!(other, StoreError::IdempotencyConflict), "{other}");
    assert_ne!(import(once(1)).await.expect("another wish").name, first.name);
    assert_eq!(store.list_models(&caller.project_id).await.expect("list").len(), 2);
    store.delete_model(&caller.project_id, &first.name).await.expect("deleted");
    let gone = import(keyed("a", 1)).await;
    assert!(matches!(gone, Err(StoreError::NotFound { .. })), "{gone:?}");
}

#[tokio::test]
async fn a_key_is_good_for_one_kind_of_thing_and_for_one_caller() {
    let world = World::new().await;
    let (store, key) = (world.store(), keyed("k", 1));
    let upload = store.create_upload(&world.caller, &new_upload(), &key).await.expect("upload");
    let other = store.create_job(&world.caller, &world.new_job(), &key).await.expect_err("a job");
    assert!(matches!(other, StoreError::IdempotencyConflict), "{other}");
    let stranger = tenant(store, "other").await;
    let theirs = store.create_upload(&stranger, &new_upload(), &key).await.expect("theirs");
    assert_ne!(theirs.id, upload.id);
}

#[tokio::test]
async fn a_marked_retry_finds_what_the_same_body_made() {
    let world = World::new().await;
    let (store, caller) = (world.store(), &world.caller);
    let new = new_upload();
    let first = store.create_upload(caller, &new, &once(1)).await.expect("upload");
    assert_eq!(store.create_upload(caller, &new, &retry(1)).await.expect("retry"), first);
    let wish = store.create_upload(caller, &new, &once(1)).await.expect("another wish");
    assert_ne!(wish.id, first.id);
    // The same body asks another path for something else.
    let endpoint = store.create_webhook_endpoint(caller, &new_endpoint("s"), &retry(1)).await;
    endpoint.expect("its first try was lost");
}

#[tokio::test]
async fn what_was_deleted_since_is_made_anew_by_a_marked_retry() {
    let world = World::new().await;
    let (store, caller) = (world.store(), &world.caller);
    let (id, made) = file(&world, &once(1)).await;
    made.expect("file");
    store.delete_file(&caller.project_id, &id).await.expect("deleted");
    let (anew, made) = file(&world, &retry(1)).await;
    assert_eq!(made.expect("its first try was lost").id, anew);

    let new = new_endpoint("one");
    let first = store.create_webhook_endpoint(caller, &new, &once(2)).await.expect("endpoint");
    store.delete_webhook_endpoint(&caller.project_id, &first.id).await.expect("deleted");
    let anew = store.create_webhook_endpoint(caller, &new, &retry(2)).await.expect("anew");
    assert_ne!(anew.id, first.id);
}

#[tokio::test]
async fn of_a_file_that_came_again_nothing_stays() {
    let world = World::new().await;
    let store = world.store();
    let (id, made) = file(&world, &once(1)).await;
    let made = made.expect("file");
    assert_eq!(made.id, id);
    for (asked, is_refused) in [(retry(1), false), (keyed("k", 1), false), (keyed("k", 2), true)] {
        let (id, again) = file(&world, &asked).await;
        if is_refused {
            assert!(matches!(again, Err(StoreError::IdempotencyConflict)), "{again:?}");
        } else if asked.is_retry {
            assert_eq!(again.expect("file").id, made.id);
        } else {
            // The key was not seen before.
            assert_eq!(again.expect("file").id, id);
            continue;
        }
        assert!(store.objects().get(&ObjectKey::File(id.clone())).await.is_err());
        assert_eq!(store.filename(&id).await.expect("database"), None);
    }
    let project = &world.caller.project_id;
    let page = store.list_files(project, Some(Purpose::UserData), &PageRequest::first(9)).await;
    assert_eq!(page.expect("list").items.len(), 2);
}

#[tokio::test]
async fn what_was_made_and_is_gone_is_not_found() {
    let world = World::new().await;
    let (store, caller, key) = (world.store(), &world.caller, keyed("k", 1));
    let made = store.create_webhook_endpoint(caller, &new_endpoint("s"), &key).await.expect("made");
    store.delete_webhook_endpoint(&caller.project_id, &made.id).await.expect("deleted");
    let gone = store.create_webhook_endpoint(caller, &new_endpoint("s"), &key).await;
    assert!(matches!(gone, Err(StoreError::NotFound { .. })), "{gone:?}");
}

#[tokio::test]
async fn a_secret_is_shown_once_and_a_retry_without_a_key_gets_another() {
    let world = World::new().await;
    let (store, admin) = (world.store(), administrator(&world).await);
    let project = &world.caller.project_id;
    let key = |asked: Idempotency| {
        let admin = &admin;
        async move { store.create_api_key_of_request(admin, project, "ci", &asked).await }
    };
    let made = key(keyed("k", 1)).await.expect("key");
    let shown = key(keyed("k", 1)).await.expect_err("shown");
    assert!(matches!(&shown, StoreError::SecretShown { key } if *key == made.id.as_str()));
    assert!(matches!(key(keyed("k", 2)).await, Err(StoreError::IdempotencyConflict)));
    let first = key(once(3)).await.expect("key");
    assert_ne!(key(retry(3)).await.expect("another").id, first.id);

    let key = |asked: Idempotency| {
        let admin = &admin;
        async move { store.create_admin_key_of_request(admin, "ops", None, &asked).await }
    };
    let made = key(keyed("a", 1)).await.expect("admin key");
    let shown = key(keyed("a", 1)).await.expect_err("shown");
    assert!(matches!(&shown, StoreError::SecretShown { key } if *key == made.key.id.as_str()));
    // Of no other kind.
    assert!(matches!(key(keyed("k", 1)).await, Err(StoreError::IdempotencyConflict)));
}

#[tokio::test]
async fn requests_that_are_remembered_no_more_are_forgotten() {
    let world = World::new().await;
    let (store, caller) = (world.store(), &world.caller);
    for body in [1, 2] {
        store.create_upload(caller, &new_upload(), &once(body)).await.expect("upload");
    }
    sqlx::query(
        "UPDATE creations SET created_at = now() - interval '25 hours'
                 WHERE request_sha256 = $1",
    )
    .bind([1_u8; 32].as_slice())
    .execute(&store.pool)
    .await
    .expect("age");
    assert_eq!(store.purge_creations().await.expect("purged"), 1);
    assert_eq!(store.purge_creations().await.expect("purged"), 0);
}
