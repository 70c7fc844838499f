//! Files on their way from the store to where a child reads them.

use crate::models::Context;
use std::io;
use tempfile::TempDir;
use thiserror::Error;
use tunesmith_core::ids::BaseModelId;
use tunesmith_core::serving::TunedWeights;
use tunesmith_store::StoreError;
use tunesmith_store::objects::ObjectPrefix;
use tunesmith_worker::{CachedModel, TransferError, fetch_dir};

/// Why files did not come.
#[derive(Debug, Error)]
pub(crate) enum FetchError {
    /// There is no place for them.
    #[error(transparent)]
    Disk(#[from] io::Error),
    /// They did not come, or not as they were.
    #[error(transparent)]
    Transfer(#[from] TransferError),
}

impl From<StoreError> for FetchError {
    fn from(error: StoreError) -> Self {
        Self::Transfer(error.into())
    }
}

/// A base model of the cache.
///
/// # Errors
/// What the store or the disk says.
pub(crate) async fn base_model(
    context: &Context,
    id: &BaseModelId,
) -> Result<CachedModel, FetchError> {
    let base = context.store.base_model_by_id(id).await?;
    Ok(context.cache.model(context.store.objects(), &base).await?)
}

/// The files of a tuned model in a directory of their own.
///
/// # Errors
/// What the store or the disk says, or that they are damaged.
pub(crate) async fn tuned(context: &Context, tuned: &TunedWeights) -> Result<TempDir, FetchError> {
    let dir = context.work_dir.job_dir(&tuned.place.to_string())?;
    let prefix = ObjectPrefix::from(tuned.place.clone());
    fetch_dir(context.store.objects(), &prefix, dir.path()).await?;
    Ok(dir)
}
