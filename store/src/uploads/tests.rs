use super::*;
use crate::fixtures::{World, once, tenant};
use crate::objects::ObjectKey;
use bytes::Bytes;

fn new_upload(bytes: u64) -> NewUpload {
    NewUpload {
        file: FileFacts {
            filename: "rows.jsonl".to_owned(),
            purpose: Purpose::FineTune,
            expires_after: Some(Duration::from_secs(3600)),
        },
        mime_type: "text/jsonl".to_owned(),
        bytes,
    }
}

async fn part(
    world: &World,
    upload: &Upload,
    content: &'static [u8],
) -> Result<String, StoreError> {
    let stream = futures::stream::iter([Ok::<_, StoreError>(Bytes::from_static(content))]);
    let part = world.store().add_upload_part(&world.caller, &upload.id, stream, &once(0)).await?;
    Ok(part.id.to_string())
}

async fn begin(world: &World, bytes: u64) -> Upload {
    world.store().create_upload(&world.caller, &new_upload(bytes), &once(0)).await.expect("begun")
}

async fn parts_stored(world: &World, upload: &Upload) -> usize {
    let prefix = ObjectPrefix::UploadParts(upload.id.clone());
    world.store().objects().list(&prefix).await.expect("list").len()
}

async fn run_out(world: &World, upload: &Upload, ago: &str) {
    sqlx::query("UPDATE uploads SET expires_at = now() - $2::interval WHERE id = $1")
        .bind(upload.id.as_str())
        .bind(ago)
        .execute(&world.store().pool)
        .await
        .expect("aged");
}

#[tokio::test]
async fn parts_become_a_file_in_the_order_that_is_named_and_not_that_of_arrival() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let upload = begin(&world, 6).await;
    assert_eq!(
        (upload.status, upload.expires_at),
        (UploadStatus::Pending, upload.created_at + Duration::from_secs(3600))
    );
    let last = part(&world, &upload, b"ef").await.expect("part");
    let first = part(&world, &upload, b"abcd").await.expect("part");
    let unused = part(&world, &upload, b"xyz").await.expect("part");
    assert!(![&first, &last].contains(&&unused));
    let parts = [first, last];
    // md5sum of "abcdef".
    let md5 = Some("E80B5017098950FC58AAD83C8C14978E");
    let done = store.complete_upload(project, &upload.id, &parts, md5).await.expect("completed");
    assert_eq!(done.status, UploadStatus::Completed);
    let file = store.file(project, &done.file_id.clone().expect("file")).await.expect("a file");
    assert_eq!(
        (file.filename.as_str(), file.bytes, file.purpose),
        ("rows.jsonl", 6, Purpose::FineTune)
    );
    assert_eq!(file.expires_at, Some(file.created_at + Duration::from_secs(3600)));
    assert_eq!(&store.objects().read(&file.object()).await.expect("content")[..], b"abcdef");
    assert_eq!(parts_stored(&world, &upload).await, 0);
    // Sent again, as after a lost reply, it is the same file.
    let again = store.complete_upload(project, &upload.id, &parts, md5).await.expect("the same");
    assert_eq!(again, done);
    let other = store.complete_upload(project, &upload.id, &parts[..1], None).await;
    assert!(matches!(other, Err(StoreError::UploadEnded { status: "completed", .. })), "{other:?}");
    let late = part(&world, &upload, b"g").await;
    assert!(matches!(late, Err(StoreError::UploadEnded { .. })), "{late:?}");
}

#[tokio::test]
async fn parts_that_do_not_fit_are_refused_and_the_upload_goes_on() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let upload = begin(&world, 4).await;
    let half = part(&world, &upload, b"ab").await.expect("part");
    let rest = part(&world, &upload, b"cd").await.expect("part");
    let foreign = begin(&world, 2).await;
    let foreign = part(&world, &foreign, b"cd").await.expect("part");
    for (parts, md5, reason) in [
        (vec![&half], None, "the parts have 2 bytes together where 4 were announced"),
        (vec![&half, &half], None, "is named twice"),
        (vec![&half, &foreign], None, "it has no part"),
        (vec![&half, &rest], Some("00"), "the content's MD5 is e2fc714c4727ee9395f324cd2e7f331f"),
    ] {
        let parts: Vec<String> = parts.into_iter().cloned().collect();
        let error = store.complete_upload(project, &upload.id, &parts, md5).await;
        let error = error.expect_err("refused");
        assert!(matches!(error, StoreError::UploadParts { .. }), "{error}");
        assert!(error.to_string().contains(reason), "{error}");
    }
    let files: i64 = sqlx::query_scalar("SELECT count(*) FROM files WHERE bytes IS NULL")
        .fetch_one(&store.pool)
        .await
        .expect("count");
    assert_eq!(files, 0, "refused completions leave no file behind");
    store.complete_upload(project, &upload.id, &[half, rest], None).await.expect("completed");
}

#[tokio::test]
async fn a_part_over_the_announced_bytes_and_endless_copies_are_refused() {
    let world = World::new().await;
    let upload = begin(&world, 3).await;
    let error = part(&world, &upload, b"abcd").await.expect_err("larger than the whole");
    assert!(matches!(error, StoreError::TooLarge { cap: 3 }), "{error}");
    for _ in 0..MOST_COPIES {
        part(&world, &upload, b"abc").await.expect("a copy");
    }
    let error = part(&world, &upload, b"abc").await.expect_err("one copy too many");
    assert!(matches!(error, StoreError::UploadParts { .. }), "{error}");
    assert_eq!(parts_stored(&world, &upload).await, MOST_COPIES as usize);
}

#[tokio::test]
async fn a_cancelled_upload_drops_its_parts_and_stays_cancelled() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let upload = begin(&world, 2).await;
    let only = part(&world, &upload, b"ab").await.expect("part");
    for _ in 0..2 {
        let cancelled = store.cancel_upload(project, &upload.id).await.expect("cancelled");
        assert_eq!(cancelled.status, UploadStatus::Cancelled);
    }
    assert_eq!(parts_stored(&world, &upload).await, 0);
    let error = store.complete_upload(project, &upload.id, &[only], None).await;
    assert!(matches!(error, Err(StoreError::UploadEnded { status: "cancelled", .. })), "{error:?}");
}

#[tokio::test]
async fn an_upload_whose_hour_is_over_takes_nothing_and_is_cleared_away() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let upload = begin(&world, 2).await;
    let fresh = begin(&world, 2).await;
    let only = part(&world, &upload, b"ab").await.expect("part");
    part(&world, &fresh, b"ab").await.expect("part");
    run_out(&world, &upload, "1 second").await;
    assert_eq!(
        store.upload(project, &upload.id).await.expect("there").status,
        UploadStatus::Expired
    );
    assert!(part(&world, &upload, b"cd").await.is_err());
    assert!(store.complete_upload(project, &upload.id, &[only], None).await.is_err());
    assert!(store.cancel_upload(project, &upload.id).await.is_err());
    assert_eq!(store.purge_uploads().await.expect("purge"), 0, "a completion may be under way");
    run_out(&world, &upload, "1 day").await;
    assert_eq!(store.purge_uploads().await.expect("purge"), 1);
    assert_eq!((parts_stored(&world, &upload).await, parts_stored(&world, &fresh).await), (0, 1));
    assert_eq!(store.purge_uploads().await.expect("purge"), 0, "cleared once");
}

#[tokio::test]
async fn of_two_completions_at_once_both_say_the_same_file() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    for _ in 0..5 {
        let upload = begin(&world, 2).await;
        let parts = [part(&world, &upload, b"ab").await.expect("part")];
        let (one, two) = tokio::join!(
            store.complete_upload(project, &upload.id, &parts, None),
            store.complete_upload(project, &upload.id, &parts, None)
        );
        let (one, two) = (one.expect("completed"), two.expect("completed"));
        assert_eq!(one.file_id, two.file_id);
        let key = ObjectKey::File(one.file_id.expect("file"));
        assert_eq!(&store.objects().read(&key).await.expect("content")[..], b"ab");
    }
}

#[tokio::test]
async fn another_project_sees_no_upload() {
    let world = World::new().await;
    let store = world.store();
    let upload = begin(&world, 2).await;
    let caller = tenant(store, "other").await;
    let other = caller.project_id.clone();
    assert!(matches!(store.upload(&other, &upload.id).await, Err(StoreError::NotFound { .. })));
    let stream = futures::stream::iter([Ok::<_, StoreError>(Bytes::from_static(b"ab"))]);
    let error = store.add_upload_part(&caller, &upload.id, stream, &once(0)).await;
    let error = error.expect_err("foreign");
    assert!(matches!(error, StoreError::NotFound { kind: "upload", .. }), "{error}");
    assert!(store.cancel_upload(&other, &upload.id).await.is_err());
}
