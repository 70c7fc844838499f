//! Base models on the local disk: fetched once, kept, shared between workers and samplers.
//!
//! A model's directory appears under its name by a rename, whole and checked against the sums of
//! its manifest. The lock on `{id}.lock` lets one worker fetch while others wait; the system lets
//! go of it when a process dies, and whoever gets it next begins over. So what is cut off leaves
//! no litter, and a model is never fetched twice at a time.
//!
//! Imported models are few and stay. Models that were tuned in full and that adapters go on are as
//! many as the jobs that make them: they lie in a directory of their own, and before one is fetched,
//! those that were not used longest go until it fits. Whoever uses one shares its lock meanwhile,
//! and the lock's file has the time of the last use.

use crate::transfer::{self, TransferError};
use std::ffi::OsStr;
use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tokio::fs;
use tunesmith_core::weights::Manifest;
use tunesmith_store::base_models::BaseModel;
use tunesmith_store::objects::Objects;

/// How often one who waits for a lock looks. A blocking wait could not be given up on a drain.
const LOCK_POLL: Duration = Duration::from_millis(200);

/// Bytes of models that were tuned in full, unless it is told.
pub const DEFAULT_TUNED_CACHE_BYTES: u64 = 64 << 30;

const LOCK_EXTENSION: &str = "lock";

/// The models of one cache directory.
#[derive(Debug, Clone)]
pub struct ModelCache {
    models_dir: PathBuf,
    tuned_dir: PathBuf,
    tuned_bytes: u64,
}

/// A model of the cache, which stays there for as long as this lives.
#[derive(Debug)]
pub struct CachedModel {
    path: PathBuf,
    /// Shares the lock of a model that may go.
    _in_use: Option<File>,
}

impl CachedModel {
    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl ModelCache {
    /// The cache in `cache_dir`, where models that were tuned in full take `tuned_bytes` at most, but
    /// for those in use; directories are made when they are needed.
    #[must_use]
    pub fn new(cache_dir: &Path, tuned_bytes: u64) -> Self {
        Self {
            models_dir: cache_dir.join("models"),
            tuned_dir: cache_dir.join("tuned-models"),
            tuned_bytes,
        }
    }

    /// `model`, fetched if it is not there.
    ///
    /// Sums are checked on arrival. Later uses check each file's presence and size, which finds
    /// what a full disk or a power cut leaves, and take no time with a large model.
    ///
    /// # Errors
    /// What the store or the disk says, or that the model is damaged in the store.
    pub async fn model(
        &self,
        objects: &Objects,
        model: &BaseModel,
    ) -> Result<CachedModel, TransferError> {
        let may_go = model.tuned.is_some();
        let parent = if may_go { &self.tuned_dir } else { &self.models_dir };
        let dir = parent.join(model.id.as_str());
        let lock_path = dir.with_extension(LOCK_EXTENSION);
        loop {
            let in_use = match may_go {
                true => use_model(&lock_path).await.map_err(TransferError::disk(&lock_path))?,
                false => None,
            };
            if in_use.is_some() == may_go && is_whole(&dir, &model.manifest).await {
                let path = fs::canonicalize(&dir).await.map_err(TransferError::disk(&dir))?;
                return Ok(CachedModel { path, _in_use: in_use });
            }
            drop(in_use);
            fs::create_dir_all(parent).await.map_err(TransferError::disk(parent))?;
            let _lock =
                lock(&lock_path, File::try_lock).await.map_err(TransferError::disk(&lock_path))?;
            // Whoever held the lock before may have fetched it.
            if !is_whole(&dir, &model.manifest).await {
                if may_go {
                    self.make_room(&dir, model.bytes()).await?;
                }
                fetch(objects, model, &dir).await?;
            }
        }
    }

    /// Lets go of the tuned models that were not used longest, until one of so many bytes fits, which
    /// takes the place of what lies in `dir`.
    async fn make_room(&self, dir: &Path, bytes: u64) -> Result<(), TransferError> {
        let mut held = held(&self.tuned_dir).await.map_err(TransferError::disk(&self.tuned_dir))?;
        held.retain(|held| held.dir != dir);
        let mut taken: u64 = held.iter().map(|held| held.bytes).sum();
        for Held { dir, bytes: own, .. } in held {
            if taken.saturating_add(bytes) <= self.tuned_bytes {
                return Ok(());
            }
            let lock_path = dir.with_extension(LOCK_EXTENSION);
            let lock = try_lock(&lock_path, File::try_lock);
            let Some(_lock) = lock.map_err(TransferError::disk(&lock_path))? else { continue };
            tracing::info!(model = %dir.display(), bytes = own, "a tuned model leaves the cache");
            remove(&dir).await?;
            remove(&incoming(&dir)).await?;
            fs::remove_file(&lock_path).await.map_err(TransferError::disk(&lock_path))?;
            taken -= own;
        }
        Ok(())
    }
}

/// Where `dir` is made.
fn incoming(dir: &Path) -> PathBuf {
    dir.with_extension("incoming")
}

/// Fetches `model` into `dir`; the caller holds the lock.
async fn fetch(objects: &Objects, model: &BaseModel, dir: &Path) -> Result<(), TransferError> {
    tracing::info!(model = model.name, bytes = model.bytes(), "fetching a base model");
    let incoming = incoming(dir);
    remove(&incoming).await?;
    // A directory that is there but not whole is damaged.
    remove(dir).await?;
    fs::create_dir(&incoming).await.map_err(TransferError::disk(&incoming))?;
    transfer::download_dir(objects, &model.prefix(), &model.manifest, &incoming).await?;
    for file in &model.manifest.files {
        let path = incoming.join(&file.name);
        let synced = async { fs::File::open(&path).await?.sync_all().await };
        synced.await.map_err(TransferError::disk(&path))?;
    }
    fs::rename(&incoming, dir).await.map_err(TransferError::disk(dir))
}

/// A tuned model on the disk, with what was fetched of it.
struct Held {
    dir: PathBuf,
    bytes: u64,
    used: SystemTime,
}

/// The models in `tuned_dir`, those that were not used longest first.
async fn held(tuned_dir: &Path) -> io::Result<Vec<Held>> {
    let mut all = Vec::new();
    let mut entries = fs::read_dir(tuned_dir).await?;
    while let Some(entry) = entries.next_entry().await? {
        let path = entry.path();
        if path.extension() != Some(OsStr::new(LOCK_EXTENSION)) {
            continue;
        }
        // One that another process has just let go of is of no interest.
        let Ok(used) = entry.metadata().await.and_then(|lock| lock.modified()) else { continue };
        let dir = path.with_extension("");
        let bytes = size(&dir).await? + size(&incoming(&dir)).await?;
        all.push(Held { dir, bytes, used });
    }
    all.sort_by_key(|held| held.used);
    Ok(all)
}

/// Bytes of the files that lie in `dir`, which need not be there.
async fn size(dir: &Path) -> io::Result<u64> {
    let mut entries = match fs::read_dir(dir).await {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    let mut bytes = 0;
    while let Some(entry) = entries.next_entry().await? {
        bytes += entry.metadata().await.map_or(0, |file| file.len());
    }
    Ok(bytes)
}

async fn is_whole(dir: &Path, manifest: &Manifest) -> bool {
    for file in &manifest.files {
        match fs::metadata(dir.join(&file.name)).await {
            Ok(found) if found.len() == file.bytes => {}
            _ => return false,
        }
    }
    fs::try_exists(dir).await.unwrap_or(false)
}

async fn remove(dir: &Path) -> Result<(), TransferError> {
    match fs::remove_dir_all(dir).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(TransferError::disk(dir)(error))
        }
        _ => Ok(()),
    }
}

/// Takes the lock on the file at `path` in the way `take`, until the returned file is closed.
async fn lock(path: &Path, take: fn(&File) -> Result<(), TryLockError>) -> io::Result<File> {
    loop {
        if let Some(file) = try_lock(path, take)? {
            return Ok(file);
        }
        tokio::time::sleep(LOCK_POLL).await;
    }
}

/// The same, unless somebody has it.
fn try_lock(path: &Path, take: fn(&File) -> Result<(), TryLockError>) -> io::Result<Option<File>> {
    let file = File::options().create(true).write(true).truncate(false).open(path)?;
    match take(&file) {
        // One that was removed meanwhile is no lock: others may hold its successor.
        Ok(()) => Ok(is_at(&file, path)?.then_some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let own = file.metadata()?;
    Ok(std::fs::metadata(path).is_ok_and(|at| (at.dev(), at.ino()) == (own.dev(), own.ino())))
}

/// Shares the lock at `path` of a model that may go, and notes the time; `None` where there is none
/// as yet.
async fn use_model(path: &Path) -> io::Result<Option<File>> {
    if !path.exists() {
        return Ok(None);
    }
    let file = lock(path, File::try_lock_shared).await?;
    file.set_modified(SystemTime::now())?;
    Ok(Some(file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use std::fs as std_fs;
    use tempfile::TempDir;
    use tunesmith_core::weights::{CheckpointPlace, ManifestFile};
    use tunesmith_store::base_models::TunedBase;

    const FILES: [(&str, &str); 2] = [("config.json", "{}"), ("model.safetensors", "weights")];

    struct World {
        objects: Objects,
        model: BaseModel,
        dir: TempDir,
    }

    impl World {
        async fn new() -> Self {
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
            Self { objects, model, dir: tempfile::tempdir().expect("temp dir") }
        }

        async fn cached(&self) -> Result<CachedModel, TransferError> {
            self.cache().model(&self.objects, &self.model).await
        }

        /// With room for two of the models.
        fn cache(&self) -> ModelCache {
            ModelCache::new(self.dir.path(), 2 * self.model.bytes())
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

        /// Numbers of the tuned models on the disk.
        fn on_disk(&self) -> Vec<u64> {
            let entries = std_fs::read_dir(self.dir.path().join("tuned-models")).expect("read");
            let names = entries.map(|entry| entry.expect("entry").file_name());
            let number =
                |name: &OsStr| name.to_str()?.strip_prefix("basemodel_tuned")?.parse().ok();
            let mut numbers: Vec<u64> = names.filter_map(|name| number(&name)).collect();
            numbers.sort_unstable();
            numbers
        }

        /// As if a tuned model was used so many seconds after 1970.
        fn set_used(&self, number: u64, seconds: u64) {
            let path = self.dir.path().join(format!("tuned-models/basemodel_tuned{number}.lock"));
            let used = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            File::options()
                .write(true)
                .open(path)
                .expect("a lock")
                .set_modified(used)
                .expect("set");
        }
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
        assert_eq!(
            world.on_disk(),
            [1, 3, 4],
            "another uses it still, and there is more than fits"
        );
        drop((shared, third));
        world.use_tuned(5).await;
        assert_eq!(world.on_disk(), [4, 5]);
    }

    #[tokio::test]
    async fn what_was_cut_off_of_a_tuned_model_counts_and_goes_too() {
        let world = World::new().await;
        let cut_off = world.dir.path().join("tuned-models/basemodel_tuned9.incoming");
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
}
