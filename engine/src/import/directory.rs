//! A Hugging Face model directory: checked, and carried over file by file.

use std::fs::File;
use std::path::Path;

use tunesmith_core::dataset::ChatTokenizer;
use tunesmith_core::weights::FloatType;

use crate::error::EngineError;
use crate::export::safetensors::read_header;
use crate::model_directory::{
    README, WEIGHTS_INDEX, carry_over, carry_over_all_but_weights, carry_over_present, weight_files,
};
use crate::models::config::ModelConfig;

/// Checks the model in `source` and links or copies its files to `out_dir`.
pub(super) fn import(source: &Path, out_dir: &Path) -> Result<(), EngineError> {
    ModelConfig::read(source)?;
    check_tokenizer(source)?;
    let weights = weight_files(source)?;
    for name in &weights {
        check_weights(&source.join(name))?;
    }
    for name in weights {
        carry_over(&source.join(&name), &out_dir.join(&name))?;
    }
    carry_over_present(source, out_dir, &[WEIGHTS_INDEX, README])?;
    carry_over_all_but_weights(source, out_dir)
}

/// Fails unless `dir` has a tokenizer with a chat template.
pub(super) fn check_tokenizer(dir: &Path) -> Result<(), EngineError> {
    let refuse = |problem: &dyn std::fmt::Display| {
        EngineError::Model(format!("{}: {problem}", dir.display()))
    };
    let tokenizer = ChatTokenizer::from_dir(dir).map_err(|error| refuse(&error))?;
    if tokenizer.has_chat_template() {
        Ok(())
    } else {
        Err(refuse(
            &"there is no chat template, without which conversations cannot be written as text: \
              import an instruct model, or put a chat_template.jinja beside its tokenizer.json",
        ))
    }
}

/// Fails unless the file is a whole safetensors file of floating-point tensors.
fn check_weights(path: &Path) -> Result<(), EngineError> {
    let refuse = |problem: String| EngineError::Model(format!("{}: {problem}", path.display()));
    let mut file = File::open(path).map_err(EngineError::io(path))?;
    let size = file.metadata().map_err(EngineError::io(path))?.len();
    let (header, metadata) = read_header(path, &mut file)?;
    for (name, info) in metadata.tensors() {
        if FloatType::parse(&info.dtype.to_string()).is_none() {
            return Err(refuse(format!(
                "tensor {name} is {}: only F32, BF16 and F16 can be trained",
                info.dtype
            )));
        }
    }
    let end = (header.len() + metadata.data_len()) as u64;
    if end != size {
        return Err(refuse(format!(
            "the file has {size} bytes where its header speaks of {end}: fetch it again"
        )));
    }
    Ok(())
}
