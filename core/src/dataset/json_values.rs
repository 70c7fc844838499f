//! JSON objects that do not keep to lines: one array of them, or each over several lines.
//!
//! Values are cut out of the stream by their brackets, so that a large file needs no more memory
//! than its largest row.

use super::fault::{Fault, ReadFault};
use super::lines::too_long;
use super::reader::MAX_ROW_BYTES;
use memchr::memchr2;
use std::io::BufRead;

/// JSON nested deeper than this is refused: no training row needs it, and every recursion over a
/// row stays shallow.
pub(super) const MAX_JSON_DEPTH: usize = 64;

/// Follows brackets and strings through bytes of JSON.
#[derive(Debug, Default)]
pub(super) struct Nesting {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Nesting {
    fn feed(&mut self, byte: u8) {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
        } else {
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
        }
    }

    /// Whether `line` begins a value that goes on in the next line. A line that ends within a
    /// string does not: JSON strings have no raw newlines, so it is merely broken.
    pub(super) fn goes_on_after(line: &[u8]) -> bool {
        let mut nesting = Self::default();
        line.iter().for_each(|&byte| nesting.feed(byte));
        nesting.depth > 0 && !nesting.in_string
    }

    /// Refuses JSON that is nested too deep.
    pub(super) fn check(text: &[u8]) -> Result<(), Fault> {
        let mut nesting = Self::default();
        let mut rest = text;
        while let Some((&byte, behind)) = rest.split_first() {
            nesting.feed(byte);
            rest = match nesting.in_string && !nesting.escaped {
                // Most of a row is strings, and nothing else in them counts.
                true => &behind[memchr2(b'"', b'\\', behind).unwrap_or(behind.len())..],
                false => behind,
            };
            if nesting.depth > MAX_JSON_DEPTH {
                return Err(Fault::new(
                    format!("the row's JSON is nested deeper than {MAX_JSON_DEPTH} levels."),
                    "Write deep structures as text.",
                ));
            }
        }
        Ok(())
    }
}

/// Reads values one after another, of an array or of none.
pub(super) struct JsonValues<R> {
    reader: R,
    line: usize,
    in_array: bool,
    values: usize,
}

impl<R: BufRead> JsonValues<R> {
    /// Values that stand alone; `reader` is at the start of line `line`.
    pub(super) fn objects(reader: R, line: usize) -> Self {
        Self { reader, line, in_array: false, values: 0 }
    }

    /// The values of the array whose bracket comes next, on line `line`.
    pub(super) fn array(reader: R, line: usize) -> Self {
        Self { reader, line, in_array: true, values: 0 }
    }

    /// The next value's text and the line on which it begins.
    pub(super) fn next_value(&mut self) -> Result<Option<(usize, Vec<u8>)>, ReadFault> {
        if self.in_array {
            self.next_of_array()
        } else {
            match self.peek()? {
                None => Ok(None),
                Some(_) => self.cut_out().map(Some),
            }
        }
    }

    fn next_of_array(&mut self) -> Result<Option<(usize, Vec<u8>)>, ReadFault> {
        if self.values == 0 {
            self.peek()?;
            self.reader.consume(1);
        }
        match self.peek()? {
            Some(b']') => {
                self.reader.consume(1);
                match self.peek()? {
                    None => return Ok(None),
                    Some(_) => {
                        return Err(Fault::new(
                            "something follows the end of the JSON array.",
                            "Put all rows into one array, or write one row a line.",
                        )
                        .ends_file_at(self.line));
                    }
                }
            }
            Some(b',') if self.values > 0 => self.reader.consume(1),
            Some(_) if self.values > 0 => {
                return Err(Fault::new(
                    "two rows of the JSON array have no comma between them.",
                    "Write the file with a JSON library.",
                )
                .ends_file_at(self.line));
            }
            _ => {}
        }
        match self.peek()? {
            Some(_) => {
                self.values += 1;
                self.cut_out().map(Some)
            }
            None => Err(Fault::new(
                "the file ends before its JSON array does.",
                "Upload the whole file.",
            )
            .ends_file_at(self.line)),
        }
    }

    /// The next byte that is no white space, left where it is.
    fn peek(&mut self) -> Result<Option<u8>, ReadFault> {
        loop {
            let Some(&byte) = self.reader.fill_buf()?.first() else { return Ok(None) };
            if !byte.is_ascii_whitespace() {
                return Ok(Some(byte));
            }
            self.line += usize::from(byte == b'\n');
            self.reader.consume(1);
        }
    }

    /// Takes bytes until the brackets close, or for a value without brackets until what must
    /// follow it. What is cut out may still be no JSON; its reader says so.
    fn cut_out(&mut self) -> Result<(usize, Vec<u8>), ReadFault> {
        let start = self.line;
        let mut text = Vec::new();
        let mut nesting = Nesting::default();
        loop {
            let buffer = self.reader.fill_buf()?;
            if buffer.is_empty() {
                return Ok((start, text));
            }
            let mut taken = 0;
            let mut complete = false;
            for &byte in buffer {
                let outside = nesting.depth == 0 && !nesting.in_string;
                if outside && !text.is_empty() && ends_scalar(byte) {
                    complete = true;
                    break;
                }
                nesting.feed(byte);
                text.push(byte);
                taken += 1;
                self.line += usize::from(byte == b'\n');
                if nesting.depth == 0 && matches!(byte, b'}' | b']') && !nesting.in_string {
                    complete = true;
                    break;
                }
                if text.len() > MAX_ROW_BYTES {
                    return Err(too_long().ends_file_at(start));
                }
            }
            self.reader.consume(taken);
            if complete {
                return Ok((start, text));
            }
        }
    }
}

/// Whether a value without brackets ends before `byte`.
fn ends_scalar(byte: u8) -> bool {
    byte.is_ascii_whitespace() || matches!(byte, b',' | b'{' | b'[' | b']' | b'}')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(mut values: JsonValues<&[u8]>) -> Vec<(usize, String)> {
        let mut found = Vec::new();
        while let Some((line, text)) = values.next_value().expect("value") {
            found.push((line, String::from_utf8(text).expect("UTF-8")));
        }
        found
    }

    #[test]
    fn an_array_gives_its_values_with_their_lines() {
        let text = b" [\n {\"a\": \"]}\\\"\"},\n{\"b\":\n[1]} , 3\n]\n".as_slice();
        assert_eq!(
            values(JsonValues::array(text, 1)),
            [
                (2, "{\"a\": \"]}\\\"\"}".to_owned()),
                (3, "{\"b\":\n[1]}".to_owned()),
                (4, "3".to_owned()),
            ]
        );
        assert_eq!(values(JsonValues::array(b"[]".as_slice(), 1)), []);
    }

    #[test]
    fn objects_over_several_lines_give_the_line_on_which_they_begin() {
        let text = b"{\n}\n\n{\"a\":\n{}}{}".as_slice();
        let lines: Vec<_> =
            values(JsonValues::objects(text, 1)).into_iter().map(|(line, _)| line).collect();
        assert_eq!(lines, [1, 4, 5]);
    }

    #[test]
    fn a_broken_array_is_refused() {
        for text in ["[{}", "[{},", "[{} {}]", "[{}] {}"] {
            let mut values = JsonValues::array(text.as_bytes(), 1);
            let fault = loop {
                match values.next_value() {
                    Ok(Some(_)) => {}
                    Ok(None) => panic!("{text} was taken"),
                    Err(fault) => break fault,
                }
            };
            assert!(matches!(fault, ReadFault::Rest { line: 1, .. }), "{text}: {fault:?}");
        }
    }

    #[test]
    fn a_line_goes_on_when_its_brackets_do_and_its_strings_do_not() {
        assert!(Nesting::goes_on_after(b"{"));
        assert!(Nesting::goes_on_after(b"{\"a\": ["));
        assert!(!Nesting::goes_on_after(b"{\"a\": \"b"));
        assert!(!Nesting::goes_on_after(b"{}"));
    }
}
