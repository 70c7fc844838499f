//! Base models on the local disk: fetched once, kept, shared between workers and samplers.
//!
//! A model's directory appears under its name by a rename, whole and checked against the sums of
//! its manifest. The lock on `{id}.lock` lets one worker fetch while others wait; the system lets
//! go of it when a process dies, and whoever gets it next begins over. So what is cut off leaves
//! no litter, and a model is never fetched twice at a time.
//!
//! Imported models are few and stay. Models that were tuned in full and that adapters go on are as
//! many as the jobs that make them: they lie in a directory of their own, and before one is fetched,
//! those that were not used longest go until it fits ([`room`]). Whoever uses one shares its lock
//! meanwhile, and the lock's file has the time of the last use.

mod room;
#[cfg(test)]
mod tests;

use crate::transfer::{self, TransferError};
use room::TunedRoom;
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
    tuned: TunedRoom,
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
    /// The cache in `cache_dir`, where models that were tuned in full take `tuned_bytes` at most, all
    /// processes together, but for those in use or on their way; directories are made when they are
    /// needed.
    #[must_use]
    pub fn new(cache_dir: &Path, tuned_bytes: u64) -> Self {
        Self {
            models_dir: cache_dir.join("models"),
            tuned: TunedRoom::new(cache_dir.join("tuned-models"), tuned_bytes),
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
        let parent = if may_go { self.tuned.dir() } else { &self.models_dir };
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
            let mut lock =
                lock(&lock_path, File::try_lock).await.map_err(TransferError::disk(&lock_path))?;
            // Whoever held the lock before may have fetched it.
            if !is_whole(&dir, &model.manifest).await {
                if may_go {
                    lock = self.tuned.reserve(&dir, model.bytes(), lock).await?;
                }
                fetch(objects, model, &dir).await?;
            }
            drop(lock);
        }
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
    removed(&incoming, fs::remove_dir_all(&incoming).await)?;
    // A directory that is there but not whole is damaged.
    removed(dir, fs::remove_dir_all(dir).await)?;
    fs::create_dir(&incoming).await.map_err(TransferError::disk(&incoming))?;
    transfer::download_dir(objects, &model.prefix(), &model.manifest, &incoming).await?;
    for file in &model.manifest.files {
        let path = incoming.join(&file.name);
        let synced = async { fs::File::open(&path).await?.sync_all().await };
        synced.await.map_err(TransferError::disk(&path))?;
    }
    fs::rename(&incoming, dir).await.map_err(TransferError::disk(dir))
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

/// What came of removing `dir`, which need not have been there.
fn removed(dir: &Path, result: io::Result<()>) -> Result<(), TransferError> {
    match result {
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
