//! The worker's own directory: one to a process, swept after a process that was killed.
//!
//! `WORK_DIR/{worker_id}/` is in use exactly while its process holds the lock on
//! `WORK_DIR/{worker_id}.lock`. The system lets go of a lock when its process dies, however it
//! dies, so a directory whose lock can be had is litter.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const LOCK_SUFFIX: &str = ".lock";
/// Held while locks are made or swept, so that no sweep comes between a lock's making and taking.
const SWEEP_LOCK: &str = "sweep";

/// A process's directory. Dropping it removes it.
#[derive(Debug)]
pub struct WorkDir {
    path: PathBuf,
    lock_path: PathBuf,
    /// Holds the lock while it is open.
    _lock: File,
}

impl WorkDir {
    /// Makes the directory of the process that is called `worker`, after removing those of dead
    /// ones.
    ///
    /// # Errors
    /// What the disk says.
    pub fn create(root: &Path, worker: &str) -> io::Result<Self> {
        fs::create_dir_all(root)?;
        let sweeping = open_lock(&root.join(SWEEP_LOCK))?;
        sweeping.lock()?;
        sweep(root)?;
        let lock_path = root.join(format!("{worker}{LOCK_SUFFIX}"));
        let lock = open_lock(&lock_path)?;
        lock.lock()?;
        let path = root.join(worker);
        fs::create_dir_all(&path)?;
        // Trainers get paths out of here and have a working directory of their own to be in.
        let path = path.canonicalize()?;
        Ok(Self { path, lock_path, _lock: lock })
    }

    /// An empty directory for one job, removed when dropped.
    ///
    /// # Errors
    /// What the disk says.
    pub fn job_dir(&self, name: &str) -> io::Result<TempDir> {
        tempfile::Builder::new().prefix(&format!("{name}-")).tempdir_in(&self.path)
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        let removed =
            fs::remove_dir_all(&self.path).and_then(|()| fs::remove_file(&self.lock_path));
        if let Err(error) = removed {
            tracing::warn!(path = %self.path.display(), %error, "a work directory was left behind");
        }
    }
}

fn open_lock(path: &Path) -> io::Result<File> {
    File::options().create(true).write(true).truncate(false).open(path)
}

fn sweep(root: &Path) -> io::Result<()> {
    for entry in fs::read_dir(root)? {
        let lock_path = entry?.path();
        let name = lock_path.file_name().and_then(|name| name.to_str());
        let Some(worker) = name.and_then(|name| name.strip_suffix(LOCK_SUFFIX)) else { continue };
        let lock = open_lock(&lock_path)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => continue,
            Err(TryLockError::Error(error)) => return Err(error),
        }
        match fs::remove_dir_all(root.join(worker)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => fs::remove_file(&lock_path)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_of_a_dead_worker_goes_and_that_of_a_living_one_stays() {
        let root = tempfile::tempdir().expect("temp dir");
        let living = WorkDir::create(root.path(), "worker_living").expect("create");
        fs::create_dir(root.path().join("worker_dead")).expect("create");
        fs::write(root.path().join("worker_dead/checkpoint"), "bytes").expect("write");
        fs::write(root.path().join("worker_dead.lock"), "").expect("write");

        let other = WorkDir::create(root.path(), "worker_other").expect("create");
        assert!(!root.path().join("worker_dead").exists());
        assert!(!root.path().join("worker_dead.lock").exists());
        assert!(living.path.exists());

        drop((living, other));
        let left: Vec<_> = fs::read_dir(root.path()).expect("read").flatten().collect();
        assert_eq!(left.len(), 1, "only the sweep's lock is left: {left:?}");
    }

    #[test]
    fn two_directories_for_one_job_are_two() {
        let root = tempfile::tempdir().expect("temp dir");
        let work_dir = WorkDir::create(root.path(), "worker_1").expect("create");
        let first = work_dir.job_dir("ftjob-1").expect("job dir");
        let second = work_dir.job_dir("ftjob-1").expect("job dir");
        assert_ne!(first.path(), second.path());
    }
}
