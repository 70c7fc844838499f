//! GGUF, the file format of llama.cpp: one file with metadata, tokenizer and quantised tensors.

mod file;
mod metadata;
mod model;
mod quantisation;
mod rope;
mod tensors;
mod tokenizer;

#[cfg(test)]
mod round_trip;
#[cfg(test)]
mod tests;

use std::path::Path;

use serde_json::Value;

use crate::error::EngineError;
use crate::model_directory::{CONFIG, GENERATION_CONFIG, TOKENIZER, WEIGHTS, write_json};
use crate::models::config::ModelConfig;
use file::GgufFile;
use metadata::Metadata;
use model::Model;
use tensors::Plan;
use tokenizer::Tokenizer;

/// Writes the model in the GGUF file `source` into `out_dir` as a Hugging Face directory.
pub(super) fn import(source: &Path, out_dir: &Path) -> Result<(), EngineError> {
    // Everything that may be refused is refused before the big file is written.
    let conversion = Conversion::read(source)?;
    ModelConfig::parse(&conversion.config.to_string())
        .map_err(|error| conversion.metadata.error(error))?;
    conversion.write(out_dir)
}

/// A GGUF as a Hugging Face directory that is not yet written.
struct Conversion {
    metadata: Metadata,
    file: GgufFile,
    plan: Plan,
    tokenizer: Tokenizer,
    /// `config.json`.
    config: Value,
}

impl Conversion {
    fn read(source: &Path) -> Result<Self, EngineError> {
        let (file, values) = GgufFile::open(source)?;
        let metadata = Metadata::new(source, values);
        let model = Model::read(&metadata, &file)?;
        let plan = Plan::new(&metadata, &model, &file)?;
        let tokenizer = tokenizer::rebuild(&metadata, &model)?;
        let config = model.config_json(&tokenizer.special, plan.tied_head());
        Ok(Self { metadata, file, plan, tokenizer, config })
    }

    fn write(&self, out_dir: &Path) -> Result<(), EngineError> {
        let tokenizer = &self.tokenizer;
        for (name, json) in [
            (CONFIG, &self.config),
            (GENERATION_CONFIG, &tokenizer.special.generation_config()),
            (TOKENIZER, &tokenizer.tokenizer),
            ("tokenizer_config.json", &tokenizer.tokenizer_config),
            ("special_tokens_map.json", &tokenizer.special_tokens_map),
        ] {
            write_json(&out_dir.join(name), json)?;
        }
        self.plan.write(&self.file, &out_dir.join(WEIGHTS))
    }
}
