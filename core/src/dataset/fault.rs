//! What is wrong with a row, in words for the one who made the file.

use crate::errors::{ApiError, ErrorCode};
use serde_json::Value;
use std::{fmt, io};

/// The longest part of the client's own text that a message quotes.
const MAX_QUOTED: usize = 60;

/// A broken rule: the key path with what stands there and what must, and a way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    /// The key path or the column, where the rule is about one.
    pub(super) place: Option<String>,
    pub(super) rule: String,
    pub(super) hint: String,
    /// Whether all is well with the row but that there is nothing in it to learn.
    pub(super) trains_nothing: bool,
}

impl Fault {
    /// `rule` is a sentence that reads on from "Line 7: "; `hint` is one of its own.
    pub(super) fn new(rule: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { place: None, rule: rule.into(), hint: hint.into(), trains_nothing: false }
    }

    /// A rule about what stands at a key path or in a column; its sentence begins with that.
    pub(super) fn at_key(
        place: impl fmt::Display,
        rule: impl fmt::Display,
        hint: impl Into<String>,
    ) -> Self {
        let place = place.to_string();
        Self { rule: format!("{place} {rule}"), place: Some(place), ..Self::new("", hint) }
    }

    /// The same for a row with nothing to learn in it.
    pub(super) fn trains_nothing(self) -> Self {
        Self { trains_nothing: true, ..self }
    }

    /// The fault of one row; the next one can be read.
    pub(super) fn at(self, line: usize) -> ReadFault {
        ReadFault::Row { line, fault: self }
    }

    /// The fault of a file that has no rows to be told apart from here on.
    pub(super) fn ends_file_at(self, line: usize) -> ReadFault {
        ReadFault::Rest { line, fault: self }
    }

    /// The error that a client reads, about line `line` of the file that `param` names.
    pub(super) fn into_api_error(self, line: usize, param: &str) -> ApiError {
        ApiError::new(
            ErrorCode::InvalidFileFormat,
            format!("Line {line}: {} {}", self.rule, self.hint),
        )
        .with_param(param)
    }
}

/// Why the next row cannot be had.
#[derive(Debug)]
pub(super) enum ReadFault {
    /// It breaks a rule.
    Row { line: usize, fault: Fault },
    /// From here on rows cannot be told apart.
    Rest { line: usize, fault: Fault },
    /// The file's bytes did not come.
    Io(io::Error),
}

impl From<io::Error> for ReadFault {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl ReadFault {
    pub(super) fn into_api_error(self, param: &str) -> ApiError {
        match self {
            Self::Row { line, fault } | Self::Rest { line, fault } => {
                fault.into_api_error(line, param)
            }
            Self::Io(error) => ApiError::new(
                ErrorCode::Internal,
                format!("The {} could not be read: {error}", param.replace('_', " ")),
            )
            .with_param(param),
        }
    }
}

/// A JSON value as a message quotes it: on one line, and cut where it is long.
pub(super) fn quoted(value: &Value) -> String {
    shortened(&value.to_string())
}

/// Text cut at a length that a message can carry.
pub(super) fn shortened(text: &str) -> String {
    match text.char_indices().nth(MAX_QUOTED) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_becomes_one_message_with_line_rule_and_hint() {
        let error = Fault::new("messages is empty.", "Write at least one message.")
            .into_api_error(7, "training_file");
        assert_eq!(error.code, ErrorCode::InvalidFileFormat);
        assert_eq!(error.param.as_deref(), Some("training_file"));
        assert_eq!(error.message, "Line 7: messages is empty. Write at least one message.");
    }

    #[test]
    fn a_long_value_is_quoted_in_part() {
        let text = quoted(&Value::from("ä".repeat(1000)));
        assert_eq!(text.chars().count(), MAX_QUOTED + 1);
    }
}
