//! Fetching what a trainer needs onto the local disk.

use crate::model_cache::CachedModel;
use crate::retry::retry;
use crate::session::{Context, SessionError};
use crate::transfer::{TransferError, fetch_dir};
use std::path::{Path, PathBuf};
use tunesmith_core::dataset::is_text_name;
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::hyperparameters::AdapterType;
use tunesmith_core::ids::FileId;
use tunesmith_core::job::TrainSpec;
use tunesmith_core::protocol::{STATE_DIR, TrainRequest, WEIGHTS_DIR};
use tunesmith_core::weights::{ADAPTER_CONFIG_NAME, CheckpointPlace};
use tunesmith_store::jobs::Job;
use tunesmith_store::objects::{ObjectKey, ObjectPrefix, Objects};
use tunesmith_store::{Store, StoreError};

/// Puts base model, files and the weights to begin with or to go on from into place; `dir` is the
/// job's own. With what the trainer is told comes the model of the cache that it reads, which is to
/// be kept meanwhile.
pub(crate) async fn prepare(
    context: &Context,
    job: &Job,
    dir: &Path,
) -> Result<(TrainRequest, Option<CachedModel>), SessionError> {
    let objects = context.store.objects();
    let Some(hyperparameters) = job.resolved.clone() else {
        return Err(SessionError::Attempt("the job was queued before its validation".to_owned()));
    };
    let model = retry("base_model", || context.store.base_model_by_id(&job.base_model_id)).await?;
    let kind = hyperparameters.adapter.kind;
    let start = fetch_start(objects, job, kind, dir).await?;
    // A model that was tuned in full is its own base; an adapter goes on the base model.
    let (base_model_dir, cached, start_from) = match start {
        Some(tuned) if !tuned.join(ADAPTER_CONFIG_NAME).exists() => (tuned, None, None),
        adapter => {
            let cached = context.cache.model(objects, &model).await?;
            (cached.path().to_owned(), Some(cached), adapter)
        }
    };
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
    let request = TrainRequest {
        job_id: job.id.clone(),
        spec: TrainSpec {
            model: model.name.clone(),
            base_is_tuned: model.tuned.is_some(),
            start_from: job.start.as_ref().map(|_| job.model.clone()),
            seed: job.seed,
            hyperparameters,
        },
        base_model_dir,
        start_from,
        training_file,
        validation_file,
        resume_from,
        output_dir: new_dir(dir.join("output")).await?,
        device: context.config.device.clone(),
    };
    Ok((request, cached))
}

/// The directory of the weights that the job begins with, where they are not the base model's.
async fn fetch_start(
    objects: &Objects,
    job: &Job,
    kind: AdapterType,
    dir: &Path,
) -> Result<Option<PathBuf>, SessionError> {
    let Some(place) = &job.start else { return Ok(None) };
    // A checkpoint holds the adapter as it is by now.
    if kind == AdapterType::Lora && job.resume.is_some() {
        return Ok(None);
    }
    let start = new_dir(dir.join("start")).await?;
    match fetch_dir(objects, &place.clone().into(), &start).await {
        Ok(()) => Ok(Some(start)),
        Err(TransferError::Store(StoreError::NotFound { .. })) => Err(SessionError::Job(
            ApiError::new(
                ErrorCode::ModelNotFound,
                format!(
                    "The weights of {} are gone. Start a new job from another model.",
                    job.model
                ),
            )
            .with_param("model"),
        )),
        Err(error) => Err(error.into()),
    }
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
        fetch_dir(objects, &prefix, &half).await?;
    }
    Ok(checkpoint)
}

async fn new_dir(path: PathBuf) -> Result<PathBuf, TransferError> {
    tokio::fs::create_dir(&path).await.map_err(TransferError::disk(&path))?;
    Ok(path)
}
