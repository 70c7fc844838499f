//! A Hugging Face model directory: checked, and carried over file by file.

use std::fs::File;
use std::path::Path;

use tunesmith_core::dataset::ChatTokenizer;
use tunesmith_core::weights::FloatType;

use crate::error::EngineError;
use crate::export::safetensors::read_header;
use crate::model_directory::{
    README, SENTENCEPIECE_MODEL, TOKENIZER, WEIGHTS_INDEX, carry_over, carry_over_all_but_weights,
    carry_over_present, weight_files,
};
use crate::models::config::ModelConfig;

/// Checks the model in `source` and links or copies its files to `out_dir`.
pub(super) fn import(source: &Path, out_dir: &Path) -> Result<(), EngineError> {
    ModelConfig::read(source)?;
    read_tokenizer(source)?;
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

/// Reads the tokenizer in `dir`. One without a chat template is a base model's, which takes rows of
/// plain text.
pub(super) fn read_tokenizer(dir: &Path) -> Result<ChatTokenizer, EngineError> {
    if !dir.join(TOKENIZER).is_file() && dir.join(SENTENCEPIECE_MODEL).is_file() {
        return Err(EngineError::Model(format!(
            "{}: the tokenizer is {SENTENCEPIECE_MODEL} alone, and {TOKENIZER} is what is read: \
             write it with Hugging Face transformers \
             (AutoTokenizer.from_pretrained(dir).save_pretrained(dir)), or import the model's GGUF",
            dir.display()
        )));
    }
    ChatTokenizer::from_dir(dir)
        .map_err(|error| EngineError::Model(format!("{}: {error}", dir.display())))
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
