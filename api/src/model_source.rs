//! What a whole model is made of: the files of its base model and its adapter, or its own.

use crate::adapter_file::Adapter;
use crate::failure::Failure;
use crate::stored::manifest;
use crate::tensor_file::{TensorFile, has_tensor};
use tunesmith_core::hyperparameters::AdapterType;
use tunesmith_core::weights::Manifest;
use tunesmith_store::Store;
use tunesmith_store::models::Model;
use tunesmith_store::objects::ObjectPrefix;

/// The stored parts of a model.
pub(crate) struct ModelSource {
    /// The directory of the base model, or of one that was trained in full.
    pub(crate) directory: ObjectPrefix,
    /// What is in the directory.
    pub(crate) manifest: Manifest,
    /// Its files of weights.
    pub(crate) files: Vec<TensorFile>,
    /// What is merged into them; it fits.
    pub(crate) adapter: Option<Adapter>,
}

impl ModelSource {
    /// # Errors
    /// An adapter that does not fit the base model, or files that cannot be read.
    pub(crate) async fn open(store: &Store, model: &Model) -> Result<Self, Failure> {
        let objects = store.objects();
        let weights = model.weights();
        if model.adapter.kind != AdapterType::Lora {
            let manifest = manifest(objects, &weights).await?;
            let files = TensorFile::all(objects, &weights, &manifest).await?;
            return Ok(Self { directory: weights, manifest, files, adapter: None });
        }
        let base = store.base_model_by_id(&model.base_model_id).await?;
        let directory = base.prefix();
        let files = TensorFile::all(objects, &directory, &base.manifest).await?;
        let base_has = |name: &str| has_tensor(&files, name);
        let adapter = Adapter::open(objects, &weights, base_has).await?;
        adapter.check_fit_of_all(&files)?;
        Ok(Self { directory, manifest: base.manifest, files, adapter: Some(adapter) })
    }
}
