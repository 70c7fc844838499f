//! The room of tuned models on the disk: what goes when one more is to be fetched.
//!
//! One process reckons at a time, under a lock of the directory. Before it lets go of that, it notes
//! in the file of the model's own lock how many bytes the model will take: whoever reckons next counts
//! them all, though nothing of the model is there yet, and no download is waited for. What was cut
//! off counts too, but its lock can be had, and it goes before any model that is whole.

use super::{LOCK_EXTENSION, incoming, lock, removed, try_lock};
use crate::transfer::TransferError;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The lock of the directory. Those of models have an extension.
const RECKONING: &str = "reckoning";

/// The directory of tuned models, and how many bytes they may take.
#[derive(Debug, Clone)]
pub(super) struct TunedRoom {
    dir: PathBuf,
    bytes: u64,
}

impl TunedRoom {
    pub(super) fn new(dir: PathBuf, bytes: u64) -> Self {
        Self { dir, bytes }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes room for a model of so many bytes, which takes the place of what lies in `dir`. It is
    /// the model's for as long as the caller holds its lock, which comes back.
    pub(super) async fn reserve(
        &self,
        dir: &Path,
        bytes: u64,
        model_lock: File,
    ) -> Result<File, TransferError> {
        let path = self.dir.join(RECKONING);
        let reckoning = lock(&path, File::try_lock).await.map_err(TransferError::disk(&path))?;
        let (room, dir) = (self.clone(), dir.to_owned());
        // One piece, which keeps its locks until it is done, even if nobody waits for it any more:
        // nobody else is to use a model that is just being removed.
        let reserving = tokio::task::spawn_blocking(move || {
            let _reckoning = reckoning;
            room.make(&dir, bytes)?;
            note(&model_lock, bytes).map_err(TransferError::disk(&dir))?;
            Ok(model_lock)
        });
        let failed = |error| TransferError::disk(&self.dir)(io::Error::other(error));
        reserving.await.unwrap_or_else(|error| Err(failed(error)))
    }

    /// Lets go of what was cut off, then of the models that were not used longest, until one of so
    /// many bytes fits in place of what lies in `dir`.
    fn make(&self, dir: &Path, bytes: u64) -> Result<(), TransferError> {
        let mut held = held(&self.dir).map_err(TransferError::disk(&self.dir))?;
        held.retain(|held| held.dir != dir);
        let mut taken: u64 = held.iter().map(|held| held.bytes).sum();
        for Held { dir, bytes: own, .. } in held {
            if taken.saturating_add(bytes) <= self.bytes {
                return Ok(());
            }
            let lock_path = dir.with_extension(LOCK_EXTENSION);
            let lock = try_lock(&lock_path, File::try_lock);
            let Some(_lock) = lock.map_err(TransferError::disk(&lock_path))? else { continue };
            tracing::info!(model = %dir.display(), bytes = own, "a tuned model leaves the cache");
            for dir in [&dir, &incoming(&dir)] {
                removed(dir, fs::remove_dir_all(dir))?;
            }
            fs::remove_file(&lock_path).map_err(TransferError::disk(&lock_path))?;
            taken -= own;
        }
        Ok(())
    }
}

/// Writes into the file of a model's lock how many bytes the model takes.
fn note(mut lock: &File, bytes: u64) -> io::Result<()> {
    lock.set_len(0)?;
    lock.write_all(bytes.to_string().as_bytes())
}

/// The bytes that were noted; none in the lock of a model that nobody has begun to fetch.
fn noted(lock_path: &Path) -> u64 {
    fs::read_to_string(lock_path).ok().and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
}

/// A tuned model on the disk, or on its way there.
struct Held {
    dir: PathBuf,
    /// It is on its way or was cut off.
    is_partial: bool,
    /// What it takes, or will.
    bytes: u64,
    used: SystemTime,
}

/// The models in `tuned_dir`: those that are not whole, then the others, and of either those first
/// that were not used longest.
fn held(tuned_dir: &Path) -> io::Result<Vec<Held>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(tuned_dir)? {
        let entry = entry?;
        let path = entry.path();
        if path.extension() != Some(OsStr::new(LOCK_EXTENSION)) {
            continue;
        }
        // One that another process has just let go of is of no interest.
        let Ok(used) = entry.metadata().and_then(|lock| lock.modified()) else { continue };
        let dir = path.with_extension("");
        let on_disk = size(&dir)? + size(&incoming(&dir))?;
        let bytes = on_disk.max(noted(&path));
        all.push(Held { is_partial: !dir.exists(), dir, bytes, used });
    }
    all.sort_by_key(|held| (!held.is_partial, held.used));
    Ok(all)
}

/// Bytes of the files that lie in `dir`, which need not be there.
fn size(dir: &Path) -> io::Result<u64> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    let mut bytes = 0;
    for entry in entries {
        bytes += entry?.metadata().map_or(0, |file| file.len());
    }
    Ok(bytes)
}
