//! Stored weights as files of an archive.

use crate::archive::Entry;
use crate::failure::Failure;
use crate::streaming::ContentError;
use futures::{StreamExt as _, TryStreamExt as _};
use tunesmith_core::weights::{MANIFEST_NAME, Manifest};
use tunesmith_store::Store;
use tunesmith_store::models::Model;
use tunesmith_store::objects::{ObjectPrefix, Objects};

/// The files of an adapter or of a model that was trained in full, as they are, checked against
/// their sums on the way.
pub(crate) async fn entries(store: &Store, model: &Model) -> Result<Vec<Entry>, Failure> {
    let prefix = model.weights();
    let manifest = manifest(store.objects(), &prefix).await?;
    Ok(manifest
        .files
        .into_iter()
        .map(|file| {
            let sha256 = Some(file.sha256);
            entry(store.objects(), &prefix, file.name, file.bytes, sha256)
        })
        .collect())
}

/// The manifest of a set of objects.
pub(crate) async fn manifest(
    objects: &Objects,
    prefix: &ObjectPrefix,
) -> Result<Manifest, Failure> {
    let content = objects.read(&prefix.file(MANIFEST_NAME)).await?;
    serde_json::from_slice(&content).map_err(Failure::internal)
}

/// A stored object as a file of an archive.
pub(crate) fn entry(
    objects: &Objects,
    prefix: &ObjectPrefix,
    name: String,
    bytes: u64,
    sha256: Option<String>,
) -> Entry {
    let (objects, key) = (objects.clone(), prefix.file(name.as_str()));
    let open = async move {
        let content = objects.get(&key).await?.stream;
        Ok(content.map_err(ContentError::from).boxed())
    };
    Entry { name, bytes, sha256, open: Box::pin(open) }
}
