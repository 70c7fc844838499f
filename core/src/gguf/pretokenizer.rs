//! How byte-level BPE cuts text into words. GGUF names the way, and each program brings its own
//! table of what a name means; `tokenizer.json` spells it.

use serde_json::{Value, json};

/// A way to cut text, as `tokenizer.json` has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Pretokenizer {
    /// `pre_tokenizer`.
    pub json: Value,
    /// `normalizer`.
    pub normalizer: Value,
    /// Take a word that is a token as it is, without merging up to it.
    pub ignore_merges: bool,
    /// Begin every text with the BOS token, where the file does not say.
    pub begins: bool,
}

/// The name that is written for each way; [`Pretokenizer::named`] knows others that mean the same.
const NAMES: [&str; 7] = ["gpt-2", "smollm", "llama-bpe", "tekken", "dbrx", "gpt-4o", "qwen2"];

impl Pretokenizer {
    /// The pre-tokenizer that Hugging Face's `tokenizer.json` has for the models of that name
    /// (`tokenizer.ggml.pre`).
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let digits = json!({"type": "Digits", "individual_digits": true});
        let plain =
            |json| Self { json, normalizer: Value::Null, ignore_merges: false, begins: false };
        let whole_words = |json| Self { ignore_merges: true, begins: true, ..plain(json) };
        match name {
            "gpt-2" | "phi-2" | "olmo" => Some(plain(byte_level(false, true))),
            "smollm" | "starcoder" | "refact" => Some(plain(sequence(digits, true))),
            "llama-bpe" | "llama3" | "llama-v3" => {
                Some(whole_words(sequence(split(&cl100k(r"\p{N}{1,3}")), false)))
            }
            "tekken" => Some(whole_words(sequence(split(&o200k("", r"\p{N}")), false))),
            "dbrx" => Some(plain(sequence(split(&cl100k(r"\p{N}{1,3}")), false))),
            "gpt-4o" => Some(plain(sequence(split(&o200k(CONTRACTIONS, r"\p{N}{1,3}")), false))),
            "qwen2" | "deepseek-r1-qwen" => Some(Self {
                normalizer: json!({"type": "NFC"}),
                ..plain(sequence(split(&cl100k(r"\p{N}")), false))
            }),
            _ => None,
        }
    }

    /// The name of the way that a `tokenizer.json` with these parts cuts text.
    #[must_use]
    pub fn name_of(
        pre_tokenizer: &Value,
        normalizer: &Value,
        ignore_merges: bool,
    ) -> Option<&'static str> {
        let json = without_offsets(pre_tokenizer);
        NAMES.into_iter().find(|name| {
            Self::named(name).is_some_and(|known| {
                without_offsets(&known.json) == json
                    && known.normalizer == *normalizer
                    && known.ignore_merges == ignore_merges
            })
        })
    }
}

/// Without `trim_offsets`, which moves no token.
fn without_offsets(json: &Value) -> Value {
    match json {
        Value::Object(fields) => Value::Object(
            fields
                .iter()
                .filter(|(name, _)| *name != "trim_offsets")
                .map(|(name, value)| (name.clone(), without_offsets(value)))
                .collect(),
        ),
        Value::Array(list) => Value::Array(list.iter().map(without_offsets).collect()),
        other => other.clone(),
    }
}

/// The pre-tokenizer, or the decoder, of byte-level BPE.
#[must_use]
pub fn byte_level(add_prefix_space: bool, use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": true,
        "use_regex": use_regex,
    })
}

fn sequence(first: Value, use_regex: bool) -> Value {
    json!({"type": "Sequence", "pretokenizers": [first, byte_level(false, use_regex)]})
}

fn split(regex: &str) -> Value {
    json!({
        "type": "Split",
        "pattern": {"Regex": regex},
        "behavior": "Isolated",
        "invert": false,
    })
}

/// The regular expression of cl100k and its children, which differ in how `digits` are cut.
fn cl100k(digits: &str) -> String {
    format!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
}

/// What o200k keeps at the end of a word.
const CONTRACTIONS: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?";

/// That of o200k and its children: words are cut where small letters end and capitals begin.
fn o200k(contractions: &str, digits: &str) -> String {
    let (upper, lower) = (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]");
    let before = r"[^\r\n\p{L}\p{N}]?";
    format!(
        r"{before}{upper}*{lower}+{contractions}|{before}{upper}+{lower}*{contractions}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
}
