//! CSV with a header: each column a key, each record a row.

use super::fault::{Fault, ReadFault, shortened};
use super::format::Repair;
use super::lines::too_long;
use super::reader::MAX_ROW_BYTES;
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Columns that together make a row; a file needs all of one line.
const SHAPES: [&[&str]; 4] = [
    &["prompt", "completion"],
    &["instruction", "output"],
    &["text"],
    &["prompt", "chosen", "rejected"],
];

/// Reads records under a header.
pub(super) struct Table<R> {
    reader: csv::Reader<Capped<R>>,
    left: Arc<AtomicUsize>,
    lines_read: usize,
    header: Option<Vec<String>>,
}

/// A record's cells and the line on which it begins.
type Record = (usize, Vec<Vec<u8>>);
/// A record under its header, and the line on which it begins.
type Fields = (usize, Map<String, Value>);

impl<R: Read> Table<R> {
    /// `reader` is past `lines_read` lines.
    pub(super) fn new(reader: R, lines_read: usize) -> Self {
        let left = Arc::new(AtomicUsize::new(MAX_ROW_BYTES));
        let reader = Capped { reader, left: Arc::clone(&left), bytes: 0, ends_line: false };
        // The csv crate counts a CR LF as the end of one line and the start of the next; with LF
        // alone as the terminator its line numbers are exact.
        let reader = csv::ReaderBuilder::new()
            .has_headers(false)
            .flexible(true)
            .terminator(csv::Terminator::Any(b'\n'))
            .from_reader(reader);
        Self { reader, left, lines_read, header: None }
    }

    /// The next record as an object of texts, and the line on which it begins.
    pub(super) fn next_record(
        &mut self,
        repairs: &mut BTreeSet<Repair>,
    ) -> Result<Option<Fields>, ReadFault> {
        if self.header.is_none() {
            let Some((line, cells)) = self.read(repairs)? else { return Ok(None) };
            let names = texts(cells).and_then(header).map_err(|fault| fault.ends_file_at(line))?;
            if names.iter().any(String::is_empty) {
                repairs.insert(Repair::UnnamedColumn);
            }
            self.header = Some(names);
        }
        let Some((line, cells)) = self.read(repairs)? else { return Ok(None) };
        let header = self.header.as_deref().unwrap_or_default();
        if cells.len() != header.len() {
            return Err(Fault::new(
                format!(
                    "the record has {} columns, but the header has {}.",
                    cells.len(),
                    header.len()
                ),
                "Put text with commas, quotes or newlines into double quotes.",
            )
            .at(line));
        }
        let cells = texts(cells).map_err(|fault| fault.at(line))?;
        // A column without a name is an index that a spreadsheet or pandas wrote.
        let fields = header
            .iter()
            .zip(cells)
            .filter(|(name, _)| !name.is_empty())
            .map(|(name, cell)| (name.clone(), Value::String(cell)))
            .collect();
        Ok(Some((line, fields)))
    }

    /// The next record that has text.
    fn read(&mut self, repairs: &mut BTreeSet<Repair>) -> Result<Option<Record>, ReadFault> {
        let mut record = csv::ByteRecord::new();
        loop {
            self.left.store(MAX_ROW_BYTES, Ordering::Relaxed);
            let start = self.line(self.reader.position());
            let more = self.reader.read_byte_record(&mut record);
            if !more.map_err(|error| read_fault(error, start))? {
                return Ok(None);
            }
            let mut cells: Vec<_> = record.iter().map(<[u8]>::to_vec).collect();
            let newlines = cells.iter().flatten().filter(|&&byte| byte == b'\n').count();
            if let Some(last) = cells.last_mut()
                && last.last() == Some(&b'\r')
            {
                last.pop();
                repairs.insert(Repair::CrLf);
            }
            let end = self.reader.position();
            let unended = self.reader.get_ref().is_unended_at(end.byte());
            // Counted back from its end: in front of it there may have been blank lines.
            let line = self.line(end).saturating_sub(usize::from(!unended) + newlines).max(start);
            if line > start {
                repairs.insert(Repair::BlankLines);
            }
            if let [only] = cells.as_slice()
                && only.is_empty()
            {
                repairs.insert(Repair::BlankLines);
                continue;
            }
            return Ok(Some((line, cells)));
        }
    }

    fn line(&self, position: &csv::Position) -> usize {
        usize::try_from(position.line()).unwrap_or(usize::MAX).saturating_add(self.lines_read)
    }
}

fn texts(cells: Vec<Vec<u8>>) -> Result<Vec<String>, Fault> {
    let text = |(index, cell)| {
        String::from_utf8(cell).map_err(|_| {
            Fault::at_key(
                format_args!("column {}", index + 1),
                "is not UTF-8.",
                "Save the file as UTF-8.",
            )
        })
    };
    cells.into_iter().enumerate().map(text).collect()
}

/// Whether `line`, the first of a file, names columns that make a row.
pub(super) fn is_header(line: &str) -> bool {
    let cells: Vec<_> = line.split(',').map(|cell| name(cell.trim().trim_matches('"'))).collect();
    makes_a_row(&cells)
}

fn name(cell: &str) -> String {
    cell.trim().to_ascii_lowercase()
}

fn makes_a_row(names: &[String]) -> bool {
    let has = |name: &&str| names.iter().any(|known| known == name);
    SHAPES.iter().any(|shape| shape.iter().all(has))
}

/// The columns' names, if they make a row.
fn header(cells: Vec<String>) -> Result<Vec<String>, Fault> {
    let names: Vec<_> = cells.iter().map(|cell| name(cell)).collect();
    if makes_a_row(&names) {
        return Ok(names);
    }
    Err(Fault::new(
        format!(
            "the file begins with {:?}, which is neither JSON nor a CSV header with the columns \
             prompt and completion, instruction and output, text, or prompt, chosen and rejected.",
            shortened(&cells.join(","))
        ),
        "Upload JSON Lines, such as {\"messages\": […]} on each line, or name the columns; a file of \
         plain text needs a name that ends in .txt.",
    ))
}

fn read_fault(error: csv::Error, line: usize) -> ReadFault {
    match error.into_kind() {
        csv::ErrorKind::Io(error) if error.get_ref().is_some_and(|e| e.is::<TooLong>()) => {
            too_long().ends_file_at(line)
        }
        csv::ErrorKind::Io(error) => ReadFault::Io(error),
        other => Fault::new(
            format!("the record is not CSV: {other:?}."),
            "Write the file with a CSV library.",
        )
        .ends_file_at(line),
    }
}

/// Stops a record without an end before it fills the memory.
struct Capped<R> {
    reader: R,
    left: Arc<AtomicUsize>,
    bytes: u64,
    ends_line: bool,
}

impl<R> Capped<R> {
    /// Whether the file ends at byte `offset`, in the middle of a line.
    fn is_unended_at(&self, offset: u64) -> bool {
        offset == self.bytes && !self.ends_line
    }
}

#[derive(Debug, thiserror::Error)]
#[error("a CSV record is too long")]
struct TooLong;

impl<R: Read> Read for Capped<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.left.load(Ordering::Relaxed);
        if left == 0 {
            return Err(io::Error::other(TooLong));
        }
        let length = buffer.len().min(left);
        let taken = self.reader.read(&mut buffer[..length])?;
        self.left.store(left - taken, Ordering::Relaxed);
        self.bytes += taken as u64;
        if let Some(last) = buffer[..taken].last() {
            self.ends_line = *last == b'\n';
        }
        Ok(taken)
    }
}
