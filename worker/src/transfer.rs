//! Whole directories to and from the object store, each under a manifest.

use crate::retry::retry;
use bytes::Bytes;
use std::io;
use std::path::{Path, PathBuf};
use tunesmith_core::weights::{MANIFEST_NAME, Manifest, ManifestFile};
use tunesmith_store::StoreError;
use tunesmith_store::objects::{ObjectPrefix, Objects};

/// Why a directory did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The store or the local disk failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The local disk failed.
    #[error("{path}: {source}")]
    Disk {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An object is not what its manifest says.
    #[error(
        "the object {name} has {got_bytes} bytes with sha256 {got_sha256}, but its manifest says \
         {bytes} bytes with sha256 {sha256}: it is damaged in the object store"
    )]
    Damaged {
        /// The object.
        name: String,
        /// As the manifest has it.
        bytes: u64,
        /// As the manifest has it.
        sha256: String,
        /// As it came.
        got_bytes: u64,
        /// As it came.
        got_sha256: String,
    },
    /// A manifest that names something else than files of one directory.
    #[error("the manifest names the file {0:?}, which is not a plain file name")]
    BadName(String),
    /// A manifest that is not one.
    #[error("the manifest {name} cannot be read: {source}")]
    BadManifest {
        /// The object.
        name: String,
        /// Why.
        source: serde_json::Error,
    },
}

impl TransferError {
    pub(crate) fn disk(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Disk { path: path.to_owned(), source }
    }
}

/// Stores the files that lie directly in `dir` under `prefix`, their manifest last: a set that has
/// one is complete.
pub(crate) async fn upload_dir(
    objects: &Objects,
    prefix: &ObjectPrefix,
    dir: &Path,
) -> Result<Manifest, TransferError> {
    let mut manifest = Manifest::default();
    for name in file_names(dir).await? {
        let (key, path) = (prefix.file(&*name), dir.join(&name));
        let stored = retry("upload of a checkpoint", || objects.put_file(&key, &path)).await?;
        manifest.files.push(ManifestFile { name, bytes: stored.bytes, sha256: stored.sha256 });
    }
    let content = Bytes::from(serde_json::to_vec_pretty(&manifest).map_err(StoreError::from)?);
    let key = prefix.file(MANIFEST_NAME);
    retry("upload of a manifest", || objects.put_bytes(&key, content.clone())).await?;
    Ok(manifest)
}

/// Copies the files of a set that has a manifest into `dir`, which is there.
///
/// # Errors
/// What the store or the disk says, or that the set is damaged.
pub async fn fetch_dir(
    objects: &Objects,
    prefix: &ObjectPrefix,
    dir: &Path,
) -> Result<(), TransferError> {
    let manifest = read_manifest(objects, prefix).await?;
    download_dir(objects, prefix, &manifest, dir).await
}

/// The manifest of a set that a worker stored.
///
/// # Errors
/// What the store says, or that it is none.
async fn read_manifest(
    objects: &Objects,
    prefix: &ObjectPrefix,
) -> Result<Manifest, TransferError> {
    let key = prefix.file(MANIFEST_NAME);
    let content = retry("download of a manifest", || objects.read(&key)).await?;
    serde_json::from_slice(&content)
        .map_err(|source| TransferError::BadManifest { name: key.to_string(), source })
}

/// Copies the files of `manifest` into `dir`, which is there, and checks each one's size and sum.
///
/// # Errors
/// What the store or the disk says, or that a file is damaged or has a name that is none.
pub(crate) async fn download_dir(
    objects: &Objects,
    prefix: &ObjectPrefix,
    manifest: &Manifest,
    dir: &Path,
) -> Result<(), TransferError> {
    for file in &manifest.files {
        if Path::new(&file.name).file_name() != Some(file.name.as_ref()) {
            return Err(TransferError::BadName(file.name.clone()));
        }
        let (key, path) = (prefix.file(&*file.name), dir.join(&file.name));
        let got = retry("download of weights", || objects.download(&key, &path)).await?;
        if (got.bytes, &got.sha256) != (file.bytes, &file.sha256) {
            return Err(TransferError::Damaged {
                name: key.to_string(),
                bytes: file.bytes,
                sha256: file.sha256.clone(),
                got_bytes: got.bytes,
                got_sha256: got.sha256,
            });
        }
    }
    Ok(())
}

/// The names of the files directly in `dir`, sorted, but for an older manifest.
async fn file_names(dir: &Path) -> Result<Vec<String>, TransferError> {
    let failed = || TransferError::disk(dir);
    let mut entries = tokio::fs::read_dir(dir).await.map_err(failed())?;
    let mut names = Vec::new();
    while let Some(entry) = entries.next_entry().await.map_err(failed())? {
        let name = entry
            .file_name()
            .into_string()
            .map_err(|name| TransferError::BadName(name.to_string_lossy().into_owned()))?;
        if entry.file_type().await.map_err(failed())?.is_file() && name != MANIFEST_NAME {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tunesmith_core::weights::CheckpointPlace;

    fn prefix() -> ObjectPrefix {
        ObjectPrefix::CheckpointWeights(CheckpointPlace {
            job: "ftjob-1".into(),
            attempt: 1,
            step: 2,
        })
    }

    fn objects() -> Objects {
        Objects::open("memory:///").expect("memory store")
    }

    #[tokio::test]
    async fn a_directory_comes_back_as_it_was() {
        let (objects, from, to) =
            (objects(), tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
        std::fs::write(from.path().join("a"), "first").expect("write");
        std::fs::write(from.path().join("b"), "second").expect("write");
        let uploaded = upload_dir(&objects, &prefix(), from.path()).await.expect("upload");
        let manifest = read_manifest(&objects, &prefix()).await.expect("manifest");
        assert_eq!(manifest, uploaded);
        assert_eq!(manifest, Manifest::of_dir(from.path()).expect("measure"));
        download_dir(&objects, &prefix(), &manifest, to.path()).await.expect("download");
        assert_eq!(Manifest::of_dir(to.path()).expect("measure"), manifest);
    }

    #[tokio::test]
    async fn an_upload_that_was_cut_off_can_be_done_again() {
        let (objects, from) = (objects(), tempfile::tempdir().expect("dir"));
        std::fs::write(from.path().join("a"), "first").expect("write");
        objects
            .put_bytes(&prefix().file("a"), Bytes::from_static(b"first"))
            .await
            .expect("half an upload");
        upload_dir(&objects, &prefix(), from.path()).await.expect("upload");
        upload_dir(&objects, &prefix(), from.path()).await.expect("upload again");
    }

    #[tokio::test]
    async fn an_object_that_differs_from_its_manifest_is_damaged() {
        let (objects, dir) = (objects(), tempfile::tempdir().expect("dir"));
        objects.put_bytes(&prefix().file("a"), Bytes::from_static(b"x")).await.expect("put");
        let file = ManifestFile::measure("a", b"y".as_slice()).expect("measure");
        let manifest = Manifest { files: vec![file] };
        let error = download_dir(&objects, &prefix(), &manifest, dir.path()).await;
        assert!(matches!(error, Err(TransferError::Damaged { .. })), "{error:?}");
    }

    #[tokio::test]
    async fn a_manifest_cannot_name_a_file_outside_its_directory() {
        let (objects, dir) = (objects(), tempfile::tempdir().expect("dir"));
        for name in ["../a", "/etc/a", "a/b", "..", ""] {
            let file = ManifestFile::measure(name, b"x".as_slice()).expect("measure");
            let manifest = Manifest { files: vec![file] };
            let error = download_dir(&objects, &prefix(), &manifest, dir.path()).await;
            assert!(matches!(error, Err(TransferError::BadName(_))), "{name}: {error:?}");
        }
    }
}
