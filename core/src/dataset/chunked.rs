//! Encodes text in chunks and remembers what they became, as words come again and again.
//!
//! A byte-level tokenizer parts text by a pattern before it makes tokens, and the tokens of a text
//! are those of its parts, one after another. Text of ASCII is parted here
//! ([`PreTokenizer`]). In other text a new part begins at these places whatever stands further
//! off, with the patterns that are known:
//!
//! - before and after a special token;
//! - before a space that has no white space beside it;
//! - after a newline that has no white space beside it.
//!
//! Chunks between such places that are of ASCII are parted too, and the tokenizer encodes the
//! others as they are. That is exact, and tests hold it against the tokenizer's own way with texts
//! of every kind. Another kind of tokenizer has no chunks.

use super::detokenize::byte_of_letter;
use super::known_chunks::{KnownChunks, part_key};
use super::pre_tokenizer::PreTokenizer;
use super::protect::MARK;
use super::tokenizer::Encoded;
use aho_corasick::{AhoCorasick, MatchKind};
use serde_json::Value;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};
use tokenizers::{Model as _, Token, Tokenizer};

/// Encodes chunk by chunk.
pub(super) struct Chunked {
    special: AhoCorasick,
    pre_tokenizer: PreTokenizer,
    /// The letters of the bytes of ASCII that are tokens of the model. A part of such bytes has
    /// tokens without a gap between them.
    letters: [Option<char>; 128],
    known: Mutex<KnownChunks>,
}

impl Chunked {
    /// For the tokenizer of this `tokenizer.json`, if it is one that has chunks.
    pub(super) fn new(json: &Value) -> Option<Self> {
        let added = json["added_tokens"].as_array()?;
        let plain = |token: &Value| {
            ["lstrip", "rstrip", "single_word", "normalized"]
                .iter()
                .all(|flag| token[flag] == false)
        };
        let pre_tokenizer = PreTokenizer::of(&json["pre_tokenizer"])?;
        let has_chunks = added.iter().all(plain)
            && keeps_spaces(&json["normalizer"])
            && json["model"]["type"] == "BPE"
            && json["model"]["dropout"].as_f64().unwrap_or(0.0) == 0.0;
        if !has_chunks {
            return None;
        }
        let texts = added.iter().map(|token| token["content"].as_str());
        let special = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(texts.collect::<Option<Vec<_>>>()?)
            .ok()?;
        let letters = letters_of_ascii(&json["model"]);
        Some(Self { special, pre_tokenizer, letters, known: Mutex::new(KnownChunks::default()) })
    }

    /// The tokens of `text`, as `tokenizer` makes them of all of it.
    pub(super) fn encode(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
    ) -> Result<Encoded, tokenizers::Error> {
        let mut encoder = Encoder {
            tokenizer,
            chunked: self,
            // Another thread that encodes just now has the memory to itself.
            known: self.known.try_lock().ok(),
            // Room for about one and a half times as many tokens as English has.
            encoded: Encoded {
                ids: Vec::with_capacity(text.len() / 3),
                offsets: Vec::with_capacity(text.len() / 3),
            },
        };
        let mut done = 0;
        for special in self.special.find_iter(text) {
            encoder.plain(text, done..special.start())?;
            encoder.chunk(text, special.range())?;
            done = special.end();
        }
        encoder.plain(text, done..text.len())?;
        Ok(encoder.encoded)
    }
}

/// A text that is being encoded.
struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    chunked: &'a Chunked,
    known: Option<MutexGuard<'a, KnownChunks>>,
    encoded: Encoded,
}

impl Encoder<'_> {
    /// A stretch of the text without special tokens.
    fn plain(&mut self, text: &str, stretch: Range<usize>) -> Result<(), tokenizers::Error> {
        if text[stretch.clone()].is_ascii() {
            return self.parts(text, stretch);
        }
        let bytes = text[stretch.clone()].as_bytes();
        // White space of ASCII, and beyond ASCII nothing is told: bytes from 0x80 on are no one's
        // neighbour.
        let is_solid = |byte: u8| byte.is_ascii() && !matches!(byte, b'\t'..=b'\r' | b' ');
        let mut start = 0;
        for middle in 1..bytes.len().saturating_sub(1) {
            let begins = match bytes[middle] {
                b' ' => middle,
                b'\n' => middle + 1,
                _ => continue,
            };
            if is_solid(bytes[middle - 1]) && is_solid(bytes[middle + 1]) {
                self.parts_or_chunk(text, stretch.start + start..stretch.start + begins)?;
                start = begins;
            }
        }
        self.parts_or_chunk(text, stretch.start + start..stretch.end)
    }

    fn parts_or_chunk(&mut self, text: &str, range: Range<usize>) -> Result<(), tokenizers::Error> {
        match text[range.clone()].is_ascii() {
            true => self.parts(text, range),
            false => self.chunk(text, range),
        }
    }

    /// Text of ASCII, part by part.
    fn parts(&mut self, text: &str, range: Range<usize>) -> Result<(), tokenizers::Error> {
        let Range { mut start, end } = range;
        while start < end {
            let rest = &text.as_bytes()[start..];
            let length = self.chunked.pre_tokenizer.first_part(&rest[..end - start]);
            match part_key(rest, length) {
                Some(key) if self.recall_part(key, start) => {}
                key => self.part(text, start..start + length, key)?,
            }
            start += length;
        }
        Ok(())
    }

    fn recall_part(&mut self, key: u128, from: usize) -> bool {
        let known = self.known.as_ref();
        known.is_some_and(|known| known.recall_part(key, from, &mut self.encoded))
    }

    /// A part of a key that is not known, which goes to the model at once: no normalizer changes
    /// it.
    fn part(
        &mut self,
        text: &str,
        range: Range<usize>,
        key: Option<u128>,
    ) -> Result<(), tokenizers::Error> {
        let letter = |byte: u8| self.chunked.letters[usize::from(byte & 127)];
        let letters = text[range.clone()].bytes().map(letter).collect::<Option<String>>();
        let (Some(letters), Some(key)) = (letters, key) else { return self.chunk(text, range) };
        let mut end = 0;
        let ends = |token: Token| {
            end += letters[token.offsets.0..token.offsets.1].chars().count();
            (token.id, end)
        };
        let tokens = self.tokenizer.get_model().tokenize(&letters)?;
        let tokens: Vec<_> = tokens.into_iter().map(ends).collect();
        let mut start = range.start;
        for &(id, end) in &tokens {
            self.encoded.ids.push(id);
            self.encoded.offsets.push((start, range.start + end));
            start = range.start + end;
        }
        if let Some(known) = &mut self.known {
            known.learn_part(key, &tokens);
        }
        Ok(())
    }

    /// A chunk that the tokenizer encodes.
    fn chunk(&mut self, text: &str, range: Range<usize>) -> Result<(), tokenizers::Error> {
        let (chunk, from) = (&text[range.clone()], range.start);
        let known = self.known.as_ref();
        if chunk.is_empty()
            || known.is_some_and(|known| known.recall(chunk, from, &mut self.encoded))
        {
            return Ok(());
        }
        let encoding = self.tokenizer.encode(chunk, false)?;
        let tokens = || {
            let tokens = encoding.get_ids().iter().zip(encoding.get_offsets());
            tokens.map(|(&id, &(start, end))| (id, start, end))
        };
        for (id, start, end) in tokens() {
            self.encoded.ids.push(id);
            self.encoded.offsets.push((from + start, from + end));
        }
        if let Some(known) = &mut self.known {
            known.learn(chunk, tokens());
        }
        Ok(())
    }
}

/// The letters of the bytes of ASCII that this `model` has as tokens; none where it has other
/// tokens at the beginning or the end of a word.
fn letters_of_ascii(model: &Value) -> [Option<char>; 128] {
    let mut letters = [None; 128];
    let is_empty = |field: &str| matches!(model[field].as_str(), None | Some(""));
    if is_empty("continuing_subword_prefix") && is_empty("end_of_word_suffix") {
        for letter in '\0'..='\u{1ff}' {
            let place = byte_of_letter(letter).and_then(|byte| letters.get_mut(usize::from(byte)));
            if let Some(place) = place {
                *place = model["vocab"].get(letter.to_string()).map(|_| letter);
            }
        }
    }
    letters
}

/// Whether a normalizer neither makes nor takes white space of ASCII, nor joins characters of
/// ASCII with what is beside them.
fn keeps_spaces(normalizer: &Value) -> bool {
    match normalizer["type"].as_str() {
        None => normalizer.is_null(),
        Some("NFC" | "NFD") => true,
        Some("Replace") => normalizer["pattern"]["String"] == MARK && normalizer["content"] == "",
        Some("Sequence") => {
            normalizer["normalizers"].as_array().is_some_and(|all| all.iter().all(keeps_spaces))
        }
        Some(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::pre_tokenizer::tests::all as pre_tokenizers;
    use super::super::testing::byte_tokenizer_json;
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    /// A tokenizer whose merges reach over everything that a pattern could part: spaces, newlines,
    /// punctuation and digits.
    fn tokenizer(pre_tokenizer: &Value) -> (Tokenizer, Chunked) {
        load(tokenizer_json(Some(pre_tokenizer)))
    }

    fn load(json: Value) -> (Tokenizer, Chunked) {
        let chunked = Chunked::new(&json).expect("a tokenizer with chunks");
        (serde_json::from_value(json).expect("a tokenizer"), chunked)
    }

    fn tokenizer_json(pre_tokenizer: Option<&Value>) -> Value {
        let (json, _) = byte_tokenizer_json(&json!({}), &json!({}));
        let mut json: Value = serde_json::from_slice(&json).expect("JSON");
        json["truncation"] = Value::Null;
        json["post_processor"] = Value::Null;
        let unmark = json!({"type": "Replace", "pattern": {"String": MARK}, "content": ""});
        json["normalizer"] =
            json!({"type": "Sequence", "normalizers": [unmark, json["normalizer"].take()]});
        if let Some(pre_tokenizer) = pre_tokenizer {
            json["pre_tokenizer"] = pre_tokenizer.clone();
        }
        let merges = [
            ("Ġ", "Ġ"),
            ("Ċ", "Ċ"),
            ("Ġ", "a"),
            ("a", "b"),
            (".", "Ċ"),
            (".", "."),
            ("1", "2"),
            ("Ġ", "1"),
            ("a", "Ġ"),
            ("Ċ", "a"),
            ("'", "s"),
            ("Ġ", "."),
            ("Ċ", "Ġ"),
            ("č", "Ċ"),
            ("b", "Ċ"),
            ("Ã", "¤"),
        ];
        for (number, (left, right)) in merges.iter().enumerate() {
            json["model"]["vocab"][format!("{left}{right}")] = json!(300 + number);
        }
        json["model"]["merges"] = json!(merges.map(|(left, right)| format!("{left} {right}")));
        json
    }

    fn assert_same(tokenizer: &Tokenizer, chunked: &Chunked, text: &str) {
        let whole = tokenizer.encode(text, false).expect("tokens");
        let parts = chunked.encode(tokenizer, text).expect("tokens");
        assert_eq!(parts.ids, whole.get_ids(), "{text:?}");
        assert_eq!(parts.offsets, whole.get_offsets(), "{text:?}");
    }

    #[test]
    fn texts_of_every_kind_have_the_tokens_of_the_whole_text() {
        for pre_tokenizer in pre_tokenizers() {
            let (tokenizer, chunked) = tokenizer(&pre_tokenizer);
            for text in [
                "",
                " ",
                "\n",
                "a b",
                "a  b",
                "a \n b",
                "a\nb",
                "a\n\nb",
                ".\na",
                ".\n\n a",
                "a b ",
                " a",
                "\na",
                "a\n",
                "1 2 12 a1 1a",
                "it's 'sa ' s",
                "<|im_start|>user\na b<|im_end|>\n",
                "a<s> <s>b",
                "<s>",
                "ä ö",
                "a\u{a0}b a\u{301} b",
                "a \u{301}b",
                "a\r\nb\tb",
                "<\u{fdd0}\u{fdd1}s> a",
                "a \u{fdd0}\u{fdd1}b",
                ". . .\n.",
                "a\u{2028}b c",
            ] {
                // Twice: as it comes, and as it is remembered.
                assert_same(&tokenizer, &chunked, text);
                assert_same(&tokenizer, &chunked, text);
            }
        }
    }

    #[test]
    fn words_that_end_otherwise_and_bytes_without_a_token_are_left_to_the_tokenizer() {
        let mut json = tokenizer_json(None);
        json["model"]["end_of_word_suffix"] = "b".into();
        json["model"]["vocab"].as_object_mut().expect("tokens").remove("z");
        let (tokenizer, chunked) = load(json);
        assert_eq!(tokenizer.encode("a", false).expect("tokens").get_ids(), [303], "ab");
        assert!(tokenizer.encode("z", false).expect("tokens").is_empty());
        for text in ["a a.a", "az zaza z", "zzz", "a\n\na ä a"] {
            assert_same(&tokenizer, &chunked, text);
            assert_same(&tokenizer, &chunked, text);
        }
        let mut json = tokenizer_json(None);
        json["model"]["vocab"].as_object_mut().expect("tokens").remove("z");
        let (tokenizer, chunked) = load(json);
        for text in ["a a.a", "az zaza z", "zzz", "a\n\na ä a"] {
            assert_same(&tokenizer, &chunked, text);
            assert_same(&tokenizer, &chunked, text);
        }
    }

    #[test]
    fn other_kinds_of_tokenizers_have_no_chunks() {
        let (json, _) = byte_tokenizer_json(&json!({}), &json!({}));
        let json: Value = serde_json::from_slice(&json).expect("JSON");
        assert!(Chunked::new(&json).is_some());
        for (path, value) in [
            ("/pre_tokenizer", json!({"type": "Metaspace", "replacement": "▁"})),
            ("/pre_tokenizer/add_prefix_space", json!(true)),
            ("/pre_tokenizer/use_regex", json!(false)),
            ("/normalizer", json!({"type": "Lowercase"})),
            ("/normalizer", json!({"type": "Prepend", "prepend": "▁"})),
            ("/added_tokens/0/lstrip", json!(true)),
            ("/added_tokens/0/normalized", json!(true)),
            ("/model/type", json!("Unigram")),
            ("/model/dropout", json!(0.1)),
        ] {
            let mut json = json.clone();
            *json.pointer_mut(path).expect(path) = value;
            assert!(Chunked::new(&json).is_none(), "{path}");
        }
    }

    proptest! {
        #[test]
        fn any_text_has_the_tokens_of_the_whole_text(
            text in "([ab1.,'s]|[ \n\t\r]|ä|\u{301}|\u{a0}|<s>|<|im_end|>|\u{fdd0}\u{fdd1}| |a){0,40}",
            which in 0usize..5,
        ) {
            let (tokenizer, chunked) = tokenizer(&pre_tokenizers()[which]);
            assert_same(&tokenizer, &chunked, &text);
        }
    }
}
