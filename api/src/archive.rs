//! A tar archive that is written while it is sent: no temporary file, flat memory, and a size
//! that is known before the first byte.

use crate::streaming::{Content, ContentError};
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use sha2::{Digest as _, Sha256};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tunesmith_core::export_check::ExportManifest;
use tunesmith_core::weights::{MANIFEST_NAME, ManifestFile};

const BLOCK: u64 = 512;

/// A file of an archive.
pub(crate) struct Entry {
    /// Its path in the archive.
    pub(crate) name: String,
    /// Its size.
    pub(crate) bytes: u64,
    /// The SHA-256 that it must have, where one is noted.
    pub(crate) sha256: Option<String>,
    /// Opens the content when its turn comes.
    pub(crate) open: BoxFuture<'static, Result<Content, ContentError>>,
}

/// An archive ready to be sent.
pub(crate) struct Archive {
    /// Its size.
    pub(crate) bytes: u64,
    /// Its bytes.
    pub(crate) content: Content,
    /// The files that have gone by so far.
    pub(crate) sums: Sums,
}

/// Files with their sums, in their order.
pub(crate) type Sums = Arc<Mutex<Vec<ManifestFile>>>;

/// Puts `entries` into an archive, all with the time `modified` (seconds since 1970), and a
/// manifest behind them: `about`, with the SHA-256 of each.
///
/// # Errors
/// A name that tar cannot hold.
pub(crate) fn archive(
    entries: Vec<Entry>,
    modified: u64,
    about: ExportManifest,
) -> io::Result<Archive> {
    let sums = Arc::new(Mutex::new(Vec::with_capacity(entries.len())));
    // Every sum has the same length, so the manifest's size is known before its content.
    let files = entries.iter().map(|entry| ManifestFile {
        name: entry.name.clone(),
        bytes: entry.bytes,
        sha256: "0".repeat(64),
    });
    let manifest_bytes = manifest_json(files.collect(), &about)?.len() as u64;
    let manifest_header = header(MANIFEST_NAME, manifest_bytes, modified)?;

    let mut bytes = 2 * BLOCK + BLOCK + manifest_bytes + padding(manifest_bytes);
    let mut files = Vec::with_capacity(entries.len());
    for entry in entries {
        bytes += BLOCK + entry.bytes + padding(entry.bytes);
        files.push((header(&entry.name, entry.bytes, modified)?, entry));
    }
    let sums_of_files = Arc::clone(&sums);
    let content = stream::iter(files)
        .map(move |(header, entry)| file(header, entry, Arc::clone(&sums_of_files)))
        .flatten()
        .chain(manifest(manifest_header, Arc::clone(&sums), about))
        .chain(piece(zeros(2 * BLOCK)));
    Ok(Archive { bytes, content: content.boxed(), sums })
}

fn header(name: &str, bytes: u64, modified: u64) -> io::Result<Bytes> {
    let mut header = tar::Header::new_gnu();
    header.set_path(name)?;
    header.set_size(bytes);
    header.set_mode(0o644);
    header.set_mtime(modified);
    header.set_cksum();
    Ok(Bytes::copy_from_slice(header.as_bytes()))
}

fn file(header: Bytes, entry: Entry, sums: Sums) -> Content {
    let Entry { name, bytes, sha256, open } = entry;
    let checked = async move {
        let content = open.await?;
        let file = Checked { content, name, bytes, sha256, sums, found: 0, hash: Sha256::new() };
        Ok::<_, ContentError>(stream::try_unfold(file, Checked::next))
    };
    piece(header)
        .chain(stream::once(checked).try_flatten())
        .chain(piece(zeros(padding(bytes))))
        .boxed()
}

/// Content on its way, with its size and hash so far.
struct Checked {
    content: Content,
    name: String,
    bytes: u64,
    sha256: Option<String>,
    sums: Sums,
    found: u64,
    hash: Sha256,
}

impl Checked {
    async fn next(mut self) -> Result<Option<(Bytes, Self)>, ContentError> {
        let Some(piece) = self.content.try_next().await? else {
            self.finish()?;
            return Ok(None);
        };
        self.found += piece.len() as u64;
        self.hash.update(&piece);
        Ok(Some((piece, self)))
    }

    fn finish(self) -> Result<(), ContentError> {
        let Self { name, bytes, sha256, sums, found, hash, .. } = self;
        if found != bytes {
            return Err(ContentError::Size { name, expected: bytes, found });
        }
        let found = hex::encode(hash.finalize());
        if let Some(expected) = sha256
            && expected != found
        {
            return Err(ContentError::Hash { name, expected, found });
        }
        lock(&sums).push(ManifestFile { name, bytes, sha256: found });
        Ok(())
    }
}

/// A list is whole whatever its holder panicked of.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The manifest, made when everything before it has gone by.
fn manifest(header: Bytes, sums: Sums, about: ExportManifest) -> Content {
    let content = async move {
        let files = lock(&sums).clone();
        let json = manifest_json(files, &about).map_err(|error| ContentError::Merge {
            name: MANIFEST_NAME.to_owned(),
            reason: error.to_string(),
        })?;
        let padding = zeros(padding(json.len() as u64));
        Ok::<_, ContentError>(stream::iter([Ok(Bytes::from(json)), Ok(padding)]))
    };
    piece(header).chain(stream::once(content).try_flatten()).boxed()
}

fn manifest_json(files: Vec<ManifestFile>, about: &ExportManifest) -> io::Result<Vec<u8>> {
    Ok(serde_json::to_vec_pretty(&ExportManifest { files, ..about.clone() })?)
}

fn piece(bytes: Bytes) -> Content {
    stream::once(std::future::ready(Ok(bytes))).boxed()
}

/// Bytes from the end of a file of `bytes` bytes to the next block.
fn padding(bytes: u64) -> u64 {
    bytes.next_multiple_of(BLOCK) - bytes
}

/// At most two blocks of zeros.
fn zeros(count: u64) -> Bytes {
    static ZEROS: [u8; 2 * BLOCK as usize] = [0; 2 * BLOCK as usize];
    Bytes::from_static(&ZEROS[..count as usize])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use tunesmith_core::export_check::ExportCheck;

    fn entry(name: &str, pieces: &[&'static [u8]]) -> Entry {
        let pieces: Vec<_> = pieces.iter().map(|piece| Ok(Bytes::from_static(piece))).collect();
        Entry {
            name: name.to_owned(),
            bytes: pieces.iter().flatten().map(|piece: &Bytes| piece.len() as u64).sum(),
            sha256: None,
            open: Box::pin(async move { Ok(stream::iter(pieces).boxed()) }),
        }
    }

    async fn collected(archive: Archive) -> Result<Vec<u8>, ContentError> {
        archive
            .content
            .try_fold(Vec::new(), async |mut all, piece| {
                all.extend_from_slice(&piece);
                Ok(all)
            })
            .await
    }

    fn about() -> ExportManifest {
        ExportManifest {
            files: Vec::new(),
            base_model: Some("tiny".to_owned()),
            check: ExportCheck::not_made("No sampler runs."),
        }
    }

    #[tokio::test]
    async fn tar_reads_back_every_file_and_the_size_was_told_before() {
        static BLOCK_LONG: [u8; 512] = [7; 512];
        let entries = vec![
            entry("adapter_config.json", &[b"{", b"}"]),
            entry("empty", &[]),
            entry("sub/block", &[&BLOCK_LONG]),
        ];
        let archive = archive(entries, 1_700_000_000, about()).expect("archive");
        let told = archive.bytes;
        let bytes = collected(archive).await.expect("content");
        assert_eq!(bytes.len() as u64, told);

        let mut found = Vec::new();
        for file in tar::Archive::new(bytes.as_slice()).entries().expect("entries") {
            let mut file = file.expect("entry");
            let mut content = Vec::new();
            file.read_to_end(&mut content).expect("content");
            assert_eq!(file.header().mtime().expect("mtime"), 1_700_000_000);
            found.push((file.path().expect("path").display().to_string(), content));
        }
        let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["adapter_config.json", "empty", "sub/block", MANIFEST_NAME]);
        assert_eq!(found[0].1, b"{}");
        let manifest: ExportManifest = serde_json::from_slice(&found[3].1).expect("manifest");
        for (file, (name, content)) in manifest.files.iter().zip(&found) {
            assert_eq!(&file.name, name);
            assert_eq!(file.bytes, content.len() as u64);
            assert_eq!(file.sha256, hex::encode(Sha256::digest(content)));
        }
        assert_eq!(manifest.files.len(), 3);
        assert_eq!(ExportManifest { files: Vec::new(), ..manifest }, about());
    }

    #[tokio::test]
    async fn content_that_is_not_what_was_noted_breaks_off() {
        let mut wrong = entry("a", &[b"abc"]);
        wrong.sha256 = Some("0".repeat(64));
        let broken = archive(vec![wrong], 0, about()).expect("archive");
        let error = collected(broken).await.expect_err("hash");
        assert!(matches!(error, ContentError::Hash { .. }), "{error}");

        let mut short = entry("a", &[b"abc"]);
        short.bytes = 4;
        let broken = archive(vec![short], 0, about()).expect("archive");
        let error = collected(broken).await.expect_err("size");
        assert!(matches!(error, ContentError::Size { expected: 4, found: 3, .. }), "{error}");
    }
}
