//! Safetensors files of the object store, whose headers are read and whose tensors are read when they
//! are asked for.

use crate::failure::Failure;
use crate::streaming::ContentError;
use bytes::Bytes;
use futures::TryStreamExt as _;
use futures::stream::BoxStream;
use safetensors::tensor::{Metadata, TensorInfo};
use std::collections::HashMap;
use std::ops::Range;
use tunesmith_core::weights::{FloatType, Manifest, PeftError};
use tunesmith_store::StoreError;
use tunesmith_store::objects::{ObjectKey, ObjectPrefix, Objects};

const SAFETENSORS: &str = ".safetensors";
/// Bytes of the header's length, at the start of a safetensors file.
const LENGTH_BYTES: u64 = 8;
/// safetensors' own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Why stored weights cannot be used.
#[derive(Debug)]
pub(crate) enum Unusable {
    /// They are not what they should be: a fault of ours, unless they are a client's.
    Broken(String),
    /// They cannot be read.
    Unread(Failure),
}

impl From<StoreError> for Unusable {
    fn from(error: StoreError) -> Self {
        Self::Unread(error.into())
    }
}

impl From<Failure> for Unusable {
    fn from(failure: Failure) -> Self {
        Self::Unread(failure)
    }
}

impl From<PeftError> for Unusable {
    fn from(error: PeftError) -> Self {
        Self::Broken(error.to_string())
    }
}

impl From<Unusable> for Failure {
    fn from(unusable: Unusable) -> Self {
        match unusable {
            Unusable::Broken(reason) => Self::internal(reason),
            Unusable::Unread(failure) => failure,
        }
    }
}

/// A safetensors file whose header is read.
pub(crate) struct TensorFile {
    objects: Objects,
    key: ObjectKey,
    /// Where the tensors' data begins.
    data: u64,
    /// The tensors by name.
    pub(crate) tensors: HashMap<String, TensorInfo>,
}

/// Whether one of `files` has the tensor `name`.
pub(crate) fn has_tensor(files: &[TensorFile], name: &str) -> bool {
    files.iter().any(|file| file.tensors.contains_key(name))
}

impl TensorFile {
    /// Those of a set of objects.
    pub(crate) async fn all(
        objects: &Objects,
        directory: &ObjectPrefix,
        manifest: &Manifest,
    ) -> Result<Vec<Self>, Unusable> {
        let mut files = Vec::new();
        for file in manifest.files.iter().filter(|file| file.name.ends_with(SAFETENSORS)) {
            files.push(Self::open(objects, directory.file(&*file.name), file.bytes).await?);
        }
        Ok(files)
    }

    pub(crate) async fn open(
        objects: &Objects,
        key: ObjectKey,
        bytes: u64,
    ) -> Result<Self, Unusable> {
        let wrong = |reason: String| Unusable::Broken(format!("{key}: {reason}"));
        let length = read(objects, &key, 0..LENGTH_BYTES.min(bytes)).await?;
        let length = <[u8; LENGTH_BYTES as usize]>::try_from(length.as_ref())
            .map(u64::from_le_bytes)
            .map_err(|_| wrong("it is too short for a safetensors file".to_owned()))?;
        let data = LENGTH_BYTES + length.min(MAX_HEADER_BYTES);
        if data > bytes {
            return Err(wrong(format!("its header of {length} bytes passes its end")));
        }
        // Not `SafeTensors::read_metadata`, which wants the tensors' bytes behind the header.
        let header = read(objects, &key, LENGTH_BYTES..data).await?;
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|error| wrong(error.to_string()))?;
        let tensors = metadata.tensors().into_iter().map(|(k, v)| (k, v.clone())).collect();
        Ok(Self { objects: objects.clone(), key, data, tensors })
    }

    /// Where a tensor's bytes lie in the file.
    pub(crate) fn place(&self, tensor: &TensorInfo) -> Range<u64> {
        let (start, end) = tensor.data_offsets;
        self.data + start as u64..self.data + end as u64
    }

    /// A part of the file.
    pub(crate) async fn part(
        &self,
        range: Range<u64>,
    ) -> Result<BoxStream<'static, Result<Bytes, StoreError>>, StoreError> {
        Ok(self.objects.get_range(&self.key, range).await?.stream)
    }

    pub(crate) async fn numbers_of(&self, name: &str) -> Result<Vec<f32>, ContentError> {
        let (tensor, float) = self.floats(name)?;
        Ok(float.decode(&read(&self.objects, &self.key, self.place(tensor)).await?))
    }

    /// The numbers of some rows; those of a vector are its values.
    pub(crate) async fn rows_of(
        &self,
        name: &str,
        rows: Range<usize>,
    ) -> Result<Vec<f32>, ContentError> {
        let (tensor, float) = self.floats(name)?;
        let row = (tensor.shape.iter().skip(1).product::<usize>() * float.size()) as u64;
        let start = self.place(tensor).start;
        let place = start + rows.start as u64 * row..start + rows.end as u64 * row;
        Ok(float.decode(&read(&self.objects, &self.key, place).await?))
    }

    fn floats(&self, name: &str) -> Result<(&TensorInfo, FloatType), ContentError> {
        let wrong =
            |reason: &str| ContentError::Merge { name: name.to_owned(), reason: reason.to_owned() };
        let tensor = self.tensors.get(name).ok_or_else(|| wrong("it is not in its file"))?;
        let float = float_type(tensor).ok_or_else(|| wrong("it does not hold floats"))?;
        Ok((tensor, float))
    }
}

/// How a tensor's numbers are stored; `None` where they are no floats.
pub(crate) fn float_type(tensor: &TensorInfo) -> Option<FloatType> {
    FloatType::parse(&tensor.dtype.to_string())
}

async fn read(objects: &Objects, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, StoreError> {
    let mut content = Vec::with_capacity((range.end - range.start) as usize);
    let mut stream = objects.get_range(key, range).await?.stream;
    while let Some(piece) = stream.try_next().await? {
        content.extend_from_slice(&piece);
    }
    Ok(content.into())
}
