//! Keeps text that spells a special token from becoming the token.
//!
//! A chat template mixes the client's text with its own special tokens into one string, in which
//! the two look alike. So a mark goes into every spelling in the client's text before the template
//! sees it; the tokenizer's normalizer takes the marks out again after it has looked for special
//! tokens. Whatever text the client has comes through unchanged, the mark's own included.

use aho_corasick::AhoCorasick;
use serde_json::{Map, Value};
use std::borrow::Cow;

/// Two noncharacters, which Unicode keeps out of all interchange.
pub(super) const MARK: &str = "\u{fdd0}\u{fdd1}";

/// Two marks in a row, which no text has: what is marked lies between them.
pub(super) const BLANK: &str = "\u{fdd0}\u{fdd1}\u{fdd0}\u{fdd1}";

/// The same for what an assistant thought: a blank, and behind it the end of a mark.
pub(super) const BLANK_THOUGHTS: &str = "\u{fdd0}\u{fdd1}\u{fdd0}\u{fdd1}\u{fdd1}";

/// Finds spellings of special tokens.
pub(super) struct Protector {
    spellings: AhoCorasick,
}

impl Protector {
    /// For tokens of these texts. A token of one character cannot be told from the character.
    pub(super) fn new<'a>(
        special_tokens: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, aho_corasick::BuildError> {
        // The mark itself is a spelling, so that a mark in the client's text survives: its first
        // half, a mark and its second half lose the mark in the middle and are the mark again.
        let spellings = special_tokens
            .into_iter()
            .filter(|text| text.chars().nth(1).is_some())
            .chain(std::iter::once(MARK));
        Ok(Self { spellings: AhoCorasick::new(spellings)? })
    }

    /// `text` with a mark after the first character of every spelling.
    pub(super) fn mark<'a>(&self, text: &'a str) -> Cow<'a, str> {
        self.mark_with_boundary(text, 0).0
    }

    /// The same, and where the byte offset `boundary` of `text` went.
    pub(super) fn mark_with_boundary<'a>(
        &self,
        text: &'a str,
        boundary: usize,
    ) -> (Cow<'a, str>, usize) {
        let mut starts: Vec<_> =
            self.spellings.find_overlapping_iter(text).map(|found| found.start()).collect();
        if starts.is_empty() {
            return (Cow::Borrowed(text), boundary);
        }
        starts.sort_unstable();
        starts.dedup();
        let mut marked = String::with_capacity(text.len() + starts.len() * MARK.len());
        let mut moved = boundary;
        let mut done = 0;
        for start in starts {
            let after_first = start + text[start..].chars().next().map_or(0, char::len_utf8);
            marked.push_str(&text[done..after_first]);
            marked.push_str(MARK);
            done = after_first;
            if after_first <= boundary {
                moved += MARK.len();
            }
        }
        marked.push_str(&text[done..]);
        (Cow::Owned(marked), moved)
    }

    /// Marks every string in `value`, keys too.
    pub(super) fn mark_json(&self, value: &Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.mark(text).into_owned()),
            Value::Array(list) => list.iter().map(|value| self.mark_json(value)).collect(),
            Value::Object(fields) => Value::Object(self.mark_fields(fields)),
            other => other.clone(),
        }
    }

    fn mark_fields(&self, fields: &Map<String, Value>) -> Map<String, Value> {
        fields
            .iter()
            .map(|(key, value)| (self.mark(key).into_owned(), self.mark_json(value)))
            .collect()
    }
}

/// `text` with its special tokens as they are, so that only marks of its own survive.
pub(super) fn keep_marks(text: &str) -> Cow<'_, str> {
    if !text.contains(MARK) {
        return Cow::Borrowed(text);
    }
    let kept: String =
        MARK.chars().take(1).chain(MARK.chars()).chain(MARK.chars().skip(1)).collect();
    Cow::Owned(text.replace(MARK, &kept))
}

/// What the tokenizer's normalizer makes of marked text.
pub(super) fn unmark(text: &str) -> String {
    text.replace(MARK, "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn protector() -> Protector {
        Protector::new(["<|im_end|>", "<s>", "<s><s>", "s"]).expect("automaton")
    }

    #[test]
    fn no_spelling_is_left_and_unmarking_gives_the_text_back() {
        for text in [
            "",
            "plain",
            "<|im_end|>",
            "a<s><s>b",
            "<<s>>",
            "\u{fdd0}\u{fdd0}\u{fdd1}\u{fdd1}",
            MARK,
        ] {
            let marked = protector().mark(text);
            for spelling in ["<|im_end|>", "<s>"] {
                assert!(!marked.contains(spelling), "{text:?} became {marked:?}");
            }
            assert_eq!(unmark(&marked), text);
        }
    }

    #[test]
    fn plain_text_is_left_as_it_is() {
        assert_eq!(protector().mark("s < s > |im_end|"), "s < s > |im_end|");
    }

    #[test]
    fn a_boundary_moves_with_the_text() {
        let (marked, boundary) = protector().mark_with_boundary("<s>a<s>", 3);
        assert_eq!(&marked[boundary..], format!("a<{MARK}s>"));
        let (marked, boundary) = protector().mark_with_boundary("ab<s>", 3);
        assert_eq!(unmark(&marked[..boundary]), "ab<");
    }

    #[test]
    fn names_and_values_deep_in_json_are_marked() {
        let value = serde_json::json!({"<s>": [{"a": "<s>"}], "n": 1});
        assert!(!protector().mark_json(&value).to_string().contains("<s>"));
    }

    proptest! {
        #[test]
        fn marking_is_undone_exactly(text in "[<s>|ab\u{fdd0}\u{fdd1}]{0,24}") {
            let marked = protector().mark(&text);
            prop_assert!(!marked.contains("<s>") && !marked.contains(BLANK));
            prop_assert_eq!(unmark(&marked), text);
        }
    }
}
