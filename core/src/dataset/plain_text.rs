//! Plain text: a file without rows, read as one text or, where it is long, as several.
//!
//! A row is never parted in training, and making tokens of a text takes many times its memory. So
//! a long text is parted where its meaning is least harmed: after an empty line, else after any
//! line, else after a word.

use super::fault::{Fault, ReadFault};
use super::format::Repair;
use std::collections::BTreeSet;
use std::io::{BufRead, Read as _};

/// A text ends at the first empty line past this many bytes.
const PIECE_BYTES: usize = 192 << 10;
/// A text without an empty line ends here, at the end of a line or of a word.
const MAX_PIECE_BYTES: usize = 256 << 10;

/// Whether a file of that name is one of plain text, unless it begins as JSON or a table does.
#[must_use]
pub fn is_text_name(name: &str) -> bool {
    let ending = name.rsplit_once('.').map(|(_, ending)| ending.to_ascii_lowercase());
    matches!(ending.as_deref(), Some("txt" | "text" | "md"))
}

/// Reads a file's text in pieces.
pub(super) struct PlainText<R> {
    reader: R,
    /// Lines that have ended.
    line: usize,
    pieces: usize,
    /// The beginning of the next piece.
    rest: String,
}

impl<R: BufRead> PlainText<R> {
    /// `reader` is past `lines_read` lines.
    pub(super) fn new(reader: R, lines_read: usize) -> Self {
        Self { reader, line: lines_read, pieces: 0, rest: String::new() }
    }

    /// The next piece that is not blank, and the line on which it begins.
    pub(super) fn next_piece(
        &mut self,
        repairs: &mut BTreeSet<Repair>,
    ) -> Result<Option<(usize, String)>, ReadFault> {
        loop {
            let start = self.line + 1;
            let mut text = std::mem::take(&mut self.rest);
            let mut ended = false;
            while text.len() < MAX_PIECE_BYTES {
                let Some(line) = self.read_part(repairs)? else {
                    ended = true;
                    break;
                };
                let is_blank = line.trim_ascii().is_empty();
                text.push_str(&line);
                if is_blank && text.len() >= PIECE_BYTES {
                    break;
                }
            }
            if text.len() >= MAX_PIECE_BYTES && !text.ends_with('\n') {
                self.rest = text.split_off(end_of_last_word(&text));
            }
            if text.trim().is_empty() {
                if ended {
                    return Ok(None);
                }
                continue;
            }
            self.pieces += 1;
            if self.pieces > 1 {
                repairs.insert(Repair::TextInPieces);
            }
            return Ok(Some((start, text)));
        }
    }

    /// A line with its end, or a part of a long one.
    fn read_part(&mut self, repairs: &mut BTreeSet<Repair>) -> Result<Option<String>, ReadFault> {
        let mut bytes = Vec::new();
        let limit = MAX_PIECE_BYTES as u64;
        self.reader.by_ref().take(limit).read_until(b'\n', &mut bytes)?;
        // A character that the limit cut in two.
        while bytes.len() >= MAX_PIECE_BYTES
            && bytes.last() != Some(&b'\n')
            && std::str::from_utf8(&bytes).is_err_and(|error| error.error_len().is_none())
        {
            let mut byte = [0];
            if self.reader.read(&mut byte)? == 0 {
                break;
            }
            bytes.push(byte[0]);
        }
        if bytes.is_empty() {
            return Ok(None);
        }
        let line = self.line + 1;
        let mut text =
            String::from_utf8(bytes).map_err(|error| not_text(&error).ends_file_at(line))?;
        if text.contains('\0') {
            return Err(Fault::new(
                "the line has a byte 0, which no text has.",
                "Save the file as UTF-8 text.",
            )
            .ends_file_at(line));
        }
        if text.ends_with('\n') {
            self.line += 1;
            if text.ends_with("\r\n") {
                text.truncate(text.len() - 2);
                text.push('\n');
                repairs.insert(Repair::CrLf);
            }
        }
        Ok(Some(text))
    }
}

fn not_text(error: &std::string::FromUtf8Error) -> Fault {
    Fault::new(
        format!(
            "the line is not UTF-8, from its byte {} on.",
            error.utf8_error().valid_up_to() + 1
        ),
        "Save the file as UTF-8.",
    )
}

/// Where the last word ends; all of the text where it is one word.
fn end_of_last_word(text: &str) -> usize {
    let end = text.char_indices().rev().find(|(_, c)| c.is_whitespace());
    end.map(|(index, _)| index).filter(|&index| index > 0).unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(text: &str) -> (Vec<(usize, String)>, BTreeSet<Repair>) {
        let mut reader = PlainText::new(text.as_bytes(), 0);
        let mut repairs = BTreeSet::new();
        let mut found = Vec::new();
        while let Some(piece) = reader.next_piece(&mut repairs).expect("text") {
            found.push(piece);
        }
        (found, repairs)
    }

    #[test]
    fn short_text_is_one_piece_as_it_is() {
        let text = "\nOne.\n\nTwo.\n\n\nThree.";
        assert_eq!(pieces(text), (vec![(1, text.to_owned())], BTreeSet::new()));
        assert_eq!(pieces(" \n\n"), (vec![], BTreeSet::new()));
    }

    #[test]
    fn line_ends_become_newlines() {
        let (found, repairs) = pieces("a\r\nb\rc\r\n");
        assert_eq!(found, [(1, "a\nb\rc\n".to_owned())]);
        assert_eq!(repairs, BTreeSet::from([Repair::CrLf]));
    }

    #[test]
    fn long_text_is_parted_after_an_empty_line_and_nothing_is_lost() {
        let paragraph = format!("{}\n\n", "word ".repeat(1000));
        let text = paragraph.repeat(200);
        let (found, repairs) = pieces(&text);
        assert!(found.len() > 3, "{}", found.len());
        assert_eq!(repairs, BTreeSet::from([Repair::TextInPieces]));
        let mut line = 1;
        for (start, piece) in &found {
            assert_eq!(*start, line);
            assert!(piece.ends_with("\n\n") && piece.len() <= MAX_PIECE_BYTES);
            line += piece.matches('\n').count();
        }
        assert_eq!(found.into_iter().map(|(_, piece)| piece).collect::<String>(), text);
    }

    #[test]
    fn text_without_lines_is_parted_between_words_and_characters() {
        for text in ["wörd ".repeat(200_000), "ö".repeat(500_000)] {
            let (found, _) = pieces(&text);
            assert!(found.len() > 2);
            for (line, piece) in &found {
                assert_eq!(*line, 1);
                assert!(piece.len() <= 2 * MAX_PIECE_BYTES);
                assert!(piece.starts_with(' ') || piece.starts_with(['w', 'ö']));
                assert!(piece.ends_with(['d', 'ö', ' ']));
            }
            assert_eq!(found.into_iter().map(|(_, piece)| piece).collect::<String>(), text);
        }
    }

    #[test]
    fn what_is_no_text_is_refused_with_its_line() {
        for (bytes, rule) in [
            (b"good\nb\xe9d\n".as_slice(), "the line is not UTF-8, from its byte 2 on."),
            (b"good\nb\0d\n", "the line has a byte 0, which no text has."),
        ] {
            let fault = PlainText::new(bytes, 0).next_piece(&mut BTreeSet::new());
            let Err(ReadFault::Rest { line, fault }) = fault else { panic!("{fault:?}") };
            assert_eq!((line, fault.rule.as_str()), (2, rule));
        }
    }

    #[test]
    fn names_tell_text_files() {
        assert!(is_text_name("book.txt") && is_text_name("README.MD"));
        assert!(!is_text_name("rows.jsonl") && !is_text_name("txt") && !is_text_name("upload"));
    }
}
