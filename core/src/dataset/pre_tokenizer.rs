//! How a byte-level tokenizer parts text before it makes tokens of each part.
//!
//! The patterns known here are those of GPT-2, of Llama 3 and of Qwen 2. Text of ASCII alone is
//! parted here as the pattern's alternatives say, one after another, which is many times as fast
//! as a search for a regular expression; and tests hold it against that search.

use serde_json::Value;

/// Llama 3's pattern.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same, but digits one by one.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A known way to part text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PreTokenizer {
    /// GPT-2's pattern:
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`.
    Gpt2 {
        /// Digits that were taken out before.
        digits: Digits,
    },
    /// [`LLAMA3`], or with another number of digits its children's.
    Llama3 {
        /// As many digits are one part.
        digits: usize,
    },
}

/// What a step before the pattern does with digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Digits {
    /// There is no such step.
    Kept,
    /// Each is a part.
    Single,
    /// Those beside each other are a part.
    Joined,
}

impl PreTokenizer {
    /// The way of this `pre_tokenizer`, if it is known, and nothing is written in front of a text.
    pub(super) fn of(pre_tokenizer: &Value) -> Option<Self> {
        let steps = match pre_tokenizer["type"].as_str() {
            Some("Sequence") => {
                pre_tokenizer["pretokenizers"].as_array().map_or(&[][..], Vec::as_slice)
            }
            _ => std::slice::from_ref(pre_tokenizer),
        };
        let (last, before) = steps.split_last()?;
        if last["type"] != "ByteLevel" || last["add_prefix_space"] != false {
            return None;
        }
        // A file that does not say is older than the choice.
        let has_own_pattern = last["use_regex"] != false;
        match before {
            [] if has_own_pattern => Some(Self::Gpt2 { digits: Digits::Kept }),
            [step] if has_own_pattern && step["type"] == "Digits" => {
                let digits = match step["individual_digits"].as_bool()? {
                    true => Digits::Single,
                    false => Digits::Joined,
                };
                Some(Self::Gpt2 { digits })
            }
            [step] if !has_own_pattern && step["type"] == "Split" => {
                if step["behavior"] != "Isolated" || step["invert"] != false {
                    return None;
                }
                match step["pattern"]["Regex"].as_str()? {
                    LLAMA3 => Some(Self::Llama3 { digits: 3 }),
                    QWEN2 => Some(Self::Llama3 { digits: 1 }),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    /// Bytes of the first part of `text`, which is of ASCII and not empty.
    pub(super) fn first_part(self, text: &[u8]) -> usize {
        match self {
            Self::Gpt2 { digits } => first_of_gpt2(text, digits),
            Self::Llama3 { digits } => first_of_llama3(text, digits),
        }
    }
}

/// What a pattern tells characters apart by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Digit,
    /// `[\r\n]`
    LineBreak,
    /// Other `\s`.
    Space,
    /// `[^\s\p{L}\p{N}]`
    Other,
}

const CLASSES: [Class; 128] = {
    let mut classes = [Class::Other; 128];
    let mut byte = 0;
    while byte < 128 {
        classes[byte as usize] = match byte {
            b'a'..=b'z' | b'A'..=b'Z' => Class::Letter,
            b'0'..=b'9' => Class::Digit,
            b'\r' | b'\n' => Class::LineBreak,
            b'\t' | 0x0b | 0x0c | b' ' => Class::Space,
            _ => Class::Other,
        };
        byte += 1;
    }
    classes
};

fn class(text: &[u8], at: usize) -> Option<Class> {
    text.get(at).map(|&byte| CLASSES[usize::from(byte & 127)])
}

/// Where what begins at `from` and is of the wanted classes ends.
fn run(text: &[u8], from: usize, is_wanted: impl Fn(Class) -> bool) -> usize {
    let mut end = from;
    while class(text, end).is_some_and(&is_wanted) {
        end += 1;
    }
    end
}

const fn is_white(class: Class) -> bool {
    matches!(class, Class::LineBreak | Class::Space)
}

/// Bytes of `'s|'t|'re|'ve|'m|'ll|'d` at the start.
fn contraction(text: &[u8], ignores_case: bool) -> Option<usize> {
    let letter = |at: usize| match text.get(at) {
        Some(letter) if ignores_case => letter.to_ascii_lowercase(),
        Some(&letter) => letter,
        None => 0,
    };
    match (text[0], letter(1), letter(2)) {
        (b'\'', b's' | b't' | b'm' | b'd', _) => Some(2),
        (b'\'', b'r' | b'v', b'e') | (b'\'', b'l', b'l') => Some(3),
        _ => None,
    }
}

fn first_of_gpt2(text: &[u8], digits: Digits) -> usize {
    if let Some(length) = contraction(text, false) {
        return length;
    }
    // ` ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+`
    let lead = usize::from(text[0] == b' ');
    match (class(text, lead), digits) {
        (Some(wanted @ (Class::Letter | Class::Other)), _)
        | (Some(wanted @ Class::Digit), Digits::Kept) => {
            return run(text, lead, |class| class == wanted);
        }
        (Some(Class::Digit), Digits::Single) if lead == 0 => return 1,
        (Some(Class::Digit), Digits::Joined) if lead == 0 => {
            return run(text, 0, |class| class == Class::Digit);
        }
        _ => {}
    }
    let end = run(text, 0, is_white);
    let ends_the_text = match class(text, end) {
        None => true,
        Some(next) => next == Class::Digit && digits != Digits::Kept,
    };
    white_space(end, ends_the_text)
}

fn first_of_llama3(text: &[u8], digits: usize) -> usize {
    if let Some(length) = contraction(text, true) {
        return length;
    }
    let is_letter = |class| class == Class::Letter;
    // `[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}`
    match class(text, 0) {
        Some(Class::Letter) => return run(text, 0, is_letter),
        Some(Class::Digit) => {
            return run(&text[..text.len().min(digits)], 0, |class| class == Class::Digit);
        }
        Some(Class::Space | Class::Other) if class(text, 1) == Some(Class::Letter) => {
            return run(text, 1, is_letter);
        }
        _ => {}
    }
    // ` ?[^\s\p{L}\p{N}]+[\r\n]*`
    let lead = usize::from(text[0] == b' ');
    if class(text, lead) == Some(Class::Other) {
        let end = run(text, lead, |class| class == Class::Other);
        return run(text, end, |class| class == Class::LineBreak);
    }
    // `\s*[\r\n]+`
    let end = run(text, 0, is_white);
    let line_break = |&byte: &u8| matches!(byte, b'\r' | b'\n');
    match text[..end].iter().rposition(line_break) {
        Some(last) => last + 1,
        None => white_space(end, end == text.len()),
    }
}

/// Bytes of `\s+(?!\S)|\s+` where white space reaches up to `end`.
fn white_space(end: usize, ends_the_text: bool) -> usize {
    match ends_the_text {
        true => end,
        false => (end - 1).max(1),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use tokenizers::{
        OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _, PreTokenizerWrapper,
    };

    /// Each way that is known, as a `tokenizer.json` has it; first GPT-2's.
    pub(in super::super) fn all() -> Vec<Value> {
        let byte_level = |use_regex: bool| {
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                "use_regex": use_regex})
        };
        let sequence = |first: Value, use_regex| json!({"type": "Sequence", "pretokenizers": [first, byte_level(use_regex)]});
        let digits = |single: bool| json!({"type": "Digits", "individual_digits": single});
        let split = |pattern: &str| {
            json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                "invert": false})
        };
        vec![
            byte_level(true),
            sequence(digits(true), true),
            sequence(digits(false), true),
            sequence(split(LLAMA3), false),
            sequence(split(QWEN2), false),
        ]
    }

    /// The ends of the parts that the tokenizer library makes, and of ours.
    fn ends(json: &Value, text: &str) -> (Vec<usize>, Vec<usize>) {
        let library: PreTokenizerWrapper =
            serde_json::from_value(json.clone()).expect("a pre-tokenizer");
        let mut parted = PreTokenizedString::from(text);
        library.pre_tokenize(&mut parted).expect("parts");
        let theirs = parted.get_splits(OffsetReferential::Original, OffsetType::Byte);
        let theirs = theirs.into_iter().map(|(_, (_, end), _)| end).collect();
        let known = PreTokenizer::of(json).expect("a known way");
        let (mut ours, mut done) = (Vec::new(), 0);
        while done < text.len() {
            done += known.first_part(&text.as_bytes()[done..]);
            ours.push(done);
        }
        (theirs, ours)
    }

    /// Every text of `length` of these letters.
    fn texts<'a>(letters: &'a [&'a str], length: u32) -> impl Iterator<Item = String> {
        let count = letters.len();
        let letter = move |number: usize, place| letters[number / count.pow(place) % count];
        (0..count.pow(length))
            .map(move |number| (0..length).map(|place| letter(number, place)).collect())
    }

    #[test]
    fn every_short_text_is_parted_as_the_library_parts_it() {
        // Each of the characters that a pattern names, and one of each class.
        let named = ["'", "s", "T", "r", "e", "l", "1", " ", "\n", "\r", "\t", ".", "\u{1f}"];
        let classes = ["a", "1", ".", " ", "\n"];
        for json in all() {
            for text in texts(&named, 3).chain(texts(&classes, 5)) {
                let (theirs, ours) = ends(&json, &text);
                assert_eq!(ours, theirs, "{text:?} {json}");
            }
        }
    }

    #[test]
    fn every_character_of_ascii_is_in_the_librarys_class() {
        for json in all() {
            for byte in 0..128u8 {
                for around in [["", ""], ["a", "a"], [" ", "1"], ["\n", "."], [" ", " "]] {
                    let text = format!("{}{}{}", around[0], char::from(byte), around[1]);
                    let (theirs, ours) = ends(&json, &text);
                    assert_eq!(ours, theirs, "{text:?} {json}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_known_is_left_to_the_library() {
        let mut prefixed = all()[0].clone();
        prefixed["add_prefix_space"] = true.into();
        let mut removed = all()[3].clone();
        removed["pretokenizers"][0]["behavior"] = "Removed".into();
        let mut other = all()[3].clone();
        other["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+".into();
        let metaspace = json!({"type": "Metaspace", "replacement": "▁"});
        for json in [prefixed, removed, other, metaspace, Value::Null] {
            assert_eq!(PreTokenizer::of(&json), None, "{json}");
        }
    }

    proptest! {
        #[test]
        fn any_text_of_ascii_is_parted_as_the_library_parts_it(
            text in "([ -~]|[a-zA-Z]{1,9}|[0-9]{1,5}|'(s|S|t|re|VE|m|ll|d)|[ \n\r\t\u{b}\u{c}]{1,4}|[\0-\x7f]){0,60}",
            which in 0usize..5,
        ) {
            let (theirs, ours) = ends(&all()[which], &text);
            prop_assert_eq!(ours, theirs);
        }
    }
}
