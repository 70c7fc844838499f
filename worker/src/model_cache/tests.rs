use super::*;
use bytes::Bytes;
use futures::future::join_all;
use std::ffi::OsStr;
use std::fs as std_fs;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use tempfile::TempDir;
use tunesmith_core::weights::{CheckpointPlace, ManifestFile};
use tunesmith_store::base_models::TunedBase;

const FILES: [(&str, &str); 2] = [("config.json", "{}"), ("model.safetensors", "weights")];

struct World {
    objects: Objects,
    model: BaseModel,
    dir: TempDir,
    /// How many tuned models fit.
    room: u64,
}

impl World {
    async fn new() -> Self {
        Self::with_room(2).await
    }

    async fn with_room(room: u64) -> Self {
        let mut model = BaseModel {
            id: "basemodel_1".into(),
            name: "tiny".to_owned(),
            context_length: 64,
            config: serde_json::json!({}),
            manifest: Manifest::default(),
            created_at: time::OffsetDateTime::UNIX_EPOCH,
            tuned: None,
        };
        let objects = Objects::open("memory:///").expect("memory store");
        for (name, content) in FILES {
            let content = Bytes::from_static(content.as_bytes());
            objects.put_bytes(&model.file(name), content.clone()).await.expect("put");
            let file = ManifestFile::measure(name, &*content).expect("measure");
            model.manifest.files.push(file);
        }
        Self { objects, model, dir: tempfile::tempdir().expect("temp dir"), room }
    }

    async fn cached(&self) -> Result<CachedModel, TransferError> {
        self.cache().model(&self.objects, &self.model).await
    }

    /// One more of the same directory, as another process has it.
    fn cache(&self) -> ModelCache {
        ModelCache::new(self.dir.path(), self.room * self.model.bytes())
    }

    async fn assert_cached(&self) {
        let model = self.cached().await.expect("a model");
        for (name, content) in FILES {
            assert_eq!(std_fs::read_to_string(model.path().join(name)).expect("read"), content);
        }
    }

    async fn use_tuned(&self, number: u64) -> CachedModel {
        let model = self.tuned(number).await;
        self.cache().model(&self.objects, &model).await.expect("a model")
    }

    async fn tuned(&self, number: u64) -> BaseModel {
        let place = CheckpointPlace { job: "ftjob-1".into(), attempt: 1, step: number };
        let model = BaseModel {
            id: format!("basemodel_tuned{number}").as_str().into(),
            tuned: Some(TunedBase {
                weights: place.into(),
                origin: self.model.id.clone(),
                origin_name: self.model.name.clone(),
            }),
            ..self.model.clone()
        };
        for (name, content) in FILES {
            let content = Bytes::from_static(content.as_bytes());
            self.objects.put_bytes(&model.file(name), content).await.expect("put");
        }
        model
    }

    /// The fetch of a tuned model whose directory is made and not all of it there. Where this thread
    /// did not run meanwhile, the fetch may have gone on unseen: it is then begun anew.
    async fn begun(&self, number: u64) -> Pin<Box<impl Future<Output = CachedModel>>> {
        let incoming = self.incoming(number);
        for _ in 0..1000 {
            let mut fetch = Box::pin(self.use_tuned(number));
            let ended = poll_fn(|context| {
                if incoming.exists() {
                    return Poll::Ready(false);
                }
                fetch.as_mut().poll(context).map(|_| true)
            });
            if !ended.await {
                if size_of_files(&incoming).is_some_and(|bytes| bytes < self.model.bytes()) {
                    return fetch;
                }
                fetch.await;
            }
            std_fs::remove_dir_all(incoming.with_extension("")).expect("remove");
            std_fs::remove_file(incoming.with_extension("lock")).expect("remove");
        }
        panic!("no fetch was seen on its way");
    }

    /// Where a tuned model is made.
    fn incoming(&self, number: u64) -> PathBuf {
        self.dir.path().join(format!("tuned-models/basemodel_tuned{number}.incoming"))
    }

    /// Numbers of the tuned models on the disk.
    fn on_disk(&self) -> Vec<u64> {
        let entries = std_fs::read_dir(self.dir.path().join("tuned-models")).expect("read");
        let names = entries.map(|entry| entry.expect("entry").file_name());
        let number = |name: &OsStr| name.to_str()?.strip_prefix("basemodel_tuned")?.parse().ok();
        let mut numbers: Vec<u64> = names.filter_map(|name| number(&name)).collect();
        numbers.sort_unstable();
        numbers
    }

    /// As if a tuned model was used so many seconds after 1970.
    fn set_used(&self, number: u64, seconds: u64) {
        let path = self.dir.path().join(format!("tuned-models/basemodel_tuned{number}.lock"));
        let used = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        File::options().write(true).open(path).expect("a lock").set_modified(used).expect("set");
    }
}

/// None where the directory is not there any more.
fn size_of_files(dir: &Path) -> Option<u64> {
    let files = std_fs::read_dir(dir).ok()?;
    Some(files.map(|file| file.expect("file").metadata().expect("metadata").len()).sum())
}

#[tokio::test]
async fn a_model_is_fetched_once() {
    let world = World::new().await;
    world.assert_cached().await;
    for (name, _) in FILES {
        world.objects.delete(&world.model.file(name)).await.expect("delete");
    }
    world.assert_cached().await;
}

#[tokio::test]
async fn two_workers_that_want_a_model_at_once_both_get_it() {
    let world = World::new().await;
    let (first, second) = tokio::join!(world.cached(), world.cached());
    assert_eq!(first.expect("first").path(), second.expect("second").path());
    world.assert_cached().await;
}

#[tokio::test]
async fn what_a_killed_worker_left_half_fetched_is_replaced() {
    let world = World::new().await;
    let incoming = world.dir.path().join("models/basemodel_1.incoming");
    std_fs::create_dir_all(&incoming).expect("create");
    std_fs::write(incoming.join("model.safetensors"), "wei").expect("write");
    world.assert_cached().await;
    assert!(!incoming.exists());
}

#[tokio::test]
async fn a_cached_file_that_was_cut_off_is_fetched_again() {
    let world = World::new().await;
    let model = world.cached().await.expect("a model");
    std_fs::write(model.path().join("model.safetensors"), "").expect("write");
    world.assert_cached().await;
}

#[tokio::test]
async fn a_model_whose_content_is_not_what_its_manifest_says_is_refused() {
    let mut world = World::new().await;
    world.model.manifest.files[1].sha256 = "0".repeat(64);
    assert!(matches!(world.cached().await, Err(TransferError::Damaged { .. })));
    assert!(!world.dir.path().join("models/basemodel_1").exists());
}

#[tokio::test]
async fn the_tuned_model_that_was_not_used_longest_makes_room_and_can_come_back() {
    let world = World::new().await;
    for number in [1, 2] {
        world.use_tuned(number).await;
        world.set_used(number, number);
    }
    // The first is used again, which notes the time.
    world.use_tuned(1).await;
    world.use_tuned(3).await;
    assert_eq!(world.on_disk(), [1, 3]);
    let gone = world.dir.path().join("tuned-models/basemodel_tuned2.lock");
    assert!(!gone.exists(), "nothing is left of it");
    world.set_used(1, 5);
    let again = world.use_tuned(2).await;
    assert_eq!(world.on_disk(), [2, 3]);
    assert_eq!(std_fs::read_to_string(again.path().join("config.json")).expect("read"), "{}");
}

#[tokio::test]
async fn a_tuned_model_in_use_stays_though_there_is_no_room() {
    let world = World::new().await;
    let first = world.use_tuned(1).await;
    let shared = world.use_tuned(1).await;
    world.set_used(1, 1);
    world.use_tuned(2).await;
    world.set_used(2, 2);
    world.use_tuned(3).await;
    assert_eq!(world.on_disk(), [1, 3], "the oldest is in use");
    drop(first);
    world.set_used(3, 3);
    let third = world.use_tuned(3).await;
    world.use_tuned(4).await;
    assert_eq!(world.on_disk(), [1, 3, 4], "another uses it still, and there is more than fits");
    drop((shared, third));
    world.use_tuned(5).await;
    assert_eq!(world.on_disk(), [4, 5]);
}

#[tokio::test]
async fn what_was_cut_off_of_a_tuned_model_counts_and_goes_too() {
    let world = World::new().await;
    let cut_off = world.incoming(9);
    std_fs::create_dir_all(&cut_off).expect("create");
    std_fs::write(cut_off.join("model.safetensors"), "weights").expect("write");
    std_fs::write(cut_off.with_extension("lock"), "").expect("write");
    world.set_used(9, 0);
    world.use_tuned(1).await;
    assert!(cut_off.exists(), "there is room for both");
    world.use_tuned(2).await;
    assert!(!cut_off.exists());
    assert_eq!(world.on_disk(), [1, 2]);
}

#[tokio::test]
async fn a_model_on_its_way_counts_whole_from_its_beginning() {
    let world = World::new().await;
    world.use_tuned(1).await;
    let second = world.begun(2).await;
    let _third = world.use_tuned(3).await;
    assert_eq!(world.on_disk(), [3], "the first has made room, and the second cannot");
    second.await;
    assert_eq!(world.on_disk(), [2, 3]);
}

#[tokio::test]
async fn what_a_killed_worker_had_begun_goes_before_any_model_that_is_whole() {
    let world = World::new().await;
    world.use_tuned(1).await;
    world.set_used(1, 1);
    drop(world.begun(2).await);
    assert!(world.incoming(2).exists());
    world.use_tuned(3).await;
    assert_eq!(world.on_disk(), [1, 3]);
    for left in [world.incoming(2), world.incoming(2).with_extension("lock")] {
        assert!(!left.exists(), "{} is left of it", left.display());
    }
}

#[tokio::test]
async fn many_fetches_at_once_of_different_models_keep_the_bound() {
    const MANY: u64 = 8;
    let world = World::with_room(MANY).await;
    for old in 1..=MANY {
        world.use_tuned(old).await;
    }
    let new: Vec<u64> = (MANY + 1..=2 * MANY).collect();
    let _in_use = join_all(new.iter().map(|&number| world.use_tuned(number))).await;
    assert_eq!(world.on_disk(), new, "they take all the room, so of the others none can stay");
}

#[tokio::test]
async fn fetches_at_once_of_more_than_fits_all_come_and_then_make_room() {
    let world = World::new().await;
    let in_use = join_all((1..=5).map(|number| world.use_tuned(number))).await;
    assert_eq!(world.on_disk(), [1, 2, 3, 4, 5], "all are in use");
    drop(in_use);
    for (number, seconds) in [(1, 1), (2, 2), (3, 3), (4, 5), (5, 4)] {
        world.set_used(number, seconds);
    }
    world.use_tuned(6).await;
    assert_eq!(world.on_disk(), [4, 6]);
}

#[tokio::test]
async fn a_model_larger_than_the_bound_comes_when_all_others_have_gone() {
    let world = World::with_room(0).await;
    world.use_tuned(1).await;
    let second = world.use_tuned(2).await;
    assert_eq!(world.on_disk(), [2]);
    world.use_tuned(3).await;
    assert_eq!(world.on_disk(), [2, 3], "but for one in use");
    drop(second);
}

#[tokio::test]
async fn a_damaged_tuned_model_is_fetched_again_into_its_own_room() {
    let world = World::new().await;
    world.use_tuned(1).await;
    let damaged = world.use_tuned(2).await.path().join("model.safetensors");
    std_fs::write(&damaged, "weight").expect("write");
    world.use_tuned(2).await;
    assert_eq!(std_fs::read_to_string(&damaged).expect("read"), "weights");
    assert_eq!(world.on_disk(), [1, 2]);
}

#[tokio::test]
async fn imported_models_stay_beside_tuned_ones() {
    let world = World::new().await;
    world.assert_cached().await;
    for number in 1..5 {
        world.use_tuned(number).await;
    }
    assert!(world.dir.path().join("models/basemodel_1").exists());
    assert_eq!(world.on_disk(), [3, 4]);
}
