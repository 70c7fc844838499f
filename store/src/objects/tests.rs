use super::*;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use tunesmith_core::weights::CheckpointPlace;

const MIB: usize = 1 << 20;

/// Every kind of store that runs here: one in memory, one in a directory.
fn stores() -> Vec<(Objects, Option<tempfile::TempDir>)> {
    let directory = tempfile::tempdir().expect("directory");
    // The directory inside is missing, as on a first start.
    let url = format!("file://{}/a%20b/objects", directory.path().display());
    vec![
        (Objects::open("memory:///").expect("memory"), None),
        (Objects::open(&url).expect("directory"), Some(directory)),
    ]
}

fn key(name: &str) -> ObjectKey {
    ObjectKey::File(name.into())
}

fn pieces(pieces: usize) -> impl Stream<Item = Result<Bytes, io::Error>> {
    futures::stream::iter((0..pieces).map(|index| Ok(Bytes::from(vec![index as u8; MIB]))))
}

/// The files that a local store has, those of unfinished uploads too.
fn files_below(directory: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).expect("directory") {
        let path = entry.expect("entry").path();
        if path.is_dir() { found.extend(files_below(&path)) } else { found.push(path) }
    }
    found
}

#[tokio::test]
async fn what_was_put_comes_back_whole_and_in_part() {
    for (objects, _directory) in stores() {
        // Past the size of a part, so that it goes up in several.
        let stored = objects.put_stream(&key("a"), pieces(20), u64::MAX).await.expect("put");
        assert_eq!(stored.bytes, 20 * MIB as u64);
        let read = objects.get(&key("a")).await.expect("get");
        assert_eq!(read.bytes, stored.bytes);
        let hash = read.stream.try_fold(Hash::default(), Hash::with).await.expect("read");
        assert_eq!(hash.stored(), stored);

        let range =
            objects.get_range(&key("a"), MIB as u64 - 1..MIB as u64 + 1).await.expect("range");
        assert_eq!(range.bytes, stored.bytes);
        let bytes: Vec<Bytes> = range.stream.try_collect().await.expect("read");
        assert_eq!(bytes.concat(), [0, 1]);

        let directory = tempfile::tempdir().expect("directory");
        let copy = directory.path().join("copy");
        assert_eq!(objects.download(&key("a"), &copy).await.expect("download"), stored);
        assert_eq!(objects.put_file(&key("b"), &copy).await.expect("put"), stored);
        assert_eq!(objects.put_bytes(&key("empty"), Bytes::new()).await.expect("put").bytes, 0);
        assert_eq!(objects.read(&key("empty")).await.expect("read"), Bytes::new());
    }
}

#[tokio::test]
async fn the_hash_is_sha256() {
    let (objects, _) = stores().remove(0);
    let stored = objects.put_bytes(&key("abc"), Bytes::from_static(b"abc")).await.expect("put");
    assert_eq!(stored.sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

#[tokio::test]
async fn a_stream_over_the_cap_is_refused_and_leaves_nothing() {
    for (objects, directory) in stores() {
        for cap in [0, 3 * MIB as u64 - 1, 20 * MIB as u64 - 1] {
            let error =
                objects.put_stream(&key("a"), pieces(20), cap).await.expect_err("too large");
            assert!(matches!(error, StoreError::TooLarge { cap: stated } if stated == cap));
            let missing = objects.get(&key("a")).await.err().expect("nothing there");
            assert!(matches!(missing, StoreError::NotFound { .. }), "{missing}");
        }
        let exact = objects.put_stream(&key("a"), pieces(20), 20 * MIB as u64).await.expect("put");
        assert_eq!(exact.bytes, 20 * MIB as u64);
        if let Some(directory) = directory {
            wait_for_one_file(directory.path()).await;
        }
    }
}

/// Waits until the parts of broken uploads are gone, which happens in the background.
async fn wait_for_one_file(directory: &Path) {
    while files_below(directory).len() > 1 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_stream_that_is_dropped_half_way_leaves_nothing() {
    for (objects, directory) in stores() {
        let endless = pieces(12).chain(futures::stream::pending());
        let key_a = key("a");
        let put = objects.put_stream(&key_a, endless, u64::MAX);
        tokio::time::timeout(std::time::Duration::from_millis(200), put)
            .await
            .expect_err("endless");
        objects.put_bytes(&key("b"), Bytes::from_static(b"whole")).await.expect("put");
        assert!(objects.get(&key("a")).await.is_err());
        if let Some(directory) = directory {
            wait_for_one_file(directory.path()).await;
        }
    }
}

#[tokio::test]
async fn a_stream_that_breaks_off_says_why_and_leaves_nothing() {
    for (objects, _directory) in stores() {
        let broken = pieces(12).chain(futures::stream::iter([Err(io::Error::other("hung up"))]));
        let error = objects.put_stream(&key("a"), broken, u64::MAX).await.expect_err("broken");
        assert!(
            matches!(&error, StoreError::BrokenStream(_)) && error.to_string().contains("hung up")
        );
        assert!(objects.get(&key("a")).await.is_err());
    }
}

#[tokio::test]
async fn memory_stays_flat_whatever_the_size() {
    // Counts the pieces that are alive: made, and not yet let go of by the upload.
    static ALIVE: AtomicUsize = AtomicUsize::new(0);
    static MOST: AtomicUsize = AtomicUsize::new(0);
    struct Piece(Vec<u8>);
    impl AsRef<[u8]> for Piece {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }
    impl Drop for Piece {
        fn drop(&mut self) {
            ALIVE.fetch_sub(1, Ordering::SeqCst);
        }
    }
    let (objects, _directory) = stores().remove(1);
    let stream = futures::stream::iter((0..128).map(|_| {
        let alive = ALIVE.fetch_add(1, Ordering::SeqCst) + 1;
        MOST.fetch_max(alive, Ordering::SeqCst);
        Ok::<_, io::Error>(Bytes::from_owner(Piece(vec![7; MIB])))
    }));
    objects.put_stream(&key("a"), stream, u64::MAX).await.expect("put");
    let most = MOST.load(Ordering::SeqCst);
    assert!(most <= 3 * PART_BYTES / MIB, "{most} MiB of 128 were in memory at one time");
}

#[tokio::test]
async fn an_object_is_written_once() {
    for (objects, _directory) in stores() {
        let (first, other) = (Bytes::from_static(b"first"), Bytes::from_static(b"other"));
        let stored = objects.put_bytes(&key("a"), first.clone()).await.expect("put");
        assert_eq!(objects.put_bytes(&key("a"), first.clone()).await.expect("the same"), stored);
        let error = objects.put_bytes(&key("a"), other).await.expect_err("other content");
        assert!(matches!(error, StoreError::ObjectExists(_)), "{error}");
        assert_eq!(objects.read(&key("a")).await.expect("read"), first);
    }
}

#[tokio::test]
async fn a_set_is_listed_and_deleted_and_its_neighbours_stay() {
    for (objects, _directory) in stores() {
        let place = |step| CheckpointPlace { job: "ftjob-a".into(), attempt: 1, step };
        let weights = ObjectPrefix::CheckpointWeights(place(1));
        let state = ObjectPrefix::CheckpointState(place(1));
        let later = ObjectPrefix::CheckpointWeights(place(10));
        for prefix in [&weights, &state, &later] {
            for name in ["b", "a", "sub/c"] {
                objects
                    .put_bytes(&prefix.file(name), Bytes::from_static(b"xy"))
                    .await
                    .expect("put");
            }
        }
        let names = [("a".to_owned(), 2), ("b".to_owned(), 2), ("sub/c".to_owned(), 2)];
        assert_eq!(objects.list(&weights).await.expect("list"), names);
        objects.delete_prefix(&weights).await.expect("delete");
        objects.delete_prefix(&weights).await.expect("again");
        assert_eq!(objects.list(&weights).await.expect("list"), []);
        assert_eq!(objects.list(&state).await.expect("list"), names);
        assert_eq!(objects.list(&later).await.expect("list"), names);
    }
}

#[test]
fn a_url_of_another_kind_says_which_there_are() {
    for url in ["ftp://host/x", "objects", "file://relative"] {
        let message = Objects::open(url).expect_err(url).to_string();
        assert!(message.contains(url), "{message}");
    }
    let message = Objects::open("ftp://host/x").expect_err("ftp").to_string();
    assert!(message.contains("s3://"), "{message}");
}

#[test]
fn cloud_urls_open_without_a_connection() {
    for url in ["s3://bucket/some/prefix", "gs://bucket", "az://container"] {
        if let Err(error) = Objects::open(url) {
            // Azure's client wants an account's name, which only the environment has.
            assert!(url.starts_with("az://"), "{url}: {error}");
            assert!(error.to_string().contains("ccount"), "{error}");
        }
    }
}
