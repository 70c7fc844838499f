//! The tokenizers of base models, loaded once.

use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::Mutex;
use tunesmith_core::dataset::ChatTokenizer;
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::ids::BaseModelId;
use tunesmith_store::base_models::BaseModel;
use tunesmith_store::{Store, StoreError};

/// What a tokenizer, a chat template and the tokens that end an answer are read from.
const FILES: [&str; 4] =
    ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"];

/// Those that were asked for so far.
pub(crate) struct Tokenizers {
    store: Store,
    /// A base model never changes, so neither does its tokenizer.
    known: Mutex<HashMap<BaseModelId, Arc<ChatTokenizer>>>,
}

impl Tokenizers {
    pub(crate) fn new(store: Store) -> Self {
        Self { store, known: Mutex::new(HashMap::new()) }
    }

    /// The tokenizer of `base`. One that cannot be used is the model's error.
    pub(crate) async fn of(
        &self,
        base: &BaseModel,
    ) -> Result<Result<Arc<ChatTokenizer>, ApiError>, StoreError> {
        // Held while it loads: who wants the same one waits for it.
        let mut known = self.known.lock().await;
        if let Some(tokenizer) = known.get(&base.id) {
            return Ok(Ok(Arc::clone(tokenizer)));
        }
        let directory = tempfile::tempdir()
            .map_err(|source| StoreError::LocalFile { path: std::env::temp_dir(), source })?;
        for file in FILES {
            if base.manifest.file(file).is_some() {
                let path = directory.path().join(file);
                self.store.objects().download(&base.file(file), &path).await?;
            }
        }
        match ChatTokenizer::from_dir(directory.path()) {
            Ok(tokenizer) => {
                let tokenizer = Arc::new(tokenizer);
                known.insert(base.id.clone(), Arc::clone(&tokenizer));
                Ok(Ok(tokenizer))
            }
            Err(error) => Ok(Err(ApiError::new(
                ErrorCode::Internal,
                format!("The tokenizer of the base model {} cannot be used: {error}", base.name),
            )
            .with_param("model"))),
        }
    }
}
