//! Any source of a base model → a Hugging Face directory that this engine can train.

mod directory;
mod gguf;

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::error::EngineError;
use crate::model_directory::{CONFIG, read_json};
use crate::models::config::ModelConfig;

/// A base model as it lies in the directory that [`import_source`] filled.
#[derive(Debug, Clone, PartialEq)]
pub struct Imported {
    /// What to call the model when nobody says: the source's own name without its quantisation.
    pub name: String,
    /// Tokens that the model can attend to.
    pub context_length: u64,
    /// `config.json`.
    pub config: Value,
    /// Whether conversations can be written as text. A base model has no chat template, and takes
    /// prompt/completion and text rows only.
    pub has_chat_template: bool,
    /// Names of the directory's files, sorted.
    pub files: Vec<String>,
}

/// Turns `source`, a Hugging Face directory or a `.gguf` file, into a Hugging Face directory at
/// `out_dir`, which is empty, or made where it is missing.
///
/// A directory is checked and its files are hard-linked, or copied where that cannot be. A GGUF
/// file is dequantised to f32, one tensor at a time, and its tokenizer is rebuilt.
///
/// # Errors
/// [`EngineError::Model`] when the source is not a model that can be trained: the message names
/// the file, and the field or tensor at fault. [`EngineError::Io`] when a file cannot be read or
/// written.
pub fn import_source(source: &Path, out_dir: &Path) -> Result<Imported, EngineError> {
    fs::create_dir_all(out_dir).map_err(EngineError::io(out_dir))?;
    // Files of an earlier import may be links to someone's own model: nothing is written over.
    let mut entries = fs::read_dir(out_dir).map_err(EngineError::io(out_dir))?;
    if entries.next().is_some() {
        return Err(EngineError::Model(format!(
            "{}: the directory is not empty: import into a new one",
            out_dir.display()
        )));
    }
    let is_gguf =
        source.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    if source.is_dir() {
        directory::import(source, out_dir)?;
    } else if is_gguf {
        gguf::import(source, out_dir)?;
    } else {
        fs::metadata(source).map_err(EngineError::io(source))?;
        return Err(EngineError::Model(format!(
            "{}: neither a directory nor a .gguf file: give a Hugging Face model directory with \
             config.json, tokenizer.json and model.safetensors, or a .gguf file",
            source.display()
        )));
    }
    describe(source, out_dir)
}

/// Checks what lies in `dir` once more, as training will see it.
fn describe(source: &Path, dir: &Path) -> Result<Imported, EngineError> {
    let has_chat_template = directory::read_tokenizer(dir)?.has_chat_template();
    let config = read_json(&dir.join(CONFIG))?;
    let context_length = ModelConfig::read(dir)?.max_position_embeddings as u64;
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(EngineError::io(dir))? {
        let entry = entry.map_err(EngineError::io(dir))?;
        files.push(entry.file_name().to_string_lossy().into_owned());
    }
    files.sort();
    let name = model_name(source);
    Ok(Imported { name, context_length, config, has_chat_template, files })
}

/// The file's or directory's name, for a GGUF without extension and quantisation.
fn model_name(source: &Path) -> String {
    let absolute = source.canonicalize().unwrap_or_else(|_| source.to_path_buf());
    if absolute.is_dir() {
        return absolute.file_name().unwrap_or_default().to_string_lossy().into_owned();
    }
    let stem = absolute.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    match stem.rsplit_once(['.', '-']) {
        Some((name, tag)) if !name.is_empty() && is_quantisation(tag) => name.to_owned(),
        _ => stem,
    }
}

/// Whether `tag` names a GGUF storage type: `Q4_1`, `Q4_K_M`, `IQ2_XS`, `F16`, `BF16`.
fn is_quantisation(tag: &str) -> bool {
    let tag = tag.to_ascii_uppercase();
    let starts_with_digit =
        |rest: &str| rest.chars().next().is_some_and(|first| first.is_ascii_digit());
    ["F16", "F32", "BF16"].contains(&tag.as_str())
        || tag.strip_prefix("IQ").or_else(|| tag.strip_prefix('Q')).is_some_and(starts_with_digit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gguf_is_named_without_its_quantisation() {
        for (file, name) in [
            ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
            ("Llama-3.2-1B-Q4_K_M.gguf", "Llama-3.2-1B"),
            ("tiny.bf16.gguf", "tiny"),
            ("model-quick.gguf", "model-quick"),
            ("q8_0.gguf", "q8_0"),
        ] {
            assert_eq!(model_name(Path::new(file)), name);
        }
    }

    #[test]
    fn a_source_of_another_kind_is_refused_with_the_choices() {
        let dir = tempfile::tempdir().expect("temp dir");
        let source = dir.path().join("pytorch_model.bin");
        fs::write(&source, b"PK").expect("write");
        let error = import_source(&source, &dir.path().join("out")).expect_err("not a model");
        assert!(error.to_string().contains("pytorch_model.bin: neither"), "{error}");
        let error = import_source(&dir.path().join("none"), &dir.path().join("out"))
            .expect_err("not there");
        assert!(matches!(error, EngineError::Io { .. }), "{error}");
    }
}
