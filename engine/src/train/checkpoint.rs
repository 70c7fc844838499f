//! Checkpoint directories: `weights/` for people and `state/` to resume from.
//!
//! A directory is written under a temporary name, synced and renamed, so one that has its name is
//! whole. `weights/` holds the exact f32 bits of the trainable tensors, so `state/` does not
//! repeat them; for full fine-tuning the frozen ones lie beside them.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tunesmith_core::diagnosis::{FindingKind, LossCurve};
use tunesmith_core::hyperparameters::{AdapterType, InitLoraWeights, Precision};
use tunesmith_core::metrics::BestStep;
use tunesmith_core::protocol::TrainRequest;
use tunesmith_core::protocol::{STATE_DIR, WEIGHTS_DIR};
use tunesmith_core::weights::ADAPTER_WEIGHTS_NAME;

use super::TrainOptions;
use super::preference::References;
use crate::error::EngineError;
use crate::export::{self, JobFacts, export_merged, safetensors};
use crate::model::{OptimizerState, TrainableModel};
use crate::model_directory::{CONFIG, WEIGHTS, read_json};
use crate::parameter::NamedTensor;

/// In the output directory: the base model with the adapter that a run of every weight begins with.
const MERGED_DIR: &str = "merged";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
const TRAINER_FILE: &str = "trainer.json";
/// Raised when an older checkpoint can no longer be read.
const FORMAT: u32 = 1;

/// Where a run stands between two steps; everything else is a function of the request.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimiser steps done.
    pub step: u64,
    /// Tokens seen in training.
    pub tokens: u64,
    /// Training time so far.
    pub elapsed_seconds: f64,
    /// Loss on the validation rows before the first step.
    pub initial_valid_loss: Option<f64>,
    /// The lowest validation loss so far, and the step after which it was measured.
    pub best: Option<BestStep>,
    /// The most tokens of one pass, once that was decided.
    #[serde(default)]
    pub tokens_per_pass: Option<usize>,
    /// Evaluations in a row that brought no lower validation loss.
    #[serde(default)]
    pub evaluations_without_improvement: u64,
    /// Training losses of the last steps, by which a leap is told.
    #[serde(default)]
    pub recent_losses: Vec<f64>,
    /// How often the run has gone back to a checkpoint.
    #[serde(default)]
    pub rollbacks: u64,
    /// The losses so far.
    #[serde(default)]
    pub curve: LossCurve,
    /// What was said of the curve already.
    #[serde(default)]
    pub told: Vec<FindingKind>,
    /// What DPO compares with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub references: Option<References>,
}

/// `trainer.json`.
#[derive(Debug, Serialize, Deserialize)]
struct TrainerFile {
    format: u32,
    fingerprint: String,
    optimizer_step: u64,
    /// What the run computes in, never `Auto`.
    #[serde(default = "Precision::before_there_was_a_choice")]
    precision: Precision,
    progress: Progress,
}

impl TrainerFile {
    fn read(dir: &Path) -> Result<Self, EngineError> {
        let json = read_json(&Self::path(dir))?;
        if json["format"] != FORMAT {
            return Err(Self::broken(
                dir,
                format!(
                    "the checkpoint has format {}, and this version reads format {FORMAT}: start \
                     the job afresh",
                    json["format"]
                ),
            ));
        }
        serde_json::from_value(json).map_err(|error| Self::broken(dir, error.to_string()))
    }

    fn path(dir: &Path) -> PathBuf {
        dir.join(STATE_DIR).join(TRAINER_FILE)
    }

    fn broken(dir: &Path, problem: String) -> EngineError {
        EngineError::Checkpoint(format!("{}: {problem}", Self::path(dir).display()))
    }
}

/// What two runs must share for one to go on where the other stopped: a hash over the job's
/// spec, its files, the base model's architecture and the way that rows become batches.
pub(super) fn fingerprint(
    request: &TrainRequest,
    options: &TrainOptions,
) -> Result<String, EngineError> {
    let mut hash = Sha256::new();
    let spec = serde_json::to_vec(&request.spec)
        .map_err(|error| EngineError::Checkpoint(format!("the job's spec: {error}")))?;
    let batches = format!("{options:?}");
    for part in [spec.as_slice(), batches.as_bytes()] {
        hash.update(Sha256::digest(part));
    }
    let config = request.base_model_dir.join(CONFIG);
    let files = [Some(&config), Some(&request.training_file), request.validation_file.as_ref()];
    for file in files.into_iter().flatten() {
        hash.update(hash_file(file)?);
    }
    Ok(hex::encode(hash.finalize()))
}

fn hash_file(path: &Path) -> Result<Vec<u8>, EngineError> {
    let mut file = File::open(path).map_err(EngineError::io(path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer).map_err(EngineError::io(path))?;
        if read == 0 {
            return Ok(hash.finalize().to_vec());
        }
        hash.update(&buffer[..read]);
    }
}

/// Writes checkpoints of one run.
#[derive(Debug)]
pub(super) struct Writer<'a> {
    pub(super) request: &'a TrainRequest,
    pub(super) fingerprint: &'a str,
    pub(super) precision: Precision,
}

impl Writer<'_> {
    /// Writes `checkpoint-{step}` in the output directory and returns its path.
    pub(super) fn write(
        &self,
        model: &TrainableModel,
        progress: &Progress,
        facts: &JobFacts,
    ) -> Result<PathBuf, EngineError> {
        let output_dir = &self.request.output_dir;
        let dir = output_dir.join(format!("checkpoint-{}", progress.step));
        let partial = output_dir.join(format!("checkpoint-{}.partial", progress.step));
        if partial.exists() {
            fs::remove_dir_all(&partial).map_err(EngineError::io(&partial))?;
        }
        let weights = partial.join(WEIGHTS_DIR);
        let state = partial.join(STATE_DIR);
        for dir in [&weights, &state] {
            fs::create_dir_all(dir).map_err(EngineError::io(dir))?;
        }
        export::write_weights(
            &self.request.base_model_dir,
            &self.request.spec.hyperparameters.adapter,
            model.exported_tensors()?,
            facts,
            &weights,
        )?;
        let optimizer = model.optimizer_tensors()?;
        safetensors::write(&state.join(OPTIMIZER_FILE), optimizer.tensors)?;
        let trainer = TrainerFile {
            format: FORMAT,
            fingerprint: self.fingerprint.to_owned(),
            optimizer_step: optimizer.step,
            precision: self.precision,
            progress: progress.clone(),
        };
        let path = state.join(TRAINER_FILE);
        let json = serde_json::to_vec_pretty(&trainer)
            .map_err(|error| EngineError::Checkpoint(format!("{}: {error}", path.display())))?;
        fs::write(&path, json).map_err(EngineError::io(&path))?;

        sync_tree(&partial)?;
        fs::rename(&partial, &dir).map_err(EngineError::io(&dir))?;
        sync(output_dir)?;
        Ok(dir)
    }
}

/// The precision of the run that wrote the checkpoint in `dir`.
pub(super) fn precision(dir: &Path) -> Result<Precision, EngineError> {
    TrainerFile::read(dir).map(|trainer| trainer.precision)
}

/// The adapter in the checkpoint to go on from, where the model cannot be loaded without it.
pub(super) fn adapter_to_go_on(
    request: &TrainRequest,
) -> Result<Option<Vec<NamedTensor>>, EngineError> {
    match (&request.resume_from, request.spec.hyperparameters.adapter.init_lora_weights) {
        (Some(dir), InitLoraWeights::Pissa) => {
            safetensors::read(&dir.join(WEIGHTS_DIR).join(ADAPTER_WEIGHTS_NAME)).map(Some)
        }
        _ => Ok(None),
    }
}

/// Puts the adapter that the run begins with, if it is not a new one, in the place of `model`'s.
/// Where every weight trains, the model has been loaded with it ([`start_dir`]).
pub(super) fn begin(request: &TrainRequest, model: &mut TrainableModel) -> Result<(), EngineError> {
    match (&request.start_from, request.spec.hyperparameters.adapter.kind) {
        (Some(dir), AdapterType::Lora) => load_weights(&dir.join(ADAPTER_WEIGHTS_NAME), model),
        _ => Ok(()),
    }
}

/// Brings `model` to where the checkpoint in `dir` was written. For full fine-tuning, whose
/// checkpoints are whole models, `model` must have been loaded from [`start_dir`].
pub(super) fn resume(
    dir: &Path,
    adapter: AdapterType,
    fingerprint: &str,
    model: &mut TrainableModel,
) -> Result<Progress, EngineError> {
    let trainer = read_trainer_file(dir, fingerprint)?;
    if adapter == AdapterType::Lora {
        load_weights(&dir.join(WEIGHTS_DIR).join(ADAPTER_WEIGHTS_NAME), model)?;
    }
    load_optimizer(dir, trainer.optimizer_step, model)?;
    Ok(trainer.progress)
}

/// As [`resume`], for the model that wrote the checkpoint: whatever it trains is read back.
pub(super) fn go_back(
    dir: &Path,
    adapter: AdapterType,
    fingerprint: &str,
    model: &mut TrainableModel,
) -> Result<Progress, EngineError> {
    let trainer = read_trainer_file(dir, fingerprint)?;
    let file = match adapter {
        AdapterType::Lora => ADAPTER_WEIGHTS_NAME,
        AdapterType::Full => WEIGHTS,
    };
    load_weights(&dir.join(WEIGHTS_DIR).join(file), model)?;
    load_optimizer(dir, trainer.optimizer_step, model)?;
    model.clear_gradients();
    Ok(trainer.progress)
}

fn load_weights(path: &Path, model: &mut TrainableModel) -> Result<(), EngineError> {
    model.load_exported_tensors(safetensors::read(path)?)
}

fn load_optimizer(dir: &Path, step: u64, model: &mut TrainableModel) -> Result<(), EngineError> {
    let tensors = safetensors::read(&dir.join(STATE_DIR).join(OPTIMIZER_FILE))?;
    model.load_optimizer_tensors(OptimizerState { step, tensors })
}

/// Reads `trainer.json`, which must be of this run.
fn read_trainer_file(dir: &Path, fingerprint: &str) -> Result<TrainerFile, EngineError> {
    let trainer = TrainerFile::read(dir)?;
    if trainer.fingerprint != fingerprint {
        return Err(TrainerFile::broken(
            dir,
            "the checkpoint belongs to other hyperparameters, another base model or other files: \
             going on from it would be neither job"
                .to_owned(),
        ));
    }
    Ok(trainer)
}

/// The directory to load a model from: the base model's, the checkpoint's own where a whole model is
/// trained, or one that is made here where every weight trains from an adapter on.
pub(super) fn start_dir(request: &TrainRequest) -> Result<PathBuf, EngineError> {
    let kind = request.spec.hyperparameters.adapter.kind;
    match (&request.resume_from, &request.start_from, kind) {
        (Some(checkpoint), _, AdapterType::Full) => Ok(checkpoint.join(WEIGHTS_DIR)),
        (None, Some(adapter), AdapterType::Full) => {
            let dir = request.output_dir.join(MERGED_DIR);
            export_merged(&request.base_model_dir, adapter, &dir)?;
            Ok(dir)
        }
        _ => Ok(request.base_model_dir.clone()),
    }
}

/// Removes what [`start_dir`] has made, once it is loaded.
pub(super) fn remove_merged(request: &TrainRequest) -> Result<(), EngineError> {
    let dir = request.output_dir.join(MERGED_DIR);
    if dir.exists() { fs::remove_dir_all(&dir).map_err(EngineError::io(&dir)) } else { Ok(()) }
}

/// Syncs every file under `dir`, and the directories themselves.
fn sync_tree(dir: &Path) -> Result<(), EngineError> {
    for entry in fs::read_dir(dir).map_err(EngineError::io(dir))? {
        let path = entry.map_err(EngineError::io(dir))?.path();
        if path.is_dir() { sync_tree(&path)? } else { sync(&path)? }
    }
    sync(dir)
}

fn sync(path: &Path) -> Result<(), EngineError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(EngineError::io(path))
}
