//! Reads a training file row by row, whatever its container.

use super::fault::{Fault, ReadFault, quoted, shortened};
use super::format::{Container, Format, Repair, Report, Shape};
use super::json_values::Nesting;
use super::known_rows::KnownRows;
use super::preference::{PAIR_KEYS, parse_pair};
use super::row::{Example, Row, parse_row};
use super::source::{self, Source};
use crate::errors::{ApiError, ErrorCode};
use crate::hyperparameters::{MIN_EXAMPLES, Method};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};
use std::io::{BufRead, BufReader, Read};

/// The longest row that is read.
pub const MAX_ROW_BYTES: usize = 16 << 20;
/// Keys that a report names as ignored.
const MAX_IGNORED_KEYS: usize = 20;

/// How a file is to be read.
#[derive(Debug, Clone, Copy)]
pub struct ReadOptions<'a> {
    /// What its rows are to teach; `None` where each row shows that itself.
    pub method: Option<Method>,
    /// Whether its name says that it is plain text, [`is_text_name`](super::is_text_name).
    pub is_text: bool,
    /// The job's parameter that names it, for error messages.
    pub param: &'a str,
}

impl<'a> ReadOptions<'a> {
    /// For the rows that `method` learns from.
    #[must_use]
    pub fn new(method: Method, param: &'a str) -> Self {
        Self { method: Some(method), is_text: false, param }
    }
}

/// All rows of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Rows {
    /// In the file's order; never empty.
    pub rows: Vec<Row>,
    /// What the file was read as.
    pub report: Report,
}

/// Reads a whole file; `param` is the job's parameter that names it, for error messages.
///
/// # Errors
/// `invalid_file_format` for the first row that breaks a rule, with its line.
pub fn read_rows(reader: impl Read, param: &str) -> Result<Rows, ApiError> {
    read_rows_for(Method::Supervised, reader, param)
}

/// As [`read_rows`], the rows being those that `method` learns from.
///
/// # Errors
/// As [`read_rows`]; a row that belongs to another method breaks a rule.
pub fn read_rows_for(method: Method, reader: impl Read, param: &str) -> Result<Rows, ApiError> {
    read_rows_with(reader, &ReadOptions::new(method, param))
}

/// As [`read_rows`], in the way that `options` say.
///
/// # Errors
/// As [`read_rows`].
pub fn read_rows_with(reader: impl Read, options: &ReadOptions<'_>) -> Result<Rows, ApiError> {
    let mut reader = RowReader::open(BufReader::new(reader), options)?;
    let rows = reader.by_ref().collect::<Result<Vec<_>, _>>()?;
    let report = reader.report().ok_or_else(|| empty_file().into_api_error(1, options.param))?;
    Ok(Rows { rows, report })
}

/// Refuses a training file with too few examples to learn from.
///
/// # Errors
/// `invalid_n_examples`, param `training_file`.
pub fn check_training_examples(examples: usize) -> Result<(), ApiError> {
    if examples >= MIN_EXAMPLES {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::InvalidNExamples,
        format!(
            "Training file has {examples} example(s), but must have at least {MIN_EXAMPLES} \
             examples"
        ),
    )
    .with_param("training_file"))
}

/// A row's fields before they are checked.
struct RawRow {
    line: usize,
    /// Equal for copies.
    hash: u64,
    fields: Map<String, Value>,
}

/// An iterator over a file's rows that needs no more memory than its longest row. It ends after
/// its first error; a file without rows is one.
pub struct RowReader<R> {
    source: Source<R>,
    method: Option<Method>,
    param: String,
    container: Container,
    shape: Option<Shape>,
    rows: usize,
    faulty_rows: usize,
    duplicates: usize,
    seen: KnownRows,
    repairs: BTreeSet<Repair>,
    ignored_keys: BTreeSet<String>,
    done: bool,
}

impl<R: BufRead> RowReader<R> {
    /// Looks at the file's first bytes to tell how its rows lie in it.
    ///
    /// # Errors
    /// When the bytes do not come, or the first line is longer than [`MAX_ROW_BYTES`].
    pub fn new(reader: R, param: &str) -> Result<Self, ApiError> {
        Self::for_method(Method::Supervised, reader, param)
    }

    /// As [`RowReader::new`], for the rows that `method` learns from.
    ///
    /// # Errors
    /// As [`RowReader::new`].
    pub fn for_method(method: Method, reader: R, param: &str) -> Result<Self, ApiError> {
        Self::open(reader, &ReadOptions::new(method, param))
    }

    /// As [`RowReader::new`], in the way that `options` say.
    ///
    /// # Errors
    /// As [`RowReader::new`].
    pub fn open(reader: R, options: &ReadOptions<'_>) -> Result<Self, ApiError> {
        Self::try_open(reader, options).map_err(|fault| fault.into_api_error(options.param))
    }

    pub(super) fn try_open(reader: R, options: &ReadOptions<'_>) -> Result<Self, ReadFault> {
        let mut repairs = BTreeSet::new();
        let (container, source) = source::open(reader, options.is_text, &mut repairs)?;
        Ok(Self {
            source,
            method: options.method,
            param: options.param.to_owned(),
            container,
            shape: None,
            rows: 0,
            faulty_rows: 0,
            duplicates: 0,
            seen: KnownRows::default(),
            repairs,
            ignored_keys: BTreeSet::new(),
            done: false,
        })
    }

    /// How the rows lie in the file.
    pub(super) const fn container(&self) -> Container {
        self.container
    }

    /// Everything unusual so far.
    pub(super) const fn repairs(&self) -> &BTreeSet<Repair> {
        &self.repairs
    }

    /// Whether every copy was told.
    pub(super) fn remembers_all(&self) -> bool {
        self.seen.remembers_all()
    }

    /// What is known of the file so far; `None` before its first row.
    #[must_use]
    pub fn report(&self) -> Option<Report> {
        Some(Report {
            format: Format { container: self.container, shape: self.shape? },
            rows: self.rows,
            duplicates: self.duplicates,
            repairs: self.repairs.clone(),
            ignored_keys: self.ignored_keys.clone(),
        })
    }

    fn next_raw(&mut self) -> Result<Option<RawRow>, ReadFault> {
        let text = match &mut self.source {
            Source::Lines(lines) => lines.next_line(&mut self.repairs)?,
            Source::Values(values) => values.next_value()?,
            Source::Table(table) => {
                return Ok(table.next_record(&mut self.repairs)?.map(|(line, fields)| RawRow {
                    line,
                    hash: hash(Value::Object(fields.clone()).to_string().as_bytes()),
                    fields,
                }));
            }
            Source::Text(text) => {
                return Ok(text.next_piece(&mut self.repairs)?.map(|(line, text)| RawRow {
                    line,
                    hash: hash(text.as_bytes()),
                    fields: Map::from_iter([("text".to_owned(), Value::String(text))]),
                }));
            }
        };
        let Some((line, text)) = text else { return Ok(None) };
        let fields = parse_object(&text).map_err(|fault| fault.at(line))?;
        Ok(Some(RawRow { line, hash: hash(&text), fields }))
    }

    /// The next row. After the fault of a row, the one behind it is the next.
    pub(super) fn next_row(&mut self) -> Result<Option<Row>, ReadFault> {
        let next = self.read_row();
        self.faulty_rows += usize::from(matches!(next, Err(ReadFault::Row { .. })));
        next
    }

    fn read_row(&mut self) -> Result<Option<Row>, ReadFault> {
        let Some(raw) = self.next_raw()? else {
            let is_empty = self.rows == 0 && self.faulty_rows == 0;
            return if is_empty { Err(empty_file().ends_file_at(1)) } else { Ok(None) };
        };
        let line = raw.line;
        let (shape, example) = self.parse(&raw.fields).map_err(|fault| fault.at(line))?;
        let first = *self.shape.get_or_insert(shape);
        if shape != first {
            return Err(Fault::new(
                format!("the row is a {shape} row, but the rows before it are {first} rows."),
                "Give all rows of a file one shape.",
            )
            .at(line));
        }
        self.rows += 1;
        self.duplicates += usize::from(self.seen.is_copy(raw.hash));
        self.note_ignored_keys(shape, &raw.fields);
        Ok(Some(Row { line, example }))
    }

    fn parse(&mut self, fields: &Map<String, Value>) -> Result<(Shape, Example), Fault> {
        let method = self.method.unwrap_or_else(|| {
            let is_pair = PAIR_KEYS.into_iter().any(|key| fields.contains_key(key));
            if is_pair { Method::Dpo } else { Method::Supervised }
        });
        match method {
            Method::Supervised => parse_row(fields, &mut self.repairs),
            Method::Dpo => parse_pair(fields, &mut self.repairs),
        }
    }

    fn note_ignored_keys(&mut self, shape: Shape, fields: &Map<String, Value>) {
        for (key, _) in fields.iter().filter(|(key, _)| !shape.keys().contains(&key.as_str())) {
            self.repairs.insert(Repair::IgnoredKeys);
            if self.ignored_keys.len() < MAX_IGNORED_KEYS && !self.ignored_keys.contains(key) {
                self.ignored_keys.insert(shortened(key));
            }
        }
    }
}

impl<R: BufRead> Iterator for RowReader<R> {
    type Item = Result<Row, ApiError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let next = self.next_row();
        self.done = !matches!(next, Ok(Some(_)));
        next.map_err(|fault| fault.into_api_error(&self.param)).transpose()
    }
}

fn hash(bytes: &[u8]) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(bytes)
}

fn empty_file() -> Fault {
    Fault::new("the file has no rows.", "Upload a file with one example a line.")
}

/// The object that a row's text is.
pub(super) fn parse_object(text: &[u8]) -> Result<Map<String, Value>, Fault> {
    let text = std::str::from_utf8(text).map_err(|error| {
        Fault::new(
            format!("the row is not UTF-8, from its byte {} on.", error.valid_up_to() + 1),
            "Save the file as UTF-8.",
        )
    })?;
    Nesting::check(text.as_bytes())?;
    match serde_json::from_str(text) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(other) => Err(Fault::new(
            format!("the row is {}, but must be a JSON object.", quoted(&other)),
            "Write {\"messages\": […]}.",
        )),
        Err(error) => Err(not_json(&error)),
    }
}

fn not_json(error: &serde_json::Error) -> Fault {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let what = text.strip_suffix(&place).unwrap_or(&text);
    let place = match error.line() {
        0 | 1 => format!("column {}", error.column()),
        lines => format!("column {}, {} lines further on", error.column(), lines - 1),
    };
    Fault::new(
        format!("the row is not JSON: {what} at {place}."),
        "Write rows with a JSON library, such as json.dumps in Python, one a line.",
    )
}

#[cfg(test)]
mod tests {
    use super::super::message::{Message, Role};
    use super::super::row::Example;
    use super::*;

    const CHAT: &str = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;

    fn read(bytes: impl AsRef<[u8]>) -> Result<Rows, ApiError> {
        read_rows(bytes.as_ref(), "training_file")
    }

    fn refusal(bytes: impl AsRef<[u8]>) -> String {
        let error = read(bytes).expect_err("refused");
        assert_eq!(error.code, ErrorCode::InvalidFileFormat);
        assert_eq!(error.param.as_deref(), Some("training_file"));
        error.message
    }

    fn lines(rows: &Rows) -> Vec<usize> {
        rows.rows.iter().map(|row| row.line).collect()
    }

    fn format(container: Container, shape: Shape) -> Format {
        Format { container, shape }
    }

    #[test]
    fn oddities_of_json_lines_are_read_and_reported() {
        let text = format!("\u{feff}{CHAT}\r\n\r\n  \r\n{CHAT}\n{CHAT}");
        let rows = read(text).expect("rows");
        assert_eq!(rows.report.format, format(Container::JsonLines, Shape::Chat));
        assert_eq!(lines(&rows), [1, 4, 5]);
        let repairs: Vec<_> = rows.report.repairs.iter().copied().collect();
        assert_eq!(
            repairs,
            [Repair::ByteOrderMark, Repair::CrLf, Repair::BlankLines, Repair::NoFinalNewline]
        );
        assert_eq!(rows.report.duplicates, 2);
        assert_eq!(
            rows.report.to_string(),
            "3 rows read as JSON Lines of chat rows; a byte-order mark was skipped; lines end \
             with CR LF; blank lines were skipped; the last line has no newline; 2 rows are \
             copies of earlier ones"
        );
    }

    #[test]
    fn a_plain_file_needs_no_repairs() {
        let rows = read(format!("{CHAT}\n")).expect("rows");
        assert!(rows.report.repairs.is_empty());
        assert_eq!(rows.report.to_string(), "1 rows read as JSON Lines of chat rows");
    }

    #[test]
    fn pretty_printed_json_is_read_value_by_value() {
        let value: Value = serde_json::from_str(CHAT).expect("JSON");
        let pretty = serde_json::to_string_pretty(&value).expect("JSON");
        let rows = read(format!("\n{pretty}\n{pretty}\n")).expect("rows");
        assert_eq!(rows.report.format, format(Container::JsonObjects, Shape::Chat));
        assert_eq!(lines(&rows), [2, 2 + pretty.lines().count()]);
        assert_eq!(rows.rows[0].example, read(CHAT).expect("rows").rows[0].example);
    }

    #[test]
    fn a_json_array_is_read_value_by_value() {
        let rows = read(format!("\u{feff}[{CHAT},\n{CHAT}\n]")).expect("rows");
        assert_eq!(rows.report.format, format(Container::JsonArray, Shape::Chat));
        assert_eq!(lines(&rows), [1, 2]);
        assert!(refusal(format!("[{CHAT},\n7]")).starts_with("Line 2: the row is 7, but must be"));
    }

    #[test]
    fn csv_with_a_mark_and_an_index_column_is_read() {
        let text = "\u{feff},Prompt,completion\r\n0,\"a, b\",\"c\nd\"\r\n\r\n1,e,f\r\n2,g,h";
        let rows = read(text).expect("rows");
        assert_eq!(rows.report.format, format(Container::Csv, Shape::PromptCompletion));
        let repairs: Vec<_> = rows.report.repairs.iter().copied().collect();
        assert_eq!(
            repairs,
            [Repair::ByteOrderMark, Repair::CrLf, Repair::BlankLines, Repair::UnnamedColumn]
        );
        assert_eq!(lines(&rows), [2, 5, 6]);
        assert_eq!(lines(&read(text.replace('\r', "")).expect("rows")), [2, 5, 6]);
        assert_eq!(
            rows.rows[0].example,
            Example::PromptCompletion { prompt: "a, b".to_owned(), completion: "c\nd".to_owned() }
        );
    }

    #[test]
    fn csv_of_alpaca_and_text_rows_is_read() {
        let rows = read("instruction,input,output\nAdd,1 2,3\n").expect("rows");
        assert_eq!(rows.report.format, format(Container::Csv, Shape::Alpaca));
        let messages =
            vec![Message::new(Role::User, "Add\n\n1 2"), Message::new(Role::Assistant, "3")];
        assert_eq!(rows.rows[0].example, Example::Chat { messages, tools: None });
        assert_eq!(read("text\nabc\n").expect("rows").report.format.shape, Shape::Text);
    }

    #[test]
    fn broken_csv_is_refused_with_its_line() {
        assert!(
            refusal("\nprompt,completion\na,b\nc\n")
                .starts_with("Line 4: the record has 1 columns, but the header has 2.")
        );
        assert!(refusal("prompt,completion\na,\n").starts_with("Line 2: completion is empty"));
        assert!(refusal(b"text\n\xff\n").starts_with("Line 2: column 1 is not UTF-8."));
        assert!(refusal("hello world\n").starts_with(
            "Line 1: the file begins with \"hello world\", which is neither JSON nor a CSV header"
        ));
        let endless = format!("text\n\"{}", "a".repeat(MAX_ROW_BYTES + 10_000));
        assert!(refusal(endless).starts_with("Line 2: the row is longer than 16 MiB."));
    }

    #[test]
    fn a_broken_line_is_refused_with_its_number() {
        let third = |line: &str| refusal(format!("{CHAT}\n{CHAT}\n{line}\n"));
        assert!(third("{\"messages\": [}").starts_with("Line 3: the row is not JSON: "));
        assert!(third("{'messages': []}").contains("at column 2. Write rows with a JSON library"));
        assert!(third("[1]").starts_with("Line 3: the row is [1], but must be a JSON object."));
        assert!(third("{\"messages\": []}").starts_with("Line 3: messages is empty"));
        let deep = format!("{{\"a\": {}{}}}", "[".repeat(64), "]".repeat(64));
        assert!(
            third(&deep).starts_with("Line 3: the row's JSON is nested deeper than 64 levels.")
        );
    }

    #[test]
    fn a_first_line_cut_within_a_string_is_refused_as_a_line() {
        assert!(
            refusal(format!("{}\n{CHAT}\n", &CHAT[..40]))
                .starts_with("Line 1: the row is not JSON")
        );
        let error = refusal(format!("{}\n{CHAT}\n", &CHAT[..15]));
        assert!(error.starts_with("Line 1: the row is not JSON"), "{error}");
    }

    #[test]
    fn text_that_is_not_utf_8_is_refused_with_its_line() {
        let mut bytes = format!("{CHAT}\n").into_bytes();
        bytes.extend(b"{\"text\": \"caf\xe9\"}\n");
        assert_eq!(
            refusal(bytes),
            "Line 2: the row is not UTF-8, from its byte 14 on. Save the file as UTF-8."
        );
        // UTF-16, as some editors save "Unicode".
        assert!(refusal(b"\xff\xfe{\0\"\0").starts_with("Line 1: column 1 is not UTF-8."));
    }

    #[test]
    fn a_line_over_the_cap_is_refused_and_a_long_one_is_not() {
        let row = |length: usize| format!("{{\"text\": \"{}\"}}\n", "a".repeat(length));
        assert_eq!(read(row(250_000)).expect("rows").rows.len(), 1);
        let text = format!("{}{}", row(1), row(MAX_ROW_BYTES));
        assert!(refusal(text).starts_with("Line 2: the row is longer than 16 MiB."));
    }

    #[test]
    fn a_file_without_rows_is_refused() {
        for text in ["", "\n \n", "\u{feff}", "[]", "prompt,completion\n"] {
            assert_eq!(
                refusal(text),
                "Line 1: the file has no rows. Upload a file with one example a line.",
                "{text:?}"
            );
        }
    }

    #[test]
    fn pairs_are_read_for_the_method_that_learns_from_them() {
        let pair = r#"{"prompt": "q", "chosen": "a", "rejected": "b"}"#;
        let read = |text: &str| read_rows_for(Method::Dpo, text.as_bytes(), "training_file");
        let rows = read(&format!("{pair}\n{pair}\n")).expect("rows");
        assert_eq!(rows.report.format, format(Container::JsonLines, Shape::ChosenRejectedText));
        let table = read("prompt,chosen,rejected\nq,a,b\n").expect("rows");
        assert_eq!(table.report.format, format(Container::Csv, Shape::ChosenRejectedText));
        assert_eq!(table.rows[0].example, rows.rows[0].example);
        let error = read(&format!("{pair}\n{CHAT}\n")).expect_err("a chat row");
        assert!(
            error.message.starts_with("Line 2: the row is a chat row, but method"),
            "{error:?}"
        );
        assert!(refusal(format!("{pair}\n")).starts_with("Line 1: the row is a preference pair"));
    }

    #[test]
    fn rows_of_two_shapes_do_not_mix() {
        let text = format!("{CHAT}\n{{\"prompt\": \"a\", \"completion\": \"b\"}}\n");
        assert!(refusal(text).starts_with(
            "Line 2: the row is a prompt/completion row, but the rows before it are chat rows."
        ));
    }

    #[test]
    fn a_reader_ends_after_its_first_error() {
        let text = format!("{CHAT}\nnull\n{CHAT}\n");
        let reader = RowReader::new(text.as_bytes(), "validation_file").expect("reader");
        let rows: Vec<_> = reader.collect();
        assert_eq!(rows.len(), 2);
        let error = rows[1].as_ref().expect_err("null");
        assert_eq!(error.param.as_deref(), Some("validation_file"));
    }

    #[test]
    fn a_reader_that_fails_is_our_fault_and_not_the_files() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
                Err(std::io::Error::other("disk"))
            }
        }
        let error = read_rows(Broken, "training_file").expect_err("broken");
        assert_eq!(error.code, ErrorCode::Internal);
        assert_eq!(error.message, "The training file could not be read: disk");
    }

    #[test]
    fn nine_examples_are_too_few_and_ten_are_enough() {
        let error = check_training_examples(7).expect_err("too few");
        assert_eq!(error.code, ErrorCode::InvalidNExamples);
        assert_eq!(error.param.as_deref(), Some("training_file"));
        assert_eq!(
            error.message,
            "Training file has 7 example(s), but must have at least 10 examples"
        );
        assert!(check_training_examples(9).is_err());
        assert!(check_training_examples(10).is_ok());
    }
}
