//! A whole model as a Hugging Face directory that is made while it is sent: an adapter is merged into
//! its weights, their numbers are given another type, and they are cut into files of a bounded size.
//!
//! Tensors that stay as they are stored are copied byte by byte. Of the others a few rows at a time
//! are in memory, and the matrices of one adapted weight.

use crate::adapter_file::{Adapter, Factors};
use crate::archive::Entry;
use crate::failure::Failure;
use crate::model_source::ModelSource;
use crate::stored::{entry, manifest};
use crate::streaming::{Content, ContentError};
use crate::tensor_file::{TensorFile, float_type};
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt as _, TryStreamExt as _};
use safetensors::tensor::TensorInfo;
use serde_json::Value;
use std::ops::Range;
use std::sync::Arc;
use tunesmith_core::export_check::MergedForm;
use tunesmith_core::hyperparameters::AdapterType;
use tunesmith_core::weights::{
    CONFIG_NAME, FloatType, INDEX_NAME, LoraPair, Manifest, Shard, Shards, TensorLayout,
    merge_lora_rows, set_dtype,
};
use tunesmith_store::models::Model;
use tunesmith_store::objects::{ObjectPrefix, Objects};
use tunesmith_store::{Store, StoreError};

const SAFETENSORS: &str = ".safetensors";
const README: &str = "README.md";
/// Bytes of a stored tensor that are computed at a time, where a row is no longer.
const PIECE_BYTES: usize = 1 << 20;

/// The files of the merged model.
///
/// # Errors
/// An adapter that does not fit the base model, or files that cannot be read: all of it before
/// the first byte is sent.
pub(crate) async fn entries(
    store: &Store,
    model: &Model,
    form: MergedForm,
) -> Result<Vec<Entry>, Failure> {
    let objects = store.objects();
    let Opened { directory, files, merged } = Opened::open(store, model, form).await?;
    let config = match files.file(CONFIG_NAME) {
        Some(_) => config(objects, &directory, merged.dtype()).await?,
        None => None,
    };
    let layouts: Vec<TensorLayout> = merged.tensors.iter().map(Tensor::layout).collect();
    let shards = Shards::cut(&layouts, form.max_shard_size);
    let merged = Arc::new(merged);
    let mut weights = Some(
        shards
            .files
            .into_iter()
            .map(|shard| shard_entry(shard, Arc::clone(&merged)))
            .chain(shards.index.map(|index| made(INDEX_NAME, index.into())))
            .collect::<Vec<Entry>>(),
    );

    let mut entries = Vec::new();
    for file in files.files {
        if file.name.ends_with(SAFETENSORS) {
            entries.extend(weights.take().into_iter().flatten());
            continue;
        }
        match file.name.as_str() {
            INDEX_NAME => {}
            // The base model's own would claim that this is the base model.
            README if model.adapter.kind == AdapterType::Lora => {}
            CONFIG_NAME if config.is_some() => {
                entries.extend(config.iter().map(|config| made(CONFIG_NAME, config.clone())));
            }
            _ => {
                let sha256 = Some(file.sha256);
                entries.push(entry(objects, &directory, file.name, file.bytes, sha256));
            }
        }
    }
    if model.adapter.kind == AdapterType::Lora {
        // The adapter's README has the facts of the job.
        let weights = model.weights();
        let facts = manifest(objects, &weights).await?.files.into_iter().find(|f| f.name == README);
        entries.extend(
            facts.map(|file| entry(objects, &weights, file.name, file.bytes, Some(file.sha256))),
        );
    }
    Ok(entries)
}

/// Computes every number that may be beyond half precision, and gives none of them.
///
/// # Errors
/// [`ContentError::Beyond`] for the first that is, and what else can go wrong on the way.
pub(crate) async fn try_half_precision(
    store: &Store,
    model: &Model,
    form: MergedForm,
) -> Result<Result<(), ContentError>, Failure> {
    let merged = Arc::new(Opened::open(store, model, form).await?.merged);
    for (index, tensor) in merged.tensors.iter().enumerate() {
        if tensor.written() == Some(FloatType::F16) && !tensor.is_copied() {
            let mut content = computed(Arc::clone(&merged), index);
            loop {
                match content.try_next().await {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(error) => return Ok(Err(error)),
                }
            }
        }
    }
    Ok(Ok(()))
}

/// Whether a model that is stored whole has a file of weights that is larger than `max_shard_size`.
pub(crate) fn is_beyond(files: &Manifest, max_shard_size: u64) -> bool {
    files.files.iter().any(|file| file.name.ends_with(SAFETENSORS) && file.bytes > max_shard_size)
}

/// What a merged model is made of, and the directory that its other files are in.
struct Opened {
    directory: ObjectPrefix,
    files: Manifest,
    merged: Merged,
}

struct Merged {
    /// The files of the base model, or of one that was trained in full.
    files: Vec<TensorFile>,
    adapter: Option<Adapter>,
    /// In the order of the files, and of their places in these.
    tensors: Vec<Tensor>,
}

/// A tensor on its way.
struct Tensor {
    name: String,
    /// The place of its file in the list.
    file: usize,
    stored: TensorInfo,
    /// The types in which its floats are stored and will be written.
    floats: Option<(FloatType, FloatType)>,
    /// What adapts it.
    pair: Option<LoraPair>,
}

impl Opened {
    async fn open(store: &Store, model: &Model, form: MergedForm) -> Result<Self, Failure> {
        let ModelSource { directory, manifest, files, adapter } =
            ModelSource::open(store, model).await?;
        let tensors = tensors(&files, adapter.as_ref(), form.dtype);
        Ok(Self { directory, files: manifest, merged: Merged { files, adapter, tensors } })
    }
}

fn tensors(
    files: &[TensorFile],
    adapter: Option<&Adapter>,
    dtype: Option<FloatType>,
) -> Vec<Tensor> {
    let mut all = Vec::new();
    for (number, file) in files.iter().enumerate() {
        let mut tensors: Vec<Tensor> = file
            .tensors
            .iter()
            .map(|(name, stored)| Tensor {
                name: name.clone(),
                file: number,
                stored: stored.clone(),
                floats: float_type(stored).map(|float| (float, dtype.unwrap_or(float))),
                pair: adapter.and_then(|adapter| adapter.pairs.get(name)).cloned(),
            })
            .collect();
        tensors.sort_by_key(|tensor| tensor.stored.data_offsets);
        all.extend(tensors);
    }
    all
}

impl Tensor {
    fn written(&self) -> Option<FloatType> {
        self.floats.map(|(_, written)| written)
    }

    /// Whether its bytes stay as they are stored.
    fn is_copied(&self) -> bool {
        self.pair.is_none() && self.floats.is_none_or(|(stored, written)| stored == written)
    }

    fn stored_bytes(&self) -> usize {
        self.stored.data_offsets.1 - self.stored.data_offsets.0
    }

    fn layout(&self) -> TensorLayout {
        let (dtype, bytes) = match self.floats {
            Some((stored, written)) => {
                let bytes = self.stored_bytes() / stored.size() * written.size();
                (written.safetensors_name().to_owned(), bytes)
            }
            None => (self.stored.dtype.to_string(), self.stored_bytes()),
        };
        let (name, shape) = (self.name.clone(), self.stored.shape.clone());
        TensorLayout { name, dtype, shape, bytes: bytes as u64 }
    }

    /// Elements that are computed together: a row of an adapted matrix.
    fn row(&self) -> usize {
        match (&self.pair, self.stored.shape.as_slice()) {
            (Some(_), &[_, inputs]) => inputs.max(1),
            _ => 1,
        }
    }
}

impl Merged {
    /// The type of all floats that are written, where they have one.
    fn dtype(&self) -> Option<FloatType> {
        let mut written = self.tensors.iter().filter_map(Tensor::written);
        let first = written.next()?;
        written.all(|float| float == first).then_some(first)
    }
}

/// The model's `config.json`, where what it says of the numbers' type would not be true.
async fn config(
    objects: &Objects,
    directory: &ObjectPrefix,
    dtype: Option<FloatType>,
) -> Result<Option<Bytes>, Failure> {
    // Numbers of several types have no name there.
    let Some(dtype) = dtype else { return Ok(None) };
    let content = objects.read(&directory.file(CONFIG_NAME)).await?;
    let mut config: Value = serde_json::from_slice(&content).map_err(Failure::internal)?;
    if !set_dtype(&mut config, dtype) {
        return Ok(None);
    }
    let mut text = serde_json::to_vec_pretty(&config).map_err(Failure::internal)?;
    text.push(b'\n');
    Ok(Some(text.into()))
}

/// A file that is in memory.
fn made(name: &str, content: Bytes) -> Entry {
    let bytes = content.len() as u64;
    let open = async move { Ok(stream::once(std::future::ready(Ok(content))).boxed()) };
    Entry { name: name.to_owned(), bytes, sha256: None, open: Box::pin(open) }
}

/// A part of a shard.
enum Stretch {
    /// Bytes of a stored file.
    Copied { file: usize, range: Range<u64> },
    /// A tensor, by its place in the list.
    Computed(usize),
}

fn shard_entry(shard: Shard, merged: Arc<Merged>) -> Entry {
    let Shard { name, head, tensors, bytes } = shard;
    let stretches = stretches(&merged, &tensors);
    let open = async move {
        let head = stream::once(std::future::ready(Ok(Bytes::from(head))));
        let tensors = stream::iter(stretches)
            .then(move |stretch| stretch_content(stretch, Arc::clone(&merged)))
            .try_flatten();
        Ok(head.chain(tensors).boxed())
    };
    Entry { name, bytes, sha256: None, open: Box::pin(open) }
}

/// The tensors of a file; those that are copied from neighbouring places are read at once.
fn stretches(merged: &Merged, tensors: &[usize]) -> Vec<Stretch> {
    let mut stretches: Vec<Stretch> = Vec::new();
    for &index in tensors {
        let tensor = &merged.tensors[index];
        if !tensor.is_copied() {
            stretches.push(Stretch::Computed(index));
            continue;
        }
        let place = merged.files[tensor.file].place(&tensor.stored);
        match stretches.last_mut() {
            Some(Stretch::Copied { file, range })
                if *file == tensor.file && range.end == place.start =>
            {
                range.end = place.end;
            }
            _ => stretches.push(Stretch::Copied { file: tensor.file, range: place }),
        }
    }
    stretches
}

async fn stretch_content(stretch: Stretch, merged: Arc<Merged>) -> Result<Content, ContentError> {
    match stretch {
        Stretch::Copied { range, .. } if range.is_empty() => Ok(stream::empty().boxed()),
        Stretch::Copied { file, range } => {
            let content = merged.files[file].part(range).await?;
            Ok(content.map_err(ContentError::from).boxed())
        }
        Stretch::Computed(index) => Ok(computed(merged, index)),
    }
}

fn computed(merged: Arc<Merged>, index: usize) -> Content {
    let opened = async move {
        let tensor = &merged.tensors[index];
        let factors = match (&merged.adapter, &tensor.pair) {
            (Some(adapter), Some(pair)) => Some(Arc::new(adapter.factors(pair).await?)),
            _ => None,
        };
        let file = &merged.files[tensor.file];
        let stored = if tensor.stored_bytes() == 0 {
            stream::empty().boxed()
        } else {
            file.part(file.place(&tensor.stored)).await?
        };
        let rows = Rows { merged, index, factors, stored, buffer: Vec::new(), row: 0 };
        Ok::<_, ContentError>(stream::try_unfold(rows, Rows::next))
    };
    stream::once(opened).try_flatten().boxed()
}

/// A tensor that is computed a few rows at a time.
struct Rows {
    merged: Arc<Merged>,
    index: usize,
    factors: Option<Arc<Factors>>,
    stored: BoxStream<'static, Result<Bytes, StoreError>>,
    /// Bytes that have come and are not computed as yet.
    buffer: Vec<u8>,
    /// The first row in the buffer.
    row: usize,
}

impl Rows {
    async fn next(mut self) -> Result<Option<(Bytes, Self)>, ContentError> {
        let tensor = &self.merged.tensors[self.index];
        let failed = |reason: String| ContentError::Merge { name: tensor.name.clone(), reason };
        let (stored, written) =
            tensor.floats.ok_or_else(|| failed("it does not hold floats".to_owned()))?;
        let columns = tensor.row();
        let row_bytes = columns * stored.size();
        while self.buffer.len() < PIECE_BYTES.max(row_bytes) {
            let Some(piece) = self.stored.try_next().await? else { break };
            self.buffer.extend_from_slice(&piece);
        }
        let rows = self.buffer.len() / row_bytes;
        if rows == 0 {
            return match self.buffer.len() {
                0 => Ok(None),
                rest => Err(failed(format!("it ends with {rest} bytes of a row of {row_bytes}"))),
            };
        }
        let rest = self.buffer.split_off(rows * row_bytes);
        let bytes = std::mem::replace(&mut self.buffer, rest);
        let range = self.row..self.row + rows;
        self.row = range.end;
        let (factors, name) = (self.factors.clone(), tensor.name.clone());
        let compute = move || {
            let mut values = stored.decode(&bytes);
            if let Some(factors) = factors {
                merge_lora_rows(&mut values, columns, &factors.of_rows(range)).map_err(
                    |error| ContentError::Merge { name: name.clone(), reason: error.to_string() },
                )?;
            }
            written.encode(&values).map_err(|beyond| ContentError::Beyond { name, beyond })
        };
        let computed = tokio::task::spawn_blocking(compute).await;
        let computed = computed.map_err(|error| failed(error.to_string()))??;
        Ok(Some((computed.into(), self)))
    }
}
