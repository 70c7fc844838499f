//! One answer of a model to a conversation, greedily: to look at what training did.

use std::fs;
use std::path::Path;

use tunesmith_core::dataset::{ChatTokenizer, Message};
use tunesmith_core::hyperparameters::AdapterConfig;
use tunesmith_core::weights::{ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, PeftConfig};

use crate::device::Device;
use crate::error::EngineError;
use crate::export::safetensors;
use crate::model::TrainableModel;

/// The assistant's next message after `messages`, a list of chat messages, without the token that
/// ends it. `adapter_dir` is a PEFT adapter of the model in `base_dir`.
///
/// # Errors
/// [`EngineError::Model`] for a directory that is not a model, [`EngineError::Adapter`] for an
/// adapter of another model, [`EngineError::Data`] for messages that the chat template refuses.
pub fn answer(
    base_dir: &Path,
    adapter_dir: Option<&Path>,
    messages: &[Message],
    max_new_tokens: usize,
    device: &Device,
) -> Result<String, EngineError> {
    let tokenizer = ChatTokenizer::from_dir(base_dir)
        .map_err(|error| EngineError::Model(format!("{}: {error}", base_dir.display())))?;
    let prompt = tokenizer
        .encode_chat(messages, None, true)
        .map_err(|error| EngineError::Data(error.to_string()))?;
    let model = load(base_dir, adapter_dir, device)?;
    let stop = tokenizer.eos_ids();
    let mut ids = model.generate_greedy(&prompt, max_new_tokens, stop)?;
    if ids.last().is_some_and(|last| stop.contains(last)) {
        ids.pop();
    }
    tokenizer.decode(&ids).map_err(|error| EngineError::Data(error.to_string()))
}

/// The model in `base_dir`, with a PEFT adapter of it where one is given.
///
/// # Errors
/// [`EngineError::Model`] for a directory that is not a model, [`EngineError::Adapter`] for an
/// adapter of another model, [`EngineError::Io`] for a file that cannot be read.
pub fn load(
    base_dir: &Path,
    adapter_dir: Option<&Path>,
    device: &Device,
) -> Result<TrainableModel, EngineError> {
    let Some(adapter_dir) = adapter_dir else {
        return TrainableModel::load(base_dir, &AdapterConfig::full(), 0, device);
    };
    let path = adapter_dir.join(ADAPTER_CONFIG_NAME);
    let text = fs::read(&path).map_err(EngineError::io(&path))?;
    let adapter = PeftConfig::parse(&text)
        .map_err(|error| EngineError::Adapter(format!("{}: {error}", path.display())))?
        .adapter;
    let mut model = TrainableModel::load(base_dir, &adapter, 0, device)?;
    model.load_trainable_tensors(safetensors::read(&adapter_dir.join(ADAPTER_WEIGHTS_NAME))?)?;
    Ok(model)
}
