//! A tuned model as a GGUF file that is made while it is sent: an adapter is merged, and what comes
//! out is changed and encoded a few rows at a time.

use crate::adapter_file::{Adapter, Factors};
use crate::archive::Entry;
use crate::failure::Failure;
use crate::model_source::ModelSource;
use crate::stored::{entry, manifest};
use crate::streaming::{Content, ContentError};
use crate::tensor_file::TensorFile;
use bytes::Bytes;
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use std::ops::Range;
use std::sync::Arc;
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::gguf::{ModelFiles, Plan, PlannedTensor, Source, StorageType};
use tunesmith_core::weights::{BeyondType, CONFIG_NAME, LoraPair, Manifest, merge_lora_rows};
use tunesmith_store::Store;
use tunesmith_store::models::Model;
use tunesmith_store::objects::{ObjectPrefix, Objects};

const README: &str = "README.md";

/// The file, Ollama's `Modelfile` and the job's facts.
///
/// # Errors
/// A model that GGUF cannot hold, an adapter that does not fit the base model, or files that cannot
/// be read: all of it before the first byte is sent.
pub(crate) async fn entries(
    store: &Store,
    model: &Model,
    storage: StorageType,
) -> Result<Vec<Entry>, Failure> {
    let (objects, weights) = (store.objects(), model.weights());
    let Opened { file_name, head, modelfile, export } = Opened::open(store, model, storage).await?;
    let facts = manifest(objects, &weights).await?.files.into_iter().find(|f| f.name == README);
    let bytes = head.len() + export.planned.iter().map(|t| t.bytes() + t.padding()).sum::<usize>();
    let count = export.planned.len();
    let content = stream::iter(0..count)
        .flat_map(move |index| tensor_content(Arc::clone(&export), index))
        .boxed();
    let mut entries = vec![
        Entry {
            name: file_name,
            bytes: bytes as u64,
            sha256: None,
            open: Box::pin(async move { Ok(piece(head).chain(content).boxed()) }),
        },
        Entry {
            name: "Modelfile".to_owned(),
            bytes: modelfile.len() as u64,
            sha256: None,
            open: Box::pin(async move { Ok(piece(modelfile.into_bytes())) }),
        },
    ];
    entries.extend(
        facts.map(|file| entry(objects, &weights, file.name, file.bytes, Some(file.sha256))),
    );
    Ok(entries)
}

/// Looks at every number that may be beyond half precision, or whose block's scale may be, and gives
/// none of them.
///
/// # Errors
/// [`ContentError::Beyond`] for the first that is, and what else can go wrong on the way.
pub(crate) async fn try_half_precision(
    store: &Store,
    model: &Model,
    storage: StorageType,
) -> Result<Result<(), ContentError>, Failure> {
    let export = Opened::open(store, model, storage).await?.export;
    for index in 0..export.planned.len() {
        if let Err(error) = Arc::clone(&export).check(index).await {
            return Ok(Err(error));
        }
    }
    Ok(Ok(()))
}

/// A file that is planned, with what it is made of.
struct Opened {
    file_name: String,
    head: Vec<u8>,
    modelfile: String,
    export: Arc<Export>,
}

impl Opened {
    async fn open(store: &Store, model: &Model, storage: StorageType) -> Result<Self, Failure> {
        let ModelSource { directory, manifest, files: tensors, adapter } =
            ModelSource::open(store, model).await?;
        let small = SmallFiles::read(store.objects(), &directory, &manifest).await?;
        let shapes: Vec<(String, Vec<usize>)> = tensors
            .iter()
            .flat_map(|file| file.tensors.iter().map(|(name, t)| (name.clone(), t.shape.clone())))
            .collect();
        let name = model.name.clone();
        let plan = tokio::task::spawn_blocking(move || {
            let shapes = shapes.iter().map(|(name, shape)| (name.as_str(), shape.as_slice()));
            Plan::new(&name, &small.files(), shapes, storage)
        })
        .await
        .map_err(Failure::internal)?
        .map_err(|error| {
            ApiError::new(ErrorCode::WeightsNotAvailable, format!("{error}.")).with_param("format")
        })?;
        let Plan { file_name, head, tensors: planned, modelfile } = plan;
        let export = Arc::new(Export { planned, tensors, adapter });
        Ok(Self { file_name, head, modelfile, export })
    }
}

/// The small files of a Hugging Face directory.
struct SmallFiles {
    config: Bytes,
    tokenizer: Bytes,
    tokenizer_config: Bytes,
    chat_template: Option<String>,
    generation_config: Option<Bytes>,
}

impl SmallFiles {
    async fn read(
        objects: &Objects,
        directory: &ObjectPrefix,
        manifest: &Manifest,
    ) -> Result<Self, Failure> {
        let optional = async |name: &str| match manifest.file(name) {
            Some(_) => objects.read(&directory.file(name)).await.map(Some),
            None => Ok(None),
        };
        let chat_template = optional("chat_template.jinja").await?;
        Ok(Self {
            config: objects.read(&directory.file(CONFIG_NAME)).await?,
            tokenizer: objects.read(&directory.file("tokenizer.json")).await?,
            tokenizer_config: objects.read(&directory.file("tokenizer_config.json")).await?,
            chat_template: chat_template
                .map(|bytes| String::from_utf8(bytes.into()).map_err(Failure::internal))
                .transpose()?,
            generation_config: optional("generation_config.json").await?,
        })
    }

    fn files(&self) -> ModelFiles<'_> {
        ModelFiles {
            config: &self.config,
            tokenizer: &self.tokenizer,
            tokenizer_config: &self.tokenizer_config,
            chat_template: self.chat_template.as_deref(),
            generation_config: self.generation_config.as_deref(),
        }
    }
}

/// What the content is made of.
struct Export {
    planned: Vec<PlannedTensor>,
    /// The files of the base model, or of one that was trained in full.
    tensors: Vec<TensorFile>,
    adapter: Option<Adapter>,
}

fn tensor_content(export: Arc<Export>, index: usize) -> Content {
    let planned = &export.planned[index];
    let padding = piece(vec![0; planned.padding()]);
    let pieces: Vec<Range<usize>> = planned.pieces().collect();
    let loaded = {
        let export = Arc::clone(&export);
        async move { export.factors(index).await.map(Arc::new) }
    };
    stream::once(loaded)
        .map_ok(move |factors| {
            let export = Arc::clone(&export);
            stream::iter(pieces.clone())
                .then(move |rows| Arc::clone(&export).encoded(index, Arc::clone(&factors), rows))
        })
        .try_flatten()
        .chain(padding)
        .boxed()
}

impl Export {
    fn pair(&self, index: usize) -> Option<(&Adapter, &LoraPair)> {
        let Source::Weight(name) = &self.planned[index].source else { return None };
        let adapter = self.adapter.as_ref()?;
        Some((adapter, adapter.pairs.get(name)?))
    }

    /// The adapter of a tensor, where it has one.
    async fn factors(&self, index: usize) -> Result<Option<Factors>, ContentError> {
        let Some((adapter, pair)) = self.pair(index) else { return Ok(None) };
        adapter.factors(pair).await.map(Some)
    }

    /// Some rows of a tensor, its adapter merged into them.
    async fn values(
        self: &Arc<Self>,
        index: usize,
        factors: &Arc<Option<Factors>>,
        rows: Range<usize>,
    ) -> Result<Vec<f32>, ContentError> {
        let mut values = match &self.planned[index].source {
            Source::Values(values) => values[rows.clone()].to_vec(),
            Source::Weight(name) => {
                let file = self.tensors.iter().find(|file| file.tensors.contains_key(name));
                let file = file.ok_or_else(|| failed(name, "it is in no file"))?;
                file.rows_of(name, rows.clone()).await?
            }
        };
        if factors.is_none() {
            return Ok(values);
        }
        let (export, factors) = (Arc::clone(self), Arc::clone(factors));
        on_a_thread(move || {
            let planned = &export.planned[index];
            if let Some(factors) = &*factors {
                merge_lora_rows(&mut values, planned.columns(), &factors.of_rows(rows))
                    .map_err(|error| failed(&planned.name, &error))?;
            }
            Ok(values)
        })
        .await
    }

    /// Some rows as the file has them.
    async fn encoded(
        self: Arc<Self>,
        index: usize,
        factors: Arc<Option<Factors>>,
        rows: Range<usize>,
    ) -> Result<Bytes, ContentError> {
        let values = self.values(index, &factors, rows).await?;
        let encoded = on_a_thread(move || {
            let planned = &self.planned[index];
            planned.encode(values).map_err(|beyond| too_great(planned, beyond))
        });
        encoded.await.map(Bytes::from)
    }

    /// Whether a tensor can be encoded.
    async fn check(self: Arc<Self>, index: usize) -> Result<(), ContentError> {
        if !self.planned[index].may_be_beyond() {
            return Ok(());
        }
        let factors = Arc::new(self.factors(index).await?);
        for rows in self.planned[index].pieces() {
            let values = self.values(index, &factors, rows).await?;
            let export = Arc::clone(&self);
            on_a_thread(move || {
                let planned = &export.planned[index];
                planned.check(values).map_err(|beyond| too_great(planned, beyond))
            })
            .await?;
        }
        Ok(())
    }
}

/// Computes on a thread of its own, which keeps no other request waiting.
async fn on_a_thread<T: Send + 'static>(
    compute: impl FnOnce() -> Result<T, ContentError> + Send + 'static,
) -> Result<T, ContentError> {
    let computed = tokio::task::spawn_blocking(compute).await;
    computed.map_err(|error| failed("a tensor", &error))?
}

fn too_great(planned: &PlannedTensor, beyond: BeyondType) -> ContentError {
    let name = match &planned.source {
        Source::Weight(name) => name.clone(),
        Source::Values(_) => planned.name.clone(),
    };
    ContentError::Beyond { name, beyond }
}

fn failed(name: &str, reason: &(impl std::fmt::Display + ?Sized)) -> ContentError {
    ContentError::Merge { name: name.to_owned(), reason: reason.to_string() }
}

fn piece(bytes: Vec<u8>) -> Content {
    stream::once(std::future::ready(Ok(Bytes::from(bytes)))).boxed()
}
