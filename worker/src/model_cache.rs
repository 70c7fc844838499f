//! Base models on the local disk: fetched once, kept, shared between workers.
//!
//! A model's directory appears under its name by a rename, whole and checked against the sums of
//! its manifest. The lock on `{id}.lock` lets one worker fetch while others wait; the system lets
//! go of it when a process dies, and whoever gets it next begins over. So what is cut off leaves
//! no litter, and a model is never fetched twice at a time.

use crate::transfer::{self, TransferError};
use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::fs;
use tunesmith_core::weights::Manifest;
use tunesmith_store::base_models::BaseModel;
use tunesmith_store::objects::Objects;

/// How often one who waits for a lock looks. A blocking wait could not be given up on a drain.
const LOCK_POLL: Duration = Duration::from_millis(200);

/// The models of one cache directory.
#[derive(Debug, Clone)]
pub struct ModelCache {
    models_dir: PathBuf,
}

impl ModelCache {
    /// The cache in `cache_dir`; directories are made when they are needed.
    #[must_use]
    pub fn new(cache_dir: &Path) -> Self {
        Self { models_dir: cache_dir.join("models") }
    }

    /// The directory of `model`, fetched if it is not there.
    ///
    /// Sums are checked on arrival. Later uses check each file's presence and size, which finds
    /// what a full disk or a power cut leaves, and take no time with a large model.
    ///
    /// # Errors
    /// What the store or the disk says, or that the model is damaged in the store.
    pub async fn directory(
        &self,
        objects: &Objects,
        model: &BaseModel,
    ) -> Result<PathBuf, TransferError> {
        let dir = self.models_dir.join(model.id.as_str());
        if is_whole(&dir, &model.manifest).await {
            return absolute(&dir).await;
        }
        fs::create_dir_all(&self.models_dir)
            .await
            .map_err(TransferError::disk(&self.models_dir))?;
        let lock_path = self.models_dir.join(format!("{}.lock", model.id));
        let _lock = lock(&lock_path).await.map_err(TransferError::disk(&lock_path))?;
        // Whoever held the lock before may have fetched it.
        if !is_whole(&dir, &model.manifest).await {
            self.fetch(objects, model, &dir).await?;
        }
        absolute(&dir).await
    }

    /// Fetches `model` into `dir`; the caller holds the lock.
    async fn fetch(
        &self,
        objects: &Objects,
        model: &BaseModel,
        dir: &Path,
    ) -> Result<(), TransferError> {
        tracing::info!(model = model.name, bytes = model.bytes(), "fetching a base model");
        let incoming = self.models_dir.join(format!("{}.incoming", model.id));
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
}

async fn absolute(dir: &Path) -> Result<PathBuf, TransferError> {
    fs::canonicalize(dir).await.map_err(TransferError::disk(dir))
}

async fn is_whole(dir: &Path, manifest: &Manifest) -> bool {
    for file in &manifest.files {
        match fs::metadata(dir.join(&file.name)).await {
            Ok(found) if found.len() == file.bytes => {}
            _ => return false,
        }
    }
    !manifest.files.is_empty()
}

async fn remove(dir: &Path) -> Result<(), TransferError> {
    match fs::remove_dir_all(dir).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(TransferError::disk(dir)(error))
        }
        _ => Ok(()),
    }
}

/// Holds the lock on the file at `path` until the returned file is closed.
async fn lock(path: &Path) -> io::Result<File> {
    let file = File::options().create(true).write(true).truncate(false).open(path)?;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => tokio::time::sleep(LOCK_POLL).await,
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use std::fs as std_fs;
    use tempfile::TempDir;
    use tunesmith_core::weights::ManifestFile;

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

        async fn directory(&self) -> Result<PathBuf, TransferError> {
            ModelCache::new(self.dir.path()).directory(&self.objects, &self.model).await
        }

        async fn assert_cached(&self) {
            let dir = self.directory().await.expect("directory");
            for (name, content) in FILES {
                assert_eq!(std_fs::read_to_string(dir.join(name)).expect("read"), content);
            }
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
        let (first, second) = tokio::join!(world.directory(), world.directory());
        assert_eq!(first.expect("first"), second.expect("second"));
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
        let dir = world.directory().await.expect("directory");
        std_fs::write(dir.join("model.safetensors"), "").expect("write");
        world.assert_cached().await;
    }

    #[tokio::test]
    async fn a_model_whose_content_is_not_what_its_manifest_says_is_refused() {
        let mut world = World::new().await;
        world.model.manifest.files[1].sha256 = "0".repeat(64);
        assert!(matches!(world.directory().await, Err(TransferError::Damaged { .. })));
        assert!(!world.dir.path().join("models/basemodel_1").exists());
    }
}
