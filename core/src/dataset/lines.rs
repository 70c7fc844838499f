//! JSON Lines: one row a line.

use super::fault::{Fault, ReadFault};
use super::format::Repair;
use super::reader::MAX_ROW_BYTES;
use std::collections::{BTreeSet, VecDeque};
use std::io::{self, BufRead, Read as _};

/// Reads line after line, none of them longer than [`MAX_ROW_BYTES`].
pub(super) struct Lines<R> {
    reader: R,
    line: usize,
    put_back: VecDeque<Line>,
}

/// A line's number, from 1, and its text; or what is wrong with it.
pub(super) type Line = Result<(usize, Vec<u8>), ReadFault>;

impl<R: BufRead> Lines<R> {
    /// `reader` is past `lines_read` lines.
    pub(super) fn new(reader: R, lines_read: usize) -> Self {
        Self { reader, line: lines_read, put_back: VecDeque::new() }
    }

    /// Makes `line` one to read again, after those that were put back before.
    pub(super) fn put_back(&mut self, line: Line) {
        self.put_back.push_back(line);
    }

    /// The reader, with whatever it has left.
    pub(super) fn into_inner(self) -> R {
        self.reader
    }

    /// The next line that has text, without its end, and its number from 1.
    pub(super) fn next_line(
        &mut self,
        repairs: &mut BTreeSet<Repair>,
    ) -> Result<Option<(usize, Vec<u8>)>, ReadFault> {
        if let Some(line) = self.put_back.pop_front() {
            return line.map(Some);
        }
        loop {
            let mut text = Vec::new();
            self.line += 1;
            let limit = MAX_ROW_BYTES as u64 + 2;
            self.reader.by_ref().take(limit).read_until(b'\n', &mut text)?;
            if text.is_empty() {
                return Ok(None);
            }
            if text.last() == Some(&b'\n') {
                text.pop();
                if text.last() == Some(&b'\r') {
                    text.pop();
                    repairs.insert(Repair::CrLf);
                }
            } else {
                if text.len() as u64 == limit {
                    self.skip_line()?;
                } else {
                    repairs.insert(Repair::NoFinalNewline);
                }
            }
            if text.len() > MAX_ROW_BYTES {
                return Err(too_long().at(self.line));
            }
            if text.trim_ascii().is_empty() {
                repairs.insert(Repair::BlankLines);
                continue;
            }
            return Ok(Some((self.line, text)));
        }
    }

    /// Reads on to the end of the line and keeps nothing of it.
    fn skip_line(&mut self) -> io::Result<()> {
        loop {
            let buffer = self.reader.fill_buf()?;
            let (length, ends) = match buffer.iter().position(|&byte| byte == b'\n') {
                Some(end) => (end + 1, true),
                None => (buffer.len(), buffer.is_empty()),
            };
            self.reader.consume(length);
            if ends {
                return Ok(());
            }
        }
    }
}

/// The fault of a row that is longer than any that is read.
pub(super) fn too_long() -> Fault {
    Fault::new(
        format!("the row is longer than {} MiB.", MAX_ROW_BYTES >> 20),
        "Split it into several rows; a row can train no more than the model's context anyway.",
    )
}

/// Skips a UTF-8 byte-order mark at the start of `reader`: true if there was one, and else the
/// bytes that were read in looking for it.
pub(super) fn skip_byte_order_mark(reader: &mut impl BufRead) -> io::Result<(Vec<u8>, bool)> {
    const MARK: [u8; 3] = [0xef, 0xbb, 0xbf];
    let mut start = Vec::new();
    reader.by_ref().take(MARK.len() as u64).read_to_end(&mut start)?;
    if start == MARK { Ok((Vec::new(), true)) } else { Ok((start, false)) }
}
