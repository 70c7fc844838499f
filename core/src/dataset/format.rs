//! What a file was read as.

use crate::hyperparameters::Method;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;

/// How the rows lie in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Container {
    /// One JSON object a line.
    JsonLines,
    /// JSON objects one after another, each over several lines.
    JsonObjects,
    /// One JSON array of objects.
    JsonArray,
    /// Comma-separated values under a header.
    Csv,
    /// Text without any structure, which is learned whole.
    PlainText,
}

impl fmt::Display for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::JsonLines => "JSON Lines",
            Self::JsonObjects => "pretty-printed JSON",
            Self::JsonArray => "a JSON array",
            Self::Csv => "CSV",
            Self::PlainText => "plain text",
        })
    }
}

/// What a row says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// `{"messages": […]}`.
    Chat,
    /// `{"prompt": …, "completion": …}`.
    PromptCompletion,
    /// `{"text": …}`.
    Text,
    /// `{"instruction": …, "input": …, "output": …}`.
    Alpaca,
    /// `{"conversations": [{"from": …, "value": …}]}`.
    ShareGpt,
    /// `{"input": {"messages": […]}, "preferred_output": […], "non_preferred_output": […]}`.
    Preference,
    /// `{"prompt": […], "chosen": […], "rejected": […]}` of messages.
    ChosenRejected,
    /// `{"prompt": …, "chosen": …, "rejected": …}` of texts.
    ChosenRejectedText,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Chat => "chat",
            Self::PromptCompletion => "prompt/completion",
            Self::Text => "text",
            Self::Alpaca => "alpaca",
            Self::ShareGpt => "sharegpt",
            Self::Preference => "preference",
            Self::ChosenRejected => "chosen/rejected message",
            Self::ChosenRejectedText => "prompt/chosen/rejected text",
        })
    }
}

/// Container and shape together; every row of a file has the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format {
    /// How the rows lie in the file.
    pub container: Container,
    /// What a row says.
    pub shape: Shape,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.container {
            Container::PlainText => self.container.fmt(f),
            container => write!(f, "{container} of {} rows", self.shape),
        }
    }
}

/// Something unusual that was read for what it means.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Repair {
    /// The file begins with a UTF-8 byte-order mark.
    ByteOrderMark,
    /// Lines end with CR LF.
    CrLf,
    /// There are lines without text.
    BlankLines,
    /// The last line has no end.
    NoFinalNewline,
    /// A tool call's arguments are an object in place of its text.
    ArgumentsObject,
    /// A message that is not the assistant's has a weight, which means nothing.
    WeightIgnored,
    /// A message of a preference pair has a weight, which means nothing.
    PairWeight,
    /// Both answers of a pair are the same.
    EqualAnswers,
    /// A column of a table has no name.
    UnnamedColumn,
    /// Rows have keys that mean nothing to their shape.
    IgnoredKeys,
    /// A long text was read as several.
    TextInPieces,
}

impl Shape {
    /// The keys that a row of this shape is read from.
    pub(super) const fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Chat => &["messages", "tools", "parallel_tool_calls"],
            Self::PromptCompletion => &["prompt", "completion"],
            Self::Text => &["text"],
            Self::Alpaca => &["instruction", "input", "output", "system"],
            Self::ShareGpt => &["conversations"],
            Self::Preference => &["input", "preferred_output", "non_preferred_output"],
            Self::ChosenRejected => &["prompt", "chosen", "rejected", "tools"],
            Self::ChosenRejectedText => &["prompt", "chosen", "rejected"],
        }
    }

    /// What learns from rows of this shape.
    #[must_use]
    pub const fn method(self) -> Method {
        match self {
            Self::Chat | Self::PromptCompletion | Self::Text | Self::Alpaca | Self::ShareGpt => {
                Method::Supervised
            }
            Self::Preference | Self::ChosenRejected | Self::ChosenRejectedText => Method::Dpo,
        }
    }
}

impl fmt::Display for Repair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ByteOrderMark => "a byte-order mark was skipped",
            Self::CrLf => "lines end with CR LF",
            Self::BlankLines => "blank lines were skipped",
            Self::NoFinalNewline => "the last line has no newline",
            Self::ArgumentsObject => "tool-call arguments are objects in place of text",
            Self::WeightIgnored => "weights on messages that are not the assistant's are ignored",
            Self::PairWeight => "weights in preference pairs are ignored",
            Self::EqualAnswers => "some pairs have the same answer twice and teach no preference",
            Self::UnnamedColumn => "a column without a name was ignored",
            Self::IgnoredKeys => "keys that mean nothing here were ignored",
            Self::TextInPieces => "long text was read as several texts, parted between paragraphs",
        })
    }
}

/// What is known of a file once it is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// What it was read as.
    pub format: Format,
    /// Rows in it.
    pub rows: usize,
    /// Rows that are an exact copy of an earlier one; they train like any other.
    pub duplicates: usize,
    /// Everything unusual about it.
    pub repairs: BTreeSet<Repair>,
    /// The first few keys that mean nothing to its shape.
    pub ignored_keys: BTreeSet<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rows read as {}", self.rows, self.format)?;
        for repair in &self.repairs {
            write!(f, "; {repair}")?;
            if *repair == Repair::IgnoredKeys {
                let keys: Vec<_> = self.ignored_keys.iter().map(String::as_str).collect();
                write!(f, ": {}", keys.join(", "))?;
            }
        }
        if self.duplicates > 0 {
            write!(f, "; {} rows are copies of earlier ones", self.duplicates)?;
        }
        Ok(())
    }
}
