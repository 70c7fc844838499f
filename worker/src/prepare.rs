//! Fetching what a trainer needs onto the local disk.

use crate::retry::retry;
use crate::session::{Context, SessionError};
use crate::transfer::{TransferError, download_dir, read_manifest};
use std::path::{Path, PathBuf};
use tunesmith_core::dataset::is_text_name;
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::ids::FileId;
use tunesmith_core::job::TrainSpec;
use tunesmith_core::protocol::{STATE_DIR, TrainRequest, WEIGHTS_DIR};
use tunesmith_store::jobs::Job;
use tunesmith_store::objects::{CheckpointPlace, ObjectKey, ObjectPrefix, Objects};
use tunesmith_store::{Store, StoreError};

/// Puts base model, files and the checkpoint to go on from into place; `dir` is the job's own.
pub(crate) async fn prepare(
    context: &Context,
    job: &Job,
    dir: &Path,
) -> Result<TrainRequest, SessionError> {
    let objects = context.store.objects();
    let Some(hyperparameters) = job.resolved.clone() else {
        return Err(SessionError::Attempt("the job was queued before its validation".to_owned()));
    };
    let model = retry("base_model", || context.store.base_model_by_id(&job.base_model_id)).await?;
    let base_model_dir = context.cache.directory(objects, &model).await?;
    let store = &context.store;
    let training_file = fetch_file(store, &job.training_file, "training_file", dir).await?;
    let validation_file = match &job.validation_file {
        Some(id) => Some(fetch_file(store, id, "validation_file", dir).await?),
        None => None,
    };
    let resume_from = match &job.resume {
        Some(place) => Some(fetch_checkpoint(objects, place, dir).await?),
        None => None,
    };
    Ok(TrainRequest {
        job_id: job.id.clone(),
        spec: TrainSpec { model: model.name.clone(), seed: job.seed, hyperparameters },
        base_model_dir,
        training_file,
        validation_file,
        resume_from,
        output_dir: new_dir(dir.join("output")).await?,
        device: context.config.device.clone(),
    })
}

/// The content of a file of the job's; `param` names it in the request.
async fn fetch_file(
    store: &Store,
    id: &FileId,
    param: &str,
    dir: &Path,
) -> Result<PathBuf, SessionError> {
    let name = retry("filename", || store.filename(id)).await?;
    // The trainer reads plain text where the name says so.
    let is_text = name.as_deref().is_some_and(is_text_name);
    let path = dir.join(if is_text { format!("{param}.txt") } else { param.to_owned() });
    let key = ObjectKey::File(id.clone());
    match retry("download of a file", || store.objects().download(&key, &path)).await {
        Ok(_) => Ok(path),
        Err(StoreError::NotFound { .. }) => Err(SessionError::Job(
            ApiError::new(
                ErrorCode::InvalidTrainingFile,
                format!("The content of file {id} is gone. Upload it again and make a new job."),
            )
            .with_param(param),
        )),
        Err(error) => Err(error.into()),
    }
}

/// Both halves of a checkpoint, as the trainer that wrote them had them.
async fn fetch_checkpoint(
    objects: &Objects,
    place: &CheckpointPlace,
    dir: &Path,
) -> Result<PathBuf, SessionError> {
    let checkpoint = new_dir(dir.join(format!("checkpoint-{}", place.step))).await?;
    let halves = [
        (WEIGHTS_DIR, ObjectPrefix::CheckpointWeights(place.clone())),
        (STATE_DIR, ObjectPrefix::CheckpointState(place.clone())),
    ];
    for (name, prefix) in halves {
        let half = new_dir(checkpoint.join(name)).await?;
        let manifest = read_manifest(objects, &prefix).await?;
        download_dir(objects, &prefix, &manifest, &half).await?;
    }
    Ok(checkpoint)
}

async fn new_dir(path: PathBuf) -> Result<PathBuf, TransferError> {
    tokio::fs::create_dir(&path).await.map_err(TransferError::disk(&path))?;
    Ok(path)
}
