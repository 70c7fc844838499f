//! Byte-level BPE: GPT-2's kind of tokenizer, with the many ways to cut text into words.

use serde_json::{Value, json};

use super::super::metadata::Metadata;
use super::{Parts, Vocabulary};
use crate::error::EngineError;

/// What `tokenizer.json` holds for this vocabulary.
pub(super) fn parts(
    metadata: &Metadata,
    vocabulary: &Vocabulary<'_>,
) -> Result<Parts, EngineError> {
    let name = metadata.find_text("tokenizer.ggml.pre")?.unwrap_or_default();
    let pre = Pretokenizer::named(name).ok_or_else(|| {
        metadata.error(format_args!(
            "the pre-tokenizer {name:?} (tokenizer.ggml.pre) is not known: import the model from \
             its Hugging Face directory"
        ))
    })?;
    let merges = metadata.texts("tokenizer.ggml.merges")?;
    Ok(Parts {
        normalizer: pre.normalizer,
        pre_tokenizer: pre.json,
        decoder: byte_level(true, true),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": pre.ignore_merges,
            "vocab": vocabulary.ids(),
            "merges": merges,
        }),
        added_tokens: vocabulary.added_tokens(|_| json!({"normalized": false})),
        begins: metadata
            .find_flag("tokenizer.ggml.add_bos_token")?
            // Files from before the flag leave it to the program.
            .unwrap_or(pre.begins),
    })
}

/// How text is cut into words before BPE. GGUF names the way, and each program brings its own
/// table of what a name means.
struct Pretokenizer {
    json: Value,
    normalizer: Value,
    /// Take a word that is a token as it is, without merging up to it.
    ignore_merges: bool,
    /// Begin every text with the BOS token, where the file does not say.
    begins: bool,
}

impl Pretokenizer {
    /// The pre-tokenizer that Hugging Face's `tokenizer.json` has for the models of that name.
    fn named(name: &str) -> Option<Self> {
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
}

fn byte_level(add_prefix_space: bool, use_regex: bool) -> Value {
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
