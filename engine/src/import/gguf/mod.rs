//! GGUF, the file format of llama.cpp: one file with metadata, tokenizer and quantised tensors.

mod metadata;
mod model;
mod tensors;
mod tokenizer;

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use candle_core::quantized::gguf_file::Content;

use crate::error::EngineError;
use crate::model_directory::{CONFIG, GENERATION_CONFIG, WEIGHTS, write_json};
use metadata::Metadata;

/// Writes the model in the GGUF file `source` into `out_dir` as a Hugging Face directory.
pub(super) fn import(source: &Path, out_dir: &Path) -> Result<(), EngineError> {
    let file = File::open(source).map_err(EngineError::io(source))?;
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut content = Content::read(&mut reader).map_err(|error| {
        EngineError::Model(format!("{}: not a readable GGUF file: {error}", source.display()))
    })?;
    let metadata = Metadata::new(source, std::mem::take(&mut content.metadata));
    let model = model::Llama::read(&metadata, &content)?;
    // Everything that may be refused is refused before the big file is written.
    let plan = tensors::Plan::new(&metadata, &model, &content)?;
    let rope_scaling = tensors::rope_scaling(&metadata, &model, &content, &mut reader)?;
    let tokenizer = tokenizer::rebuild(&metadata, model.context_length, model.vocabulary)?;

    for (name, json) in [
        (CONFIG, &model.config_json(&tokenizer.special, plan.tied_head(), &rope_scaling)),
        (GENERATION_CONFIG, &tokenizer.special.generation_config()),
        ("tokenizer.json", &tokenizer.tokenizer),
        ("tokenizer_config.json", &tokenizer.tokenizer_config),
        ("special_tokens_map.json", &tokenizer.special_tokens_map),
    ] {
        write_json(&out_dir.join(name), json)?;
    }
    plan.write(&metadata, &content, &mut reader, &out_dir.join(WEIGHTS))
}
