//! Weights in the formats of other programs: PEFT adapters and Hugging Face directories.

mod merged;
mod readme;
pub(crate) mod safetensors;

use std::fs;
use std::path::Path;

use tunesmith_core::hyperparameters::{AdapterConfig, AdapterType};
use tunesmith_core::job::TrainSpec;
use tunesmith_core::metrics::BestStep;
use tunesmith_core::weights::{
    ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, FloatType, PeftConfig, set_dtype,
};

pub use merged::export_merged;

use crate::error::EngineError;
use crate::model_directory::{
    CONFIG, README, WEIGHTS, carry_over_all_but_weights, carry_over_tokenizer, read_json,
    write_json,
};
use crate::models::config::ModelConfig;
use crate::parameter::NamedTensor;

/// What the README beside the weights tells of the job.
#[derive(Debug, Clone, Copy)]
pub struct JobFacts<'a> {
    /// The job's id.
    pub job: &'a str,
    /// What was trained.
    pub spec: &'a TrainSpec,
    /// Steps done.
    pub step: u64,
    /// Steps of the whole job.
    pub total_steps: u64,
    /// Tokens seen in training.
    pub trained_tokens: u64,
    /// Loss on the validation rows before the first step.
    pub initial_valid_loss: Option<f64>,
    /// The step with the lowest validation loss.
    pub best: Option<BestStep>,
}

/// Writes what was trained into the directory `dir`: a PEFT adapter for LoRA, a whole Hugging
/// Face model for full fine-tuning, each with the tokenizer's files and a README.
///
/// # Errors
/// [`EngineError::Io`] for a file that cannot be read or written, [`EngineError::Model`] for a base
/// model that is none.
pub fn write_weights(
    base_dir: &Path,
    adapter: &AdapterConfig,
    tensors: Vec<NamedTensor>,
    facts: &JobFacts<'_>,
    dir: &Path,
) -> Result<(), EngineError> {
    match adapter.kind {
        AdapterType::Lora => {
            let path = dir.join(ADAPTER_CONFIG_NAME);
            let base = ModelConfig::read(base_dir)?;
            let layers = base.num_hidden_layers;
            let config = PeftConfig {
                base_model: Some(facts.spec.model.clone()),
                adapter: adapter.exported(),
                fused_projections: base.fused_projections,
                layers: (adapter.trainable_layers > 0)
                    .then(|| adapter.first_trained_layer(layers)..layers),
            };
            let json = config.to_json().map_err(|error| EngineError::Adapter(error.to_string()))?;
            fs::write(&path, json).map_err(EngineError::io(&path))?;
            safetensors::write(&dir.join(ADAPTER_WEIGHTS_NAME), tensors)?;
            carry_over_tokenizer(base_dir, dir)?;
        }
        AdapterType::Full => {
            safetensors::write(&dir.join(WEIGHTS), tensors)?;
            carry_over_all_but_weights(base_dir, dir)?;
            say_f32(&dir.join(CONFIG))?;
        }
    }
    let path = dir.join(README);
    fs::write(&path, readme::readme(facts)).map_err(EngineError::io(&path))
}

/// Has the `config.json` at `path` say that the weights are f32, as they are written.
fn say_f32(path: &Path) -> Result<(), EngineError> {
    let mut config = read_json(path)?;
    if set_dtype(&mut config, FloatType::F32) {
        // It may be a link to the base model's.
        fs::remove_file(path).map_err(EngineError::io(path))?;
        write_json(path, &config)?;
    }
    Ok(())
}
