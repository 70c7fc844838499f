//! What lies in a Hugging Face model directory, and how such files are carried over.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde_json::Value;

use crate::error::EngineError;

/// The architecture.
pub(crate) const CONFIG: &str = "config.json";
/// One file with all weights.
pub(crate) const WEIGHTS: &str = "model.safetensors";
/// Names the files of weights that lie in several.
pub(crate) const WEIGHTS_INDEX: &str = "model.safetensors.index.json";
/// A text for people.
pub(crate) const README: &str = "README.md";
/// How to sample.
pub(crate) const GENERATION_CONFIG: &str = "generation_config.json";

/// The tokenizer as it is read.
pub(crate) const TOKENIZER: &str = "tokenizer.json";
/// The tokenizer of old models, from which the other is made.
pub(crate) const SENTENCEPIECE_MODEL: &str = "tokenizer.model";

/// Every file that a tokenizer may consist of.
pub(crate) const TOKENIZER_FILES: [&str; 8] = [
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    SENTENCEPIECE_MODEL,
];

/// The terms of the base model, which go where its weights go.
const LICENSE: &str = "LICENSE";

/// Names of the files that hold the weights.
pub(crate) fn weight_files(dir: &Path) -> Result<BTreeSet<String>, EngineError> {
    if dir.join(WEIGHTS).is_file() {
        return Ok(BTreeSet::from([WEIGHTS.to_owned()]));
    }
    let index = dir.join(WEIGHTS_INDEX);
    if !index.is_file() {
        return Err(EngineError::Model(format!(
            "{}: neither {WEIGHTS} nor {WEIGHTS_INDEX} is there: weights of another format (.bin, \
             .pth) have to be saved as safetensors first",
            dir.display()
        )));
    }
    let json = read_json(&index)?;
    let malformed = |problem: &str| EngineError::Model(format!("{}: {problem}", index.display()));
    let map = json["weight_map"].as_object().ok_or_else(|| malformed("there is no weight_map"))?;
    map.values()
        .map(|name| match name.as_str() {
            // A name with a path in it could point out of the directory.
            Some(name) if Path::new(name).file_name() == Some(name.as_ref()) => Ok(name.to_owned()),
            _ => Err(malformed(&format!("weight_map has {name}, which is no file name"))),
        })
        .collect()
}

/// Carries over the files of the tokenizer that are there.
pub(crate) fn carry_over_tokenizer(from: &Path, to: &Path) -> Result<(), EngineError> {
    carry_over_present(from, to, &TOKENIZER_FILES)
}

/// Carries over everything that is there but the weights and the README.
pub(crate) fn carry_over_all_but_weights(from: &Path, to: &Path) -> Result<(), EngineError> {
    carry_over_present(from, to, &[CONFIG, GENERATION_CONFIG, LICENSE])?;
    carry_over_tokenizer(from, to)
}

/// Carries over those of `names` that are there.
pub(crate) fn carry_over_present(
    from: &Path,
    to: &Path,
    names: &[&str],
) -> Result<(), EngineError> {
    for name in names {
        let file = from.join(name);
        if file.is_file() {
            carry_over(&file, &to.join(name))?;
        }
    }
    Ok(())
}

/// Hard-links a file, or copies it to where that cannot be, such as another disk. Neither may be
/// written to afterwards.
pub(crate) fn carry_over(from: &Path, to: &Path) -> Result<(), EngineError> {
    // The hub's cache holds links; a link to a link would dangle once the cache is emptied.
    let from = from.canonicalize().map_err(EngineError::io(from))?;
    match fs::hard_link(&from, to) {
        Ok(()) => Ok(()),
        // What is there may be a link to `from` itself, and copying would empty both.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Err(EngineError::io(to)(error)),
        Err(_) => fs::copy(&from, to).map(drop).map_err(EngineError::io(to)),
    }
}

/// A file of JSON.
pub(crate) fn read_json(path: &Path) -> Result<Value, EngineError> {
    let text = fs::read(path).map_err(EngineError::io(path))?;
    serde_json::from_slice(&text)
        .map_err(|error| EngineError::Model(format!("{}: {error}", path.display())))
}

/// Writes a file of JSON as people like to read it.
pub(crate) fn write_json(path: &Path, value: &Value) -> Result<(), EngineError> {
    let mut text = serde_json::to_string_pretty(value)
        .map_err(|error| EngineError::Model(format!("{}: {error}", path.display())))?;
    text.push('\n');
    fs::write(path, text).map_err(EngineError::io(path))
}
