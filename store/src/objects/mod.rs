//! Object storage: everything large.
//!
//! Every object is written once. A write of the same content again, after a broken connection say,
//! succeeds; other content under the same key is refused.

mod key;
mod remote;

pub use key::{ObjectKey, ObjectPrefix};

use crate::StoreError;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use object_store::buffered::BufWriter;
use object_store::local::LocalFileSystem;
use object_store::signer::{Method, Signer};
use object_store::{GetResult, GetResultPayload, ObjectStore, ObjectStoreExt as _};
use sha2::{Digest as _, Sha256};
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use url::Url;

/// Bytes of an upload that are in memory at one time: one part that fills, and one under way.
const PART_BYTES: usize = 8 << 20;
/// Bytes read from a local file at a time.
const READ_BYTES: usize = 1 << 20;
/// Bytes read from a local object at a time: what a client is sent soon.
const STREAM_BYTES: usize = 256 << 10;

/// The object storage. Cheap to clone.
#[derive(Clone)]
pub struct Objects {
    store: Arc<dyn ObjectStore>,
    /// Of a store that signs addresses: what signs, and where the objects lie in it.
    signer: Option<(Arc<dyn Signer>, object_store::path::Path)>,
}

impl fmt::Debug for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Objects({})", self.store)
    }
}

/// What was stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Its size.
    pub bytes: u64,
    /// The SHA-256 of its content, in lower-case hexadecimal digits.
    pub sha256: String,
}

/// An object being read.
pub struct ObjectRead {
    /// The size of the whole object.
    pub bytes: u64,
    /// The content, or the part of it that was asked for, in pieces.
    pub stream: BoxStream<'static, Result<Bytes, StoreError>>,
}

impl From<GetResult> for ObjectRead {
    fn from(result: GetResult) -> Self {
        let bytes = result.meta.size;
        let stream = match result.payload {
            // object_store's own stream goes to another thread for every 8 KiB.
            GetResultPayload::File(file, path) => read_part(file, path, result.range).boxed(),
            GetResultPayload::Stream(stream) => stream.map_err(StoreError::from).boxed(),
        };
        Self { bytes, stream }
    }
}

impl Objects {
    /// Opens the store at `url`: `file:///…` (the directory is made if it is missing), `s3://…`,
    /// `gs://…`, `az://…` or `memory:///`. The cloud stores take their credentials from the
    /// environment variables that their own tools use, such as `AWS_ACCESS_KEY_ID`.
    ///
    /// # Errors
    /// A URL of another form, or a directory that cannot be made.
    pub fn open(url: &str) -> Result<Self, StoreError> {
        let wrong = |reason: String| StoreError::ObjectStoreUrl { url: url.to_owned(), reason };
        let parsed = Url::parse(url).map_err(|error| wrong(error.to_string()))?;
        match parsed.scheme() {
            "file" => {
                let directory = parsed
                    .to_file_path()
                    .map_err(|()| wrong("it must name an absolute path: file:///…".to_owned()))?;
                std::fs::create_dir_all(&directory).map_err(StoreError::local_file(&directory))?;
                let store = LocalFileSystem::new_with_prefix(&directory)?.with_fsync(true);
                Ok(Self { store: Arc::new(store), signer: None })
            }
            "memory" | "s3" | "gs" | "az" => {
                // The cloud clients' TLS asks for the process's choice of cryptography. One that
                // was made before stands.
                let _ = rustls::crypto::ring::default_provider().install_default();
                // The clients read their settings in lower case.
                let settings = std::env::vars_os().filter_map(|(name, value)| {
                    Some((name.into_string().ok()?.to_ascii_lowercase(), value.into_string().ok()?))
                });
                Ok(remote::open(&parsed, settings)?)
            }
            other => Err(wrong(format!(
                "{other}: is unknown; use file:///…, s3://…, gs://…, az://… or memory:///"
            ))),
        }
    }

    /// An address at which anybody may read the object for as long, without this program; `None`
    /// where the store signs none, as a directory does not. Whether the object is there is not
    /// looked at.
    ///
    /// # Errors
    /// Credentials that cannot be had, or that cannot sign.
    pub async fn signed_url(
        &self,
        key: &ObjectKey,
        expires_in: Duration,
    ) -> Result<Option<Url>, StoreError> {
        let Some((signer, prefix)) = &self.signer else { return Ok(None) };
        let path = prefix.parts().chain(key.path().parts()).collect();
        Ok(Some(signer.signed_url(Method::GET, &path, expires_in).await?))
    }

    /// Stores what `stream` brings, at most `cap` bytes, in flat memory.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`] past the cap, [`StoreError::BrokenStream`] with the stream's own
    /// error, [`StoreError::ObjectExists`]. Nothing is kept of what is refused.
    pub async fn put_stream<S, E>(
        &self,
        key: &ObjectKey,
        stream: S,
        cap: u64,
    ) -> Result<Stored, StoreError>
    where
        S: Stream<Item = Result<Bytes, E>>,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        if self.exists(key).await? {
            return Err(StoreError::ObjectExists(key.to_string()));
        }
        let mut stream = std::pin::pin!(stream);
        let mut upload = Upload::begin(&self.store, key);
        let mut hash = Hash::default();
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(|error| StoreError::BrokenStream(error.into()))?;
            hash.update(&piece);
            if hash.bytes > cap {
                return Err(StoreError::TooLarge { cap });
            }
            upload.put(piece).await?;
        }
        upload.finish().await?;
        Ok(hash.stored())
    }

    /// Stores a local file.
    ///
    /// # Errors
    /// A file that cannot be read, or [`StoreError::ObjectExists`].
    pub async fn put_file(&self, key: &ObjectKey, path: &Path) -> Result<Stored, StoreError> {
        if self.exists(key).await? {
            let ours = read_file(path).try_fold(Hash::default(), Hash::with).await?;
            return self.same_content(key, ours.stored()).await;
        }
        self.put_stream(key, read_file(path), u64::MAX).await
    }

    /// Stores a few bytes.
    ///
    /// # Errors
    /// [`StoreError::ObjectExists`], or what the object store says.
    pub async fn put_bytes(&self, key: &ObjectKey, content: Bytes) -> Result<Stored, StoreError> {
        if self.exists(key).await? {
            let mut ours = Hash::default();
            ours.update(&content);
            return self.same_content(key, ours.stored()).await;
        }
        let stream = futures::stream::iter([Ok::<_, StoreError>(content)]);
        self.put_stream(key, stream, u64::MAX).await
    }

    /// Reads the object.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or what the object store says.
    pub async fn get(&self, key: &ObjectKey) -> Result<ObjectRead, StoreError> {
        let result = self.store.get(&key.path()).await.map_err(missing(key))?;
        Ok(result.into())
    }

    /// Reads the bytes of `range`, whose end may not lie past the object's.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or what the object store says.
    pub async fn get_range(
        &self,
        key: &ObjectKey,
        range: Range<u64>,
    ) -> Result<ObjectRead, StoreError> {
        let options = object_store::GetOptions::new().with_range(Some(range));
        let result = self.store.get_opts(&key.path(), options).await.map_err(missing(key))?;
        Ok(result.into())
    }

    /// The whole of an object that is known to be small.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or what the object store says.
    pub async fn read(&self, key: &ObjectKey) -> Result<Bytes, StoreError> {
        Ok(self.store.get(&key.path()).await.map_err(missing(key))?.bytes().await?)
    }

    /// Copies the object into the local file `path`, which is made or replaced, and says what came.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], what the object store says, or a file that cannot be written.
    pub async fn download(&self, key: &ObjectKey, path: &Path) -> Result<Stored, StoreError> {
        let mut stream = self.get(key).await?.stream;
        let failed = || StoreError::local_file(path);
        let mut file = tokio::fs::File::create(path).await.map_err(failed())?;
        let mut hash = Hash::default();
        while let Some(piece) = stream.try_next().await? {
            hash.update(&piece);
            file.write_all(&piece).await.map_err(failed())?;
        }
        file.flush().await.map_err(failed())?;
        Ok(hash.stored())
    }

    /// The objects of a set: each one's name and size, in the order of their names.
    ///
    /// # Errors
    /// What the object store says.
    pub async fn list(&self, prefix: &ObjectPrefix) -> Result<Vec<(String, u64)>, StoreError> {
        let base = prefix.path();
        let mut found: Vec<(String, u64)> =
            self.store
                .list(Some(&base))
                .try_filter_map(|meta| {
                    let name = meta.location.prefix_match(&base).map(|parts| {
                        parts.collect::<object_store::path::Path>().as_ref().to_owned()
                    });
                    std::future::ready(Ok(name.map(|name| (name, meta.size))))
                })
                .try_collect()
                .await?;
        found.sort();
        Ok(found)
    }

    /// Removes an object; one that is not there is no error.
    ///
    /// # Errors
    /// What the object store says.
    pub async fn delete(&self, key: &ObjectKey) -> Result<(), StoreError> {
        match self.store.delete(&key.path()).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes every object of a set.
    ///
    /// # Errors
    /// What the object store says; some may be gone by then.
    pub async fn delete_prefix(&self, prefix: &ObjectPrefix) -> Result<(), StoreError> {
        for (name, _) in self.list(prefix).await? {
            self.delete(&prefix.file(name)).await?;
        }
        Ok(())
    }

    async fn exists(&self, key: &ObjectKey) -> Result<bool, StoreError> {
        match self.store.head(&key.path()).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    async fn same_content(&self, key: &ObjectKey, ours: Stored) -> Result<Stored, StoreError> {
        let theirs =
            self.get(key).await?.stream.try_fold(Hash::default(), Hash::with).await?.stored();
        if theirs == ours { Ok(ours) } else { Err(StoreError::ObjectExists(key.to_string())) }
    }
}

fn missing(key: &ObjectKey) -> impl FnOnce(object_store::Error) -> StoreError + '_ {
    move |error| match error {
        object_store::Error::NotFound { .. } => StoreError::not_found("object", key),
        other => other.into(),
    }
}

/// The content of a local file, in pieces.
fn read_file(path: &Path) -> impl Stream<Item = Result<Bytes, StoreError>> + '_ {
    use tokio::io::AsyncReadExt as _;
    futures::stream::try_unfold(None, move |file| async move {
        let mut file = match file {
            Some(file) => file,
            None => tokio::fs::File::open(path).await.map_err(StoreError::local_file(path))?,
        };
        let mut piece = bytes::BytesMut::with_capacity(READ_BYTES);
        let read = file.read_buf(&mut piece).await.map_err(StoreError::local_file(path))?;
        Ok((read > 0).then(|| (piece.freeze(), Some(file))))
    })
}

/// The bytes of `range` of an open file, in pieces.
fn read_part(
    file: File,
    path: PathBuf,
    range: Range<u64>,
) -> impl Stream<Item = Result<Bytes, StoreError>> {
    futures::stream::try_unfold((file, range.start), move |(file, from)| {
        let (path, end) = (path.clone(), range.end);
        async move {
            if from >= end {
                return Ok(None);
            }
            let bytes = usize::try_from(end - from).unwrap_or(usize::MAX).min(STREAM_BYTES);
            let reading = tokio::task::spawn_blocking(move || {
                let mut piece = vec![0; bytes];
                file.read_exact_at(&mut piece, from).map(|()| (piece, file))
            });
            let read = reading.await.map_err(std::io::Error::other).flatten();
            let (piece, file) = read.map_err(StoreError::local_file(&path))?;
            Ok(Some((Bytes::from(piece), (file, from + bytes as u64))))
        }
    })
}

/// Size and hash of what has gone by.
#[derive(Default)]
struct Hash {
    bytes: u64,
    sha256: Sha256,
}

impl Hash {
    fn update(&mut self, piece: &Bytes) {
        self.bytes += piece.len() as u64;
        self.sha256.update(piece);
    }

    async fn with(mut self, piece: Bytes) -> Result<Self, StoreError> {
        self.update(&piece);
        Ok(self)
    }

    fn stored(self) -> Stored {
        Stored { bytes: self.bytes, sha256: hex::encode(self.sha256.finalize()) }
    }
}

/// A write that leaves nothing behind unless it is finished, also when its future is dropped.
struct Upload {
    writer: Option<BufWriter>,
}

impl Upload {
    fn begin(store: &Arc<dyn ObjectStore>, key: &ObjectKey) -> Self {
        let writer = BufWriter::with_capacity(Arc::clone(store), key.path(), PART_BYTES)
            .with_max_concurrency(1);
        Self { writer: Some(writer) }
    }

    async fn put(&mut self, piece: Bytes) -> Result<(), StoreError> {
        if let Some(writer) = &mut self.writer {
            writer.put(piece).await?;
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<(), StoreError> {
        // A writer that is shut down half-way cleans up after itself or is past the point where
        // anything could be undone, so it leaves the guard first.
        if let Some(mut writer) = self.writer.take() {
            writer.shutdown().await.map_err(|error| match error.downcast() {
                Ok(error) => StoreError::Objects(error),
                Err(error) => StoreError::BrokenStream(error.into()),
            })?;
        }
        Ok(())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let Some(mut writer) = self.writer.take() else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn(async move {
            if let Err(error) = writer.abort().await {
                tracing::warn!(%error, "parts of a broken upload may remain in the object store");
            }
        });
    }
}

#[cfg(test)]
mod tests;
