//! Encodes text in chunks and remembers what they became, as words come again and again.
//!
//! A byte-level tokenizer parts text by a pattern before it makes tokens, and with the patterns
//! known here a new part begins at these places whatever stands further off:
//!
//! - before and after a special token;
//! - before a space that has no white space beside it;
//! - after a newline that has no white space beside it.
//!
//! So the tokens of a text are those of its chunks between such places, one after another. That is
//! exact, and tests hold it against the tokenizer's own way with texts of every kind. Another kind
//! of tokenizer has no chunks.

use super::protect::MARK;
use super::tokenizer::Encoded;
use aho_corasick::{AhoCorasick, MatchKind};
use serde_json::Value;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use tokenizers::Tokenizer;

/// Longer chunks are encoded each time: they hardly come again.
const MAX_CHUNK_BYTES: usize = 64;
/// Chunks that are remembered, about 16 MB of them.
const MAX_CHUNKS: usize = 1 << 17;
/// Patterns after which a space or a newline between other characters begins a part: Llama 3's,
/// and Qwen 2's, which takes digits one by one.
const PATTERNS: [&str; 2] = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// A token's id, and where it lies in its chunk.
type ChunkToken = (u32, u8, u8);

/// Encodes chunk by chunk.
pub(super) struct Chunked {
    special: AhoCorasick,
    known: Mutex<HashMap<Box<str>, Box<[ChunkToken]>>>,
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
        let has_chunks = added.iter().all(plain)
            && keeps_spaces(&json["normalizer"])
            && has_known_pattern(&json["pre_tokenizer"])
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
        Some(Self { special, known: Mutex::new(HashMap::new()) })
    }

    /// The tokens of `text`, as `tokenizer` makes them of all of it.
    pub(super) fn encode(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
    ) -> Result<Encoded, tokenizers::Error> {
        let mut encoded = Encoded { ids: Vec::new(), offsets: Vec::new() };
        // Another thread that encodes just now has the memory to itself.
        let mut known = self.known.try_lock().ok();
        let mut done = 0;
        for special in self.special.find_iter(text) {
            encode_part(tokenizer, text, done..special.start(), &mut known, &mut encoded)?;
            encode_chunk(tokenizer, text, special.range(), &mut known, &mut encoded)?;
            done = special.end();
        }
        encode_part(tokenizer, text, done..text.len(), &mut known, &mut encoded)?;
        Ok(encoded)
    }
}

type Known<'a> = Option<MutexGuard<'a, HashMap<Box<str>, Box<[ChunkToken]>>>>;

/// Encodes a part of the text without special tokens.
fn encode_part(
    tokenizer: &Tokenizer,
    text: &str,
    part: std::ops::Range<usize>,
    known: &mut Known<'_>,
    encoded: &mut Encoded,
) -> Result<(), tokenizers::Error> {
    let bytes = text[part.clone()].as_bytes();
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
            let chunk = part.start + start..part.start + begins;
            encode_chunk(tokenizer, text, chunk, known, encoded)?;
            start = begins;
        }
    }
    encode_chunk(tokenizer, text, part.start + start..part.end, known, encoded)
}

fn encode_chunk(
    tokenizer: &Tokenizer,
    text: &str,
    range: std::ops::Range<usize>,
    known: &mut Known<'_>,
    encoded: &mut Encoded,
) -> Result<(), tokenizers::Error> {
    let (chunk, from) = (&text[range.clone()], range.start);
    if chunk.is_empty() {
        return Ok(());
    }
    if let Some(tokens) = known.as_ref().and_then(|known| known.get(chunk)) {
        for &(id, start, end) in tokens {
            encoded.ids.push(id);
            encoded.offsets.push((from + usize::from(start), from + usize::from(end)));
        }
        return Ok(());
    }
    let encoding = tokenizer.encode(chunk, false)?;
    let offsets = encoding.get_offsets();
    if let Some(known) = known
        && chunk.len() <= MAX_CHUNK_BYTES
        && known.len() < MAX_CHUNKS
    {
        let token = |(&id, &(start, end)): (&u32, &(usize, usize))| (id, start as u8, end as u8);
        known.insert(chunk.into(), encoding.get_ids().iter().zip(offsets).map(token).collect());
    }
    encoded.ids.extend_from_slice(encoding.get_ids());
    encoded.offsets.extend(offsets.iter().map(|&(start, end)| (from + start, from + end)));
    Ok(())
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

/// Whether text is parted by GPT-2's pattern, perhaps with digits taken out before, or by one of
/// [`PATTERNS`]; and nothing is written in front of it.
fn has_known_pattern(pre_tokenizer: &Value) -> bool {
    let steps = match pre_tokenizer["type"].as_str() {
        Some("Sequence") => {
            pre_tokenizer["pretokenizers"].as_array().map_or(&[][..], Vec::as_slice)
        }
        _ => std::slice::from_ref(pre_tokenizer),
    };
    let Some((last, before)) = steps.split_last() else { return false };
    if last["type"] != "ByteLevel" || last["add_prefix_space"] != false {
        return false;
    }
    // A file that does not say is older than the choice.
    let has_own_pattern = last["use_regex"] != false;
    let is_digits = |step: &Value| step["type"] == "Digits";
    let is_pattern = |step: &Value| {
        step["type"] == "Split"
            && step["behavior"] == "Isolated"
            && step["invert"] == false
            && PATTERNS.iter().any(|pattern| step["pattern"]["Regex"] == *pattern)
    };
    match before {
        [] => has_own_pattern,
        [step] => is_digits(step) && has_own_pattern || is_pattern(step) && !has_own_pattern,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::byte_tokenizer_json;
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    /// A tokenizer whose merges reach over everything that a pattern could part: spaces, newlines,
    /// punctuation and digits.
    fn tokenizer(pre_tokenizer: Option<&Value>) -> (Tokenizer, Chunked) {
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
        let chunked = Chunked::new(&json).expect("a tokenizer with chunks");
        (serde_json::from_value(json).expect("a tokenizer"), chunked)
    }

    fn pre_tokenizers() -> Vec<Option<Value>> {
        let byte_level = |use_regex: bool| {
            json!({"type": "ByteLevel", "add_prefix_space": false,
            "trim_offsets": true, "use_regex": use_regex})
        };
        let sequence = |first: Value, use_regex| {
            Some(json!({"type": "Sequence", "pretokenizers": [first, byte_level(use_regex)]}))
        };
        let split = |pattern: &str| {
            json!({"type": "Split", "pattern": {"Regex": pattern},
            "behavior": "Isolated", "invert": false})
        };
        vec![
            None,
            sequence(json!({"type": "Digits", "individual_digits": true}), true),
            sequence(split(PATTERNS[0]), false),
            sequence(split(PATTERNS[1]), false),
        ]
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
            let (tokenizer, chunked) = tokenizer(pre_tokenizer.as_ref());
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
            which in 0usize..4,
        ) {
            let (tokenizer, chunked) = tokenizer(pre_tokenizers()[which].as_ref());
            assert_same(&tokenizer, &chunked, &text);
        }
    }
}
