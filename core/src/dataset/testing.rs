//! A tokenizer for tests: one token a byte, and a few special ones.

use super::tokenizer::ChatTokenizer;
use serde_json::{Map, Value, json};

/// ChatML, the template of the Qwen and SmolLM families, in short.
pub(super) const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + \
    m.content + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}\
    {{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Id of `<|im_end|>`, the end token. Bytes are 0 to 255 in GPT-2's order.
pub(super) const END: u32 = 257;

/// The tokenizer with [`CHATML`].
pub(super) fn chatml() -> ChatTokenizer {
    byte_tokenizer(&json!({}), &json!({}))
}

/// The same with some fields of its two files set.
pub(super) fn byte_tokenizer(json: &Value, config: &Value) -> ChatTokenizer {
    let (json, config) = byte_tokenizer_json(json, config);
    ChatTokenizer::from_parts(&json, &config, None).expect("tokenizer")
}

/// Its two files.
pub(super) fn byte_tokenizer_json(json: &Value, config: &Value) -> (Vec<u8>, Vec<u8>) {
    let special = ["<|im_start|>", "<|im_end|>", "<s>"];
    let added: Vec<_> = special
        .iter()
        .enumerate()
        .map(|(index, text)| {
            json!({"id": 256 + index, "content": text, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": true});
    let mut vocabulary = Map::new();
    for (id, letter) in byte_letters().into_iter().enumerate() {
        vocabulary.insert(letter.to_string(), id.into());
    }
    let base = json!({
        "version": "1.0",
        "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": null,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": vocabulary, "merges": []},
    });
    let base_config = json!({"bos_token": null, "eos_token": {"content": "<|im_end|>"},
        "chat_template": CHATML});
    (with(base, json), with(base_config, config))
}

fn with(base: Value, changes: &Value) -> Vec<u8> {
    let (Value::Object(mut base), Value::Object(changes)) = (base, changes.clone()) else {
        panic!("objects");
    };
    base.extend(changes);
    serde_json::to_vec(&base).expect("JSON")
}

/// The 256 letters that stand for bytes, as GPT-2 chose them.
fn byte_letters() -> Vec<char> {
    let printable = |byte: &u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let (own, other): (Vec<u32>, Vec<u32>) = (0..256).partition(printable);
    let moved = (0..other.len()).map(|index| 256 + u32::try_from(index).expect("small"));
    own.into_iter().chain(moved).map(|code| char::from_u32(code).expect("letter")).collect()
}
