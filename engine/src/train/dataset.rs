//! The job's files → tokenised rows, exactly as their validation read them.

use std::fs::File;
use std::path::Path;

use tunesmith_core::dataset::{
    ChatTokenizer, ReadOptions, Row, TokenizeOptions, TokenizedPair, TokenizedRow, is_text_name,
    read_rows_with, tokenize_pair, tokenize_windows,
};
use tunesmith_core::errors::ApiError;
use tunesmith_core::protocol::TrainRequest;

use crate::data::sampler;
use crate::error::EngineError;

/// The request's parameters, by which an error names the file.
const TRAINING_FILE: &str = "training_file";
const VALIDATION_FILE: &str = "validation_file";

/// All rows of a job.
#[derive(Debug)]
pub(super) struct Dataset<R> {
    /// Rows that train, in file order.
    pub(super) train: Vec<R>,
    /// Rows of the validation file, and after them those held out of the training file.
    pub(super) valid: Vec<R>,
}

impl Dataset<TokenizedRow> {
    pub(super) fn load(request: &TrainRequest) -> Result<Self, EngineError> {
        Self::load_with(request, tokenize_windows)
    }

    /// Rows that were cut at the sequence length.
    pub(super) fn truncated(&self) -> usize {
        self.train.iter().chain(&self.valid).filter(|row| row.truncated).count()
    }
}

impl Dataset<TokenizedPair> {
    pub(super) fn load_pairs(request: &TrainRequest) -> Result<Self, EngineError> {
        Self::load_with(request, |tokenizer, row, options, param| {
            tokenize_pair(tokenizer, row, options, param).map(|pair| vec![pair])
        })
    }
}

/// Turns one row of a file into what trains of it: more than one where a text is long.
type Tokenize<R> = fn(&ChatTokenizer, &Row, &TokenizeOptions, &str) -> Result<Vec<R>, ApiError>;

impl<R> Dataset<R> {
    /// The greatest of what `tokens` says of each row; 0 without rows.
    pub(super) fn longest(&self, tokens: impl Fn(&R) -> usize) -> usize {
        self.train.iter().chain(&self.valid).map(tokens).max().unwrap_or(0)
    }

    fn load_with(request: &TrainRequest, tokenize: Tokenize<R>) -> Result<Self, EngineError> {
        let hyperparameters = &request.spec.hyperparameters;
        let tokenizer = ChatTokenizer::from_dir(&request.base_model_dir).map_err(|error| {
            EngineError::Model(format!("{}: {error}", request.base_model_dir.display()))
        })?;
        let options = TokenizeOptions::from(hyperparameters);
        // With how many rows each text gave.
        let load = |path: &Path, param: &str| -> Result<(Vec<R>, Vec<usize>), EngineError> {
            let file = File::open(path).map_err(EngineError::io(path))?;
            let is_text =
                path.file_name().is_some_and(|name| is_text_name(&name.to_string_lossy()));
            let read = ReadOptions { method: Some(hyperparameters.method), is_text, param };
            let rows = read_rows_with(file, &read)?;
            let mut tokenized = Vec::with_capacity(rows.rows.len());
            let mut parts = Vec::with_capacity(rows.rows.len());
            for row in &rows.rows {
                let part = tokenize(&tokenizer, row, &options, param)?;
                parts.push(part.len());
                tokenized.extend(part);
            }
            Ok((tokenized, parts))
        };
        let (rows, parts) = load(&request.training_file, TRAINING_FILE)?;
        let mut valid = match &request.validation_file {
            Some(file) => load(file, VALIDATION_FILE)?.0,
            None => Vec::new(),
        };
        let held_out = hyperparameters.held_out_rows(rows.len());
        let (_, held_out) = sampler::split(&parts, held_out, request.spec.seed);
        let mut train = Vec::with_capacity(rows.len() - held_out.len());
        for (number, row) in rows.into_iter().enumerate() {
            let part =
                if held_out.binary_search(&number).is_ok() { &mut valid } else { &mut train };
            part.push(row);
        }
        Ok(Self { train, valid })
    }
}
