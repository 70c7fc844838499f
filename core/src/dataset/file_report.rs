//! What is known of an uploaded file before anything trains on it.
//!
//! Where a job stops at the first row that breaks a rule, a report reads on and tells of them all.
//! It is made in one pass over the file's bytes, and what it remembers does not grow with the file.

use super::fault::{Fault, ReadFault};
use super::format::{Container, Format, Repair, Shape};
use super::reader::{ReadOptions, RowReader};
use super::row::{Example, Row};
use super::shown_row::ShownRow;
use super::tokenize::{TokenizeOptions, Tokens, join, parts_of};
use super::tokenize_pair::{answer_of, answers_of};
use super::tokenizer::ChatTokenizer;
use crate::hyperparameters::Method;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead};

/// Problems that a report lists; the others are counted.
pub const MAX_PROBLEMS: usize = 100;
/// Rules that a report counts one by one.
const MAX_KINDS: usize = 100;

/// How a report is made.
#[derive(Clone, Copy)]
pub struct ReportOptions<'a> {
    /// How the file is read.
    pub read: ReadOptions<'a>,
    /// What counts tokens, and how rows become them; without it no token is counted.
    pub tokenizer: Option<(&'a ChatTokenizer, TokenizeOptions)>,
    /// How many of the first rows are shown token by token.
    pub shown_rows: usize,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The file's bytes did not come.
    #[error("the file could not be read: {0}")]
    Io(#[from] io::Error),
    /// Nobody waits for it any more.
    #[error("the report is no longer wanted")]
    Stopped,
}

/// What a file is, what is wrong with it, and what would train.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct FileReport {
    /// How the rows lie in the file; nothing where not even that can be told.
    pub container: Option<Container>,
    /// What the rows say; nothing where none of them is in order.
    pub shape: Option<Shape>,
    /// What learns from such rows.
    pub method: Option<Method>,
    /// Both in words.
    pub read_as: Option<String>,
    /// Rows in the file, those with problems included.
    pub rows: usize,
    /// What would train: rows in order, and of a long text each window of the context's length.
    pub examples: usize,
    /// Rows with a problem.
    pub faulty_rows: usize,
    /// Rows in which there is nothing to learn, or nothing within the context. They are among the
    /// faulty ones.
    pub rows_without_targets: usize,
    /// Rows that are cut at the context's length.
    pub truncated_rows: usize,
    /// Rows that are an exact copy of an earlier one.
    pub duplicates: usize,
    /// Whether every copy was told; in a file of very many different rows only those of the first
    /// ones are.
    pub duplicates_are_exact: bool,
    /// The tokens of all rows; nothing where there is no model to count them for.
    pub tokens: Option<TokenCounts>,
    /// How many problems there are.
    pub problem_count: usize,
    /// The first 100 of them.
    pub problems: Vec<Problem>,
    /// All of them, by what is wrong.
    pub problem_kinds: Vec<ProblemKind>,
    /// What is unusual about the file and was read for what it means.
    pub repairs: Vec<NamedRepair>,
    /// The first few keys that mean nothing to the rows' shape.
    pub ignored_keys: BTreeSet<String>,
    /// The first rows, token by token, where they were asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub first_rows: Vec<ShownRow>,
}

/// The tokens of a file's rows. Of a preference pair both answers count, each with its prompt; of a
/// conversation that a template writes in several ways, each sequence.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TokenCounts {
    /// The length at which rows are cut.
    pub max_seq_length: usize,
    /// All, before any cut.
    pub total: u64,
    /// Those of an epoch: after the cut, and for a long text with the tokens that two windows share.
    pub kept: u64,
    /// Those that the model learns to write, after the cut.
    pub trained: u64,
    /// Those of the longest row, before any cut.
    pub longest: usize,
    /// The line on which that row begins.
    pub longest_line: usize,
    /// How many rows are how long, before any cut.
    pub histogram: Vec<Bin>,
}

/// Rows of about one length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Bin {
    /// The most tokens of such a row; more than half of this.
    pub up_to: u64,
    /// How many there are.
    pub rows: usize,
}

/// A rule that a row breaks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Problem {
    /// Where the row begins, from 1.
    pub line: usize,
    /// The key path or the column, where the rule is about one.
    pub place: Option<String>,
    /// What stands there and what must.
    pub rule: String,
    /// A way out.
    pub hint: String,
}

/// How often a rule is broken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProblemKind {
    /// The key path without the numbers of list entries.
    pub place: Option<String>,
    /// The way out, by which rules are told apart.
    pub hint: String,
    /// How many rows break it.
    pub rows: usize,
    /// The first of them.
    pub first_line: usize,
}

/// Something unusual that was read for what it means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NamedRepair {
    /// Which.
    pub name: Repair,
    /// In words.
    pub meaning: String,
}

impl From<Repair> for NamedRepair {
    fn from(name: Repair) -> Self {
        Self { name, meaning: name.to_string() }
    }
}

impl FileReport {
    /// Reads `reader` to its end, asking `go_on` before each row.
    ///
    /// # Errors
    /// When the bytes do not come, or `go_on` says no. What is wrong with the file is no error.
    pub fn make(
        reader: impl BufRead,
        options: &ReportOptions<'_>,
        mut go_on: impl FnMut() -> bool,
    ) -> Result<Self, ReportError> {
        let mut maker = Maker::new(options);
        let mut rows = match RowReader::try_open(reader, &options.read) {
            Ok(rows) => rows,
            Err(fault) => {
                maker.take_fault(fault)?;
                return Ok(maker.report);
            }
        };
        loop {
            if !go_on() {
                return Err(ReportError::Stopped);
            }
            match rows.next_row() {
                Ok(None) => break,
                Ok(Some(row)) => maker.take_row(&row),
                Err(fault) => {
                    let is_last = matches!(fault, ReadFault::Rest { .. });
                    maker.take_fault(fault)?;
                    if is_last {
                        break;
                    }
                }
            }
        }
        Ok(maker.finish(&rows))
    }

    /// Whether every row is in order.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.problem_count == 0
    }

    /// What is wrong, in a sentence or two; `None` where nothing is.
    #[must_use]
    pub fn complaint(&self) -> Option<String> {
        let Problem { line, rule, hint, .. } = self.problems.first()?;
        let more = match self.problem_count - 1 {
            0 => String::new(),
            more => format!(" There are {more} more problems in {} rows.", self.rows),
        };
        Some(format!("Line {line}: {rule} {hint}{more}"))
    }
}

/// A report that is being made.
struct Maker<'a> {
    options: &'a ReportOptions<'a>,
    report: FileReport,
    /// By place and hint: rows, and the first line.
    kinds: BTreeMap<(Option<String>, String), (usize, usize)>,
    /// Rows of up to 2ⁿ tokens.
    histogram: Vec<usize>,
}

impl<'a> Maker<'a> {
    fn new(options: &'a ReportOptions<'a>) -> Self {
        let tokens = options.tokenizer.map(|(_, options)| TokenCounts {
            max_seq_length: options.max_seq_length,
            ..TokenCounts::default()
        });
        let report = FileReport {
            container: None,
            shape: None,
            method: None,
            read_as: None,
            rows: 0,
            examples: 0,
            faulty_rows: 0,
            rows_without_targets: 0,
            truncated_rows: 0,
            duplicates: 0,
            duplicates_are_exact: true,
            tokens,
            problem_count: 0,
            problems: Vec::new(),
            problem_kinds: Vec::new(),
            repairs: Vec::new(),
            ignored_keys: BTreeSet::new(),
            first_rows: Vec::new(),
        };
        Self { options, report, kinds: BTreeMap::new(), histogram: Vec::new() }
    }

    fn take_fault(&mut self, fault: ReadFault) -> io::Result<()> {
        match fault {
            ReadFault::Io(error) => return Err(error),
            ReadFault::Row { line, fault } => {
                self.report.rows += 1;
                self.report.faulty_rows += 1;
                self.add_problem(line, fault);
            }
            ReadFault::Rest { line, fault } => self.add_problem(line, fault),
        }
        Ok(())
    }

    fn add_problem(&mut self, line: usize, fault: Fault) {
        let Fault { place, rule, hint, trains_nothing } = fault;
        self.report.problem_count += 1;
        self.report.rows_without_targets += usize::from(trains_nothing);
        let kind = (place.as_deref().map(without_numbers), hint.clone());
        if self.kinds.len() < MAX_KINDS || self.kinds.contains_key(&kind) {
            self.kinds.entry(kind).or_insert((0, line)).0 += 1;
        }
        if self.report.problems.len() < MAX_PROBLEMS {
            self.report.problems.push(Problem { line, place, rule, hint });
        }
    }

    fn take_row(&mut self, row: &Row) {
        self.report.rows += 1;
        match self.examples_of(row) {
            Ok(examples) => self.report.examples += examples,
            Err(fault) => {
                self.report.faulty_rows += 1;
                self.add_problem(row.line, fault);
            }
        }
    }

    /// Counts a row's tokens; gives the examples that it makes.
    fn examples_of(&mut self, row: &Row) -> Result<usize, Fault> {
        let Some((tokenizer, options)) = self.options.tokenizer else { return Ok(1) };
        match &row.example {
            Example::ChatPair { .. } | Example::TextPair { .. } => {
                let answers = answers_of(tokenizer, row, &options)?;
                self.show(row, &answers, &["preferred", "non_preferred"]);
                let length = answers.iter().map(|tokens| tokens.ids.len()).sum();
                let [chosen, rejected] = answers;
                let chosen = answer_of(chosen, "preferred", &options);
                let rejected = answer_of(rejected, "non-preferred", &options);
                self.count(row.line, length);
                let (chosen, rejected) = (chosen?, rejected?);
                self.keep(chosen.ids.len() + rejected.ids.len());
                self.report.truncated_rows += usize::from(chosen.truncated || rejected.truncated);
                self.count_trained(chosen.completion.len() + rejected.completion.len());
                Ok(1)
            }
            Example::Text { .. } => {
                let parts = parts_of(tokenizer, row, &options)?;
                self.show(row, &parts, &[]);
                let length = parts.iter().map(|part| part.ids.len()).sum();
                self.count(row.line, length);
                // Every token but the first is a target of some window.
                self.count_trained(length.saturating_sub(1));
                let windows = windows(length, options.max_seq_length);
                self.keep(length + windows - 1);
                Ok(windows)
            }
            Example::Chat { .. } | Example::PromptCompletion { .. } => {
                let parts = parts_of(tokenizer, row, &options)?;
                self.show(row, &parts, &[]);
                self.count(row.line, parts.iter().map(|part| part.ids.len()).sum());
                let is_cut = |part: &Tokens| part.ids.len() > options.max_seq_length;
                self.report.truncated_rows += usize::from(parts.iter().any(is_cut));
                self.keep(join(row.line, &parts, &options)?.ids.len());
                self.count_trained(parts.iter().map(|part| part.targets(&options)).sum());
                Ok(1)
            }
        }
    }

    /// `answers` names the parts of a pair; a row's sequences have no names.
    fn show(&mut self, row: &Row, parts: &[Tokens], answers: &[&'static str]) {
        let Some((tokenizer, options)) = self.options.tokenizer else { return };
        if self.report.rows > self.options.shown_rows {
            return;
        }
        for (index, tokens) in parts.iter().enumerate() {
            let answer = answers.get(index).copied();
            let row = ShownRow::new(tokenizer, row, tokens, &options, answer);
            self.report.first_rows.push(row);
        }
    }

    fn count(&mut self, line: usize, length: usize) {
        let Some(counts) = &mut self.report.tokens else { return };
        counts.total += length as u64;
        if length > counts.longest {
            (counts.longest, counts.longest_line) = (length, line);
        }
        let bin = length.next_power_of_two().trailing_zeros() as usize;
        if self.histogram.len() <= bin {
            self.histogram.resize(bin + 1, 0);
        }
        self.histogram[bin] += 1;
    }

    fn keep(&mut self, tokens: usize) {
        if let Some(counts) = &mut self.report.tokens {
            counts.kept += tokens as u64;
        }
    }

    fn count_trained(&mut self, tokens: usize) {
        if let Some(counts) = &mut self.report.tokens {
            counts.trained += tokens as u64;
        }
    }

    fn finish<R: BufRead>(self, rows: &RowReader<R>) -> FileReport {
        let Self { mut report, kinds, histogram, .. } = self;
        report.container = Some(rows.container());
        report.repairs = rows.repairs().iter().copied().map(NamedRepair::from).collect();
        report.duplicates_are_exact = rows.remembers_all();
        if let Some(read) = rows.report() {
            let Format { shape, .. } = read.format;
            report.shape = Some(shape);
            report.method = Some(shape.method());
            report.read_as = Some(read.format.to_string());
            report.duplicates = read.duplicates;
            report.ignored_keys = read.ignored_keys;
        }
        if let Some(counts) = &mut report.tokens {
            let bins = histogram.into_iter().enumerate().skip_while(|(_, rows)| *rows == 0);
            counts.histogram = bins.map(|(bin, rows)| Bin { up_to: 1 << bin, rows }).collect();
        }
        let kinds = kinds.into_iter().map(|((place, hint), (rows, first_line))| ProblemKind {
            place,
            hint,
            rows,
            first_line,
        });
        report.problem_kinds = kinds.collect();
        report.problem_kinds.sort_by_key(|kind| std::cmp::Reverse(kind.rows));
        report
    }
}

/// How many windows of `max_seq_length` tokens a text of `length` tokens trains in; each but the
/// first begins with the last token of the one before it.
fn windows(length: usize, max_seq_length: usize) -> usize {
    length.saturating_sub(1).div_ceil(max_seq_length.max(2) - 1).max(1)
}

/// `messages[3].role` as `messages[].role`.
fn without_numbers(path: &str) -> String {
    let mut inside = false;
    path.chars()
        .filter(|&c| {
            inside = c == '[' || inside && c.is_ascii_digit();
            !(inside && c.is_ascii_digit())
        })
        .collect()
}

#[cfg(test)]
mod tests;
