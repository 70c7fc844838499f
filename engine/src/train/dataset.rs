//! The job's files → tokenised rows, exactly as their validation read them.

use std::fs::File;
use std::path::Path;

use tunesmith_core::dataset::{
    ChatTokenizer, TokenizeOptions, TokenizedRow, read_rows, tokenize_row,
};
use tunesmith_core::protocol::TrainRequest;

use crate::data::sampler;
use crate::error::EngineError;

/// The request's parameters, by which an error names the file.
const TRAINING_FILE: &str = "training_file";
const VALIDATION_FILE: &str = "validation_file";

/// All rows of a job.
#[derive(Debug)]
pub(super) struct Dataset {
    /// Rows that train, in file order.
    pub(super) train: Vec<TokenizedRow>,
    /// Rows of the validation file, and after them those held out of the training file.
    pub(super) valid: Vec<TokenizedRow>,
}

impl Dataset {
    pub(super) fn load(request: &TrainRequest) -> Result<Self, EngineError> {
        let hyperparameters = &request.spec.hyperparameters;
        let tokenizer = ChatTokenizer::from_dir(&request.base_model_dir).map_err(|error| {
            EngineError::Model(format!("{}: {error}", request.base_model_dir.display()))
        })?;
        let options = TokenizeOptions::from(hyperparameters);
        let rows = load_file(&request.training_file, TRAINING_FILE, &tokenizer, &options)?;
        let mut valid = match &request.validation_file {
            Some(file) => load_file(file, VALIDATION_FILE, &tokenizer, &options)?,
            None => Vec::new(),
        };
        let held_out = hyperparameters.held_out_rows(rows.len());
        let (_, held_out) = sampler::split(rows.len(), held_out, request.spec.seed);
        let mut train = Vec::with_capacity(rows.len() - held_out.len());
        for (number, row) in rows.into_iter().enumerate() {
            let part =
                if held_out.binary_search(&number).is_ok() { &mut valid } else { &mut train };
            part.push(row);
        }
        Ok(Self { train, valid })
    }

    /// Tokens of the longest row.
    pub(super) fn longest_row(&self) -> usize {
        self.train.iter().chain(&self.valid).map(|row| row.ids.len()).max().unwrap_or(0)
    }

    /// Rows that were cut at the sequence length.
    pub(super) fn truncated(&self) -> usize {
        self.train.iter().chain(&self.valid).filter(|row| row.truncated).count()
    }
}

fn load_file(
    path: &Path,
    param: &str,
    tokenizer: &ChatTokenizer,
    options: &TokenizeOptions,
) -> Result<Vec<TokenizedRow>, EngineError> {
    let file = File::open(path).map_err(EngineError::io(path))?;
    let rows = read_rows(file, param)?;
    let tokenized = rows.rows.iter().map(|row| tokenize_row(tokenizer, row, options, param));
    Ok(tokenized.collect::<Result<_, _>>()?)
}
