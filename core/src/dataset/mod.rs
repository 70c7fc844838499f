//! Uploaded files → validated rows → chat template → tokens with loss weights.
//!
//! [`RowReader`] reads a file row by row, whatever shape people gave it, and refuses a row that
//! breaks a rule by its line, its key path, the rule and a way out. [`ChatTokenizer`] is a base
//! model's tokenizer and chat template. [`tokenize_row`], for long texts [`tokenize_windows`] and
//! for preference pairs [`tokenize_pair`] bring the two together.

mod chunked;
mod conversation;
mod detokenize;
mod fault;
mod file_report;
mod format;
mod json_values;
mod known_chunks;
mod known_rows;
mod lines;
mod message;
mod plain_text;
mod pre_tokenizer;
mod preference;
#[cfg(test)]
mod properties;
mod protect;
mod reader;
mod row;
mod shown_row;
mod source;
mod table;
mod template;
#[cfg(test)]
mod testing;
mod tojson;
mod tokenize;
mod tokenize_chat;
mod tokenize_pair;
mod tokenizer;
mod tokenizer_files;
mod windows;

pub use conversation::{parse_conversation, parse_tools};
pub use detokenize::TextStream;
pub use file_report::{
    Bin, FileReport, MAX_PROBLEMS, NamedRepair, Problem, ProblemKind, ReportError, ReportOptions,
    TokenCounts,
};
pub use format::{Container, Format, Repair, Report, Shape};
pub use message::{Message, Role};
pub use plain_text::is_text_name;
pub use reader::{
    MAX_ROW_BYTES, ReadOptions, RowReader, Rows, check_training_examples, read_rows, read_rows_for,
    read_rows_with,
};
pub use row::{Example, Row};
pub use shown_row::{ShownRow, ShownToken};
pub use tokenize::{TokenizeOptions, TokenizedRow, tokenize_row};
pub use tokenize_pair::{TokenizedAnswer, TokenizedPair, tokenize_pair};
pub use tokenizer::{ChatTokenizer, TokenizerError};
pub(crate) use tokenizer_files::{chat_templates, named_special_tokens};
pub use windows::tokenize_windows;
