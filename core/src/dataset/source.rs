//! How rows lie in a file, told by its first bytes.

use super::fault::ReadFault;
use super::format::{Container, Repair};
use super::json_values::{JsonValues, Nesting};
use super::lines::{Line, Lines, skip_byte_order_mark};
use super::plain_text::PlainText;
use super::reader::{MAX_ROW_BYTES, parse_object};
use super::row::ROW_KEYS;
use super::table::{self, Table};
use std::collections::BTreeSet;
use std::io::{BufRead, Chain, Cursor, Read as _};

/// The longest first line in which a header is looked for.
const MAX_HEADER_BYTES: u64 = 64 << 10;

/// What was read ahead to tell the container, and then the rest.
type Whole<R> = Chain<Cursor<Vec<u8>>, R>;

/// Where the rows come from, by how they lie in the file.
pub(super) enum Source<R> {
    Lines(Lines<Whole<R>>),
    Values(JsonValues<Whole<Whole<R>>>),
    Table(Table<Whole<Whole<R>>>),
    Text(PlainText<Whole<Whole<R>>>),
}

/// Tells JSON from CSV, and one array from objects, by the first byte that is no white space.
pub(super) fn open<R: BufRead>(
    mut reader: R,
    is_text: bool,
    repairs: &mut BTreeSet<Repair>,
) -> Result<(Container, Source<R>), ReadFault> {
    let (start, had_mark) = skip_byte_order_mark(&mut reader)?;
    if had_mark {
        repairs.insert(Repair::ByteOrderMark);
    }
    let mut whole = Cursor::new(start).chain(reader);
    let (mut blank, mut blank_lines) = (Vec::new(), 0);
    let first = loop {
        let Some(&byte) = whole.fill_buf()?.first() else { break None };
        if !byte.is_ascii_whitespace() {
            break Some(byte);
        }
        if blank.len() <= MAX_ROW_BYTES {
            blank.push(byte);
        }
        blank_lines += usize::from(byte == b'\n');
        whole.consume(1);
    };
    let starts_as_rows = matches!(first, None | Some(b'{' | b'['));
    if is_text && !starts_as_rows {
        return open_text(whole, blank_lines, blank, repairs);
    }
    if blank_lines > 0 {
        repairs.insert(Repair::BlankLines);
    }
    match first {
        None | Some(b'{') => open_objects(whole, blank_lines, repairs),
        Some(b'[') => {
            let values = JsonValues::array(Cursor::new(Vec::new()).chain(whole), blank_lines + 1);
            Ok((Container::JsonArray, Source::Values(values)))
        }
        Some(_) => {
            let whole = Cursor::new(Vec::new()).chain(whole);
            Ok((Container::Csv, Source::Table(Table::new(whole, blank_lines))))
        }
    }
}

/// Tells a table from plain text, in a file whose name says that it is text, by its first line.
fn open_text<R: BufRead>(
    mut whole: Whole<R>,
    blank_lines: usize,
    mut start: Vec<u8>,
    repairs: &mut BTreeSet<Repair>,
) -> Result<(Container, Source<R>), ReadFault> {
    let mut line = Vec::new();
    whole.by_ref().take(MAX_HEADER_BYTES).read_until(b'\n', &mut line)?;
    let header = String::from_utf8_lossy(&line);
    // One word is a heading rather than a table of one column.
    if header.contains(',') && table::is_header(&header) {
        if blank_lines > 0 {
            repairs.insert(Repair::BlankLines);
        }
        let whole = Cursor::new(line).chain(whole);
        return Ok((Container::Csv, Source::Table(Table::new(whole, blank_lines))));
    }
    start.append(&mut line);
    Ok((Container::PlainText, Source::Text(PlainText::new(Cursor::new(start).chain(whole), 0))))
}

/// Tells one object a line from objects over several lines by whether the first line is whole. A
/// first line that is broken off, with a row of its own in the second one, is merely broken.
fn open_objects<R: BufRead>(
    whole: Whole<R>,
    blank_lines: usize,
    repairs: &mut BTreeSet<Repair>,
) -> Result<(Container, Source<R>), ReadFault> {
    let mut lines = Lines::new(whole, blank_lines);
    let mut of_lines = BTreeSet::new();
    let first = next_line(&mut lines, &mut of_lines)?;
    let Some(Ok((line, text))) = &first else {
        repairs.append(&mut of_lines);
        first.into_iter().for_each(|first| lines.put_back(first));
        return Ok((Container::JsonLines, Source::Lines(lines)));
    };
    let mut second = None;
    if Nesting::goes_on_after(text) {
        second = next_line(&mut lines, &mut of_lines)?;
        let is_row = matches!(&second, Some(Ok((_, text))) if is_row(text));
        if !is_row {
            let mut start = text.clone();
            let line = *line;
            if let Some(Ok((second_line, text))) = second {
                start.extend(std::iter::repeat_n(b'\n', second_line - line));
                start.extend(text);
            } else if let Some(Err(fault)) = second {
                return Err(fault);
            }
            start.push(b'\n');
            let values = JsonValues::objects(Cursor::new(start).chain(lines.into_inner()), line);
            return Ok((Container::JsonObjects, Source::Values(values)));
        }
    }
    repairs.append(&mut of_lines);
    first.into_iter().chain(second).for_each(|line| lines.put_back(line));
    Ok((Container::JsonLines, Source::Lines(lines)))
}

/// The next line, a fault of its own included.
fn next_line<R: BufRead>(
    lines: &mut Lines<R>,
    repairs: &mut BTreeSet<Repair>,
) -> Result<Option<Line>, ReadFault> {
    match lines.next_line(repairs) {
        Err(fault @ ReadFault::Io(_)) => Err(fault),
        Err(fault) => Ok(Some(Err(fault))),
        Ok(line) => Ok(line.map(Ok)),
    }
}

/// Whether `text` is the object of a row, of whatever shape.
fn is_row(text: &[u8]) -> bool {
    parse_object(text).is_ok_and(|fields| ROW_KEYS.iter().any(|key| fields.contains_key(*key)))
}
