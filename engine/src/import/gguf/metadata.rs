//! Typed reads of a GGUF file's metadata; every error names the file and the key.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::file::Value;
use crate::error::EngineError;

/// The key-value part of a GGUF file.
pub(super) struct Metadata {
    source: PathBuf,
    values: HashMap<String, Value>,
}

impl Metadata {
    pub(super) fn new(source: &Path, values: HashMap<String, Value>) -> Self {
        Self { source: source.to_owned(), values }
    }

    /// An error about this file.
    pub(super) fn error(&self, problem: impl std::fmt::Display) -> EngineError {
        EngineError::Model(format!("{}: {problem}", self.source.display()))
    }

    /// The value of `key`, which must be there.
    fn required<T>(&self, key: &str, value: Option<T>) -> Result<T, EngineError> {
        value.ok_or_else(|| self.error(format_args!("the GGUF metadata has no {key}")))
    }

    fn read<'a, T>(
        &'a self,
        key: &str,
        kind: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, EngineError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(value) => convert(value)
                .map(Some)
                .ok_or_else(|| self.error(format_args!("the GGUF metadata's {key} is not {kind}"))),
        }
    }

    /// A text, where there is one.
    pub(super) fn find_text(&self, key: &str) -> Result<Option<&str>, EngineError> {
        self.read(key, "a text", |value| match value {
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A text that must be there.
    pub(super) fn text(&self, key: &str) -> Result<&str, EngineError> {
        self.required(key, self.find_text(key)?)
    }

    /// A whole number from 0, where there is one.
    pub(super) fn find_number(&self, key: &str) -> Result<Option<u64>, EngineError> {
        self.read(key, "a whole number", |value| match value {
            Value::Integer(number) => u64::try_from(*number).ok(),
            _ => None,
        })
    }

    /// A whole number that must be there.
    pub(super) fn number(&self, key: &str) -> Result<u64, EngineError> {
        self.required(key, self.find_number(key)?)
    }

    /// A real number, where there is one. An f32 is read as the decimal that it is written as:
    /// 1e-5 and not 9.999999747378752e-6, as the model's author meant it.
    pub(super) fn find_real(&self, key: &str) -> Result<Option<f64>, EngineError> {
        self.read(key, "a real number", |value| match value {
            Value::F32(number) => number.to_string().parse().ok(),
            Value::F64(number) => Some(*number),
            _ => None,
        })
    }

    /// A real number that must be there.
    pub(super) fn real(&self, key: &str) -> Result<f64, EngineError> {
        self.required(key, self.find_real(key)?)
    }

    /// A truth value, where there is one.
    pub(super) fn find_flag(&self, key: &str) -> Result<Option<bool>, EngineError> {
        self.read(key, "true or false", |value| match value {
            Value::Flag(flag) => Some(*flag),
            _ => None,
        })
    }

    /// Which of so many layers are meant: each is told by itself, or all but every so many are, where 0
    /// leaves none out; `usual` where nothing is said.
    pub(super) fn pattern(
        &self,
        key: &str,
        layers: usize,
        usual: usize,
    ) -> Result<Vec<bool>, EngineError> {
        let of_period = |period: usize| -> Vec<bool> {
            (1..=layers).map(|layer| period == 0 || !layer.is_multiple_of(period)).collect()
        };
        let kind = format!("a period or a list of {layers}, one for each layer");
        let said = self.read(key, &kind, |value| match value {
            Value::Integer(period) => usize::try_from(*period).ok().map(of_period),
            Value::Flags(list) if list.len() == layers => Some(list.clone()),
            Value::Integers(list) if list.len() == layers => {
                Some(list.iter().map(|&number| number != 0).collect())
            }
            _ => None,
        })?;
        Ok(said.unwrap_or_else(|| of_period(usual)))
    }

    /// A list of texts that must be there.
    pub(super) fn texts(&self, key: &str) -> Result<&[String], EngineError> {
        let list = self.read(key, "a list of texts", |value| match value {
            Value::Texts(list) => Some(list.as_slice()),
            _ => None,
        })?;
        self.required(key, list)
    }

    /// A list of whole numbers that must be there.
    pub(super) fn integers(&self, key: &str) -> Result<&[i64], EngineError> {
        let list = self.read(key, "a list of whole numbers", |value| match value {
            Value::Integers(list) => Some(list.as_slice()),
            _ => None,
        })?;
        self.required(key, list)
    }

    /// A list of f32 that must be there.
    pub(super) fn reals(&self, key: &str) -> Result<&[f32], EngineError> {
        let list = self.read(key, "a list of 32-bit reals", |value| match value {
            Value::Reals(list) => Some(list.as_slice()),
            _ => None,
        })?;
        self.required(key, list)
    }
}
