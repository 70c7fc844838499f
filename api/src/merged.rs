//! A base model with a LoRA adapter merged into it, as a Hugging Face directory that is made
//! while it is sent.
//!
//! A merged file has the header, the tensors' places and the size of the base model's file, so
//! everything but the adapted tensors is copied byte by byte, and one tensor at a time is in
//! memory.

use crate::archive::Entry;
use crate::failure::Failure;
use crate::stored::{entry, manifest};
use crate::streaming::{Content, ContentError};
use bytes::Bytes;
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use safetensors::tensor::{Metadata, TensorInfo};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;
use tunesmith_core::hyperparameters::AdapterConfig;
use tunesmith_core::weights::{
    ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, FloatType, LoraFactors, LoraPair, Manifest,
    PeftConfig, PeftError, merge_lora, pair_lora_tensors,
};
use tunesmith_store::models::Model;
use tunesmith_store::objects::{ObjectKey, ObjectPrefix, Objects};
use tunesmith_store::{Store, StoreError};

const SAFETENSORS: &str = ".safetensors";
const README: &str = "README.md";
/// Bytes of the header's length, at the start of a safetensors file.
const LENGTH_BYTES: u64 = 8;
/// safetensors' own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The files of the merged model.
///
/// # Errors
/// An adapter that does not fit the base model, or files that cannot be read: all of it before
/// the first byte is sent.
pub(crate) async fn entries(store: &Store, model: &Model) -> Result<Vec<Entry>, Failure> {
    let objects = store.objects();
    let base = store.base_model_by_id(&model.base_model_id).await?;
    let base_files = ObjectPrefix::BaseModel(base.id.clone());
    let weights = model.weights();

    let mut files = Vec::new();
    for file in &base.manifest.files {
        let tensors = if file.name.ends_with(SAFETENSORS) {
            Some(TensorFile::open(objects, base_files.file(file.name.as_str()), file.bytes).await?)
        } else {
            None
        };
        files.push((file, tensors));
    }
    let adapter = Arc::new(
        Adapter::open(objects, &weights, |name| {
            files
                .iter()
                .any(|(_, tensors)| tensors.as_ref().is_some_and(|t| t.tensors.contains_key(name)))
        })
        .await?,
    );

    let mut entries = Vec::new();
    for (file, tensors) in files {
        entries.push(match tensors {
            Some(tensors) => merged_file(file.name.clone(), tensors, Arc::clone(&adapter))?,
            // The base model's own would claim that this is the base model.
            None if file.name == README => continue,
            None => {
                let sha256 = Some(file.sha256.clone());
                entry(objects, &base_files, file.name.clone(), file.bytes, sha256)
            }
        });
    }
    // The adapter's README has the facts of the job.
    let facts = manifest(objects, &weights).await?.files.into_iter().find(|f| f.name == README);
    entries.extend(
        facts.map(|file| entry(objects, &weights, file.name, file.bytes, Some(file.sha256))),
    );
    Ok(entries)
}

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
    bytes: u64,
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
        Ok(Self { objects: objects.clone(), key, bytes, data, tensors })
    }

    /// Where a tensor's bytes lie in the file.
    fn place(&self, tensor: &TensorInfo) -> Range<u64> {
        let (start, end) = tensor.data_offsets;
        self.data + start as u64..self.data + end as u64
    }

    async fn bytes_of(&self, tensor: &TensorInfo) -> Result<Bytes, ContentError> {
        read(&self.objects, &self.key, self.place(tensor)).await.map_err(ContentError::from)
    }

    pub(crate) async fn numbers_of(&self, name: &str) -> Result<Vec<f32>, ContentError> {
        let (tensor, float) = self.floats(name)?;
        Ok(float.decode(&self.bytes_of(tensor).await?))
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

/// A LoRA adapter and which weight each pair of its matrices adapts.
pub(crate) struct Adapter {
    pub(crate) file: TensorFile,
    /// By the name of the weight that is adapted.
    pub(crate) pairs: BTreeMap<String, LoraPair>,
    pub(crate) rank: usize,
    pub(crate) scale: f32,
}

impl Adapter {
    pub(crate) async fn open(
        objects: &Objects,
        weights: &ObjectPrefix,
        base_has: impl Fn(&str) -> bool,
    ) -> Result<Self, Unusable> {
        let config = PeftConfig::parse(&objects.read(&weights.file(ADAPTER_CONFIG_NAME)).await?)?;
        let manifest = manifest(objects, weights).await?;
        let bytes = manifest.file(ADAPTER_WEIGHTS_NAME).map(|file| file.bytes);
        let bytes =
            bytes.ok_or_else(|| Unusable::Broken("the adapter has no weights".to_owned()))?;
        let file = TensorFile::open(objects, weights.file(ADAPTER_WEIGHTS_NAME), bytes).await?;
        Ok(Self::new(&config.adapter, file, base_has)?)
    }

    /// The adapter of this shape whose tensors are in `file`.
    pub(crate) fn new(
        config: &AdapterConfig,
        file: TensorFile,
        base_has: impl Fn(&str) -> bool,
    ) -> Result<Self, PeftError> {
        let names = file.tensors.keys().map(String::as_str);
        let pairs = pair_lora_tensors(names, base_has, config.use_dora)?;
        Ok(Self { file, pairs, rank: config.r, scale: config.scale() as f32 })
    }

    /// Whether the adapter can be merged into the weights in `files`.
    pub(crate) fn check_fit_of_all(&self, files: &[TensorFile]) -> Result<(), Unusable> {
        for (name, tensor) in files.iter().flat_map(|file| &file.tensors) {
            if let Some(pair) = self.pairs.get(name) {
                self.check_fit(name, tensor, pair)?;
            }
        }
        Ok(())
    }

    /// Whether `pair` can be merged into `weight`: said before the first byte is sent.
    fn check_fit(&self, name: &str, weight: &TensorInfo, pair: &LoraPair) -> Result<(), Unusable> {
        let (Some(_), &[outputs, inputs]) = (float_type(weight), weight.shape.as_slice()) else {
            return Err(Unusable::Broken(format!(
                "{name} has the type {:?} and the shape {:?}: no adapter merges into that",
                weight.dtype, weight.shape
            )));
        };
        let parts = [
            (Some(&pair.a), vec![self.rank, inputs]),
            (Some(&pair.b), vec![outputs, self.rank]),
            (pair.magnitude.as_ref(), vec![outputs]),
        ];
        for (part, shape) in parts {
            let Some(matrix) = part else { continue };
            let Some(found) = self.file.tensors.get(matrix) else { continue };
            if found.shape != shape || float_type(found).is_none() {
                return Err(Unusable::Broken(format!(
                    "{matrix} is {:?} of shape {:?} where {name} and the adapter's rank ask for \
                     floats of shape {shape:?}",
                    found.dtype, found.shape
                )));
            }
        }
        Ok(())
    }
}

/// A stretch of a merged file.
enum Stretch {
    /// As in the base model.
    Copied(Range<u64>),
    /// A weight with its adapter added.
    Merged { name: String, tensor: TensorInfo, pair: LoraPair },
}

fn merged_file(name: String, base: TensorFile, adapter: Arc<Adapter>) -> Result<Entry, Failure> {
    let stretches = stretches(&base, &adapter)?;
    let bytes = base.bytes;
    let base = Arc::new(base);
    let open = async move {
        let content = stream::iter(stretches)
            .then(move |stretch| stretch_content(stretch, Arc::clone(&base), Arc::clone(&adapter)))
            .try_flatten();
        Ok(content.boxed())
    };
    Ok(Entry { name, bytes, sha256: None, open: Box::pin(open) })
}

fn stretches(base: &TensorFile, adapter: &Adapter) -> Result<Vec<Stretch>, Failure> {
    let mut adapted: Vec<(&String, &TensorInfo, &LoraPair)> = base
        .tensors
        .iter()
        .filter_map(|(name, tensor)| Some((name, tensor, adapter.pairs.get(name)?)))
        .collect();
    adapted.sort_by_key(|(_, tensor, _)| tensor.data_offsets);
    let mut stretches = Vec::with_capacity(2 * adapted.len() + 1);
    let mut done = 0;
    for (name, tensor, pair) in adapted {
        adapter.check_fit(name, tensor, pair)?;
        let place = base.place(tensor);
        stretches.push(Stretch::Copied(done..place.start));
        stretches.push(Stretch::Merged {
            name: name.clone(),
            tensor: tensor.clone(),
            pair: pair.clone(),
        });
        done = place.end;
    }
    stretches.push(Stretch::Copied(done..base.bytes));
    Ok(stretches)
}

async fn stretch_content(
    stretch: Stretch,
    base: Arc<TensorFile>,
    adapter: Arc<Adapter>,
) -> Result<Content, ContentError> {
    match stretch {
        Stretch::Copied(range) if range.is_empty() => Ok(stream::empty().boxed()),
        Stretch::Copied(range) => {
            let content = base.objects.get_range(&base.key, range).await?.stream;
            Ok(content.map_err(ContentError::from).boxed())
        }
        Stretch::Merged { name, tensor, pair } => {
            let weight = base.bytes_of(&tensor).await?;
            let a = adapter.file.numbers_of(&pair.a).await?;
            let b = adapter.file.numbers_of(&pair.b).await?;
            let magnitude = match &pair.magnitude {
                Some(magnitude) => Some(adapter.file.numbers_of(magnitude).await?),
                None => None,
            };
            let merged = tokio::task::spawn_blocking(move || {
                let factors = LoraFactors {
                    a: &a,
                    b: &b,
                    rank: adapter.rank,
                    scale: adapter.scale,
                    magnitude: magnitude.as_deref(),
                };
                merge(&name, &tensor, weight, &factors)
                    .map_err(|reason| ContentError::Merge { name, reason })
            })
            .await
            .map_err(|error| ContentError::Merge {
                name: base.key.to_string(),
                reason: error.to_string(),
            })??;
            Ok(stream::once(std::future::ready(Ok(merged))).boxed())
        }
    }
}

fn merge(
    name: &str,
    tensor: &TensorInfo,
    weight: Bytes,
    factors: &LoraFactors<'_>,
) -> Result<Bytes, String> {
    let (Some(float), &[outputs, inputs]) = (float_type(tensor), tensor.shape.as_slice()) else {
        return Err(format!("{name} is no matrix of floats"));
    };
    let mut weight = Vec::from(weight);
    merge_lora(&mut weight, float, [outputs, inputs], factors).map_err(|e| e.to_string())?;
    Ok(weight.into())
}

fn float_type(tensor: &TensorInfo) -> Option<FloatType> {
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
