//! What `tokenizer.json` and `tokenizer_config.json` say, and what we change of it.

use super::protect::MARK;
use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

/// The variables that transformers gives to chat templates, with their texts.
pub(crate) fn named_special_tokens(config: &Map<String, Value>) -> Vec<(&'static str, String)> {
    const NAMES: [&str; 7] = [
        "bos_token",
        "eos_token",
        "unk_token",
        "sep_token",
        "pad_token",
        "cls_token",
        "mask_token",
    ];
    NAMES
        .into_iter()
        .filter_map(|name| {
            let value = config.get(name)?;
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some((name, text.to_owned()))
        })
        .collect()
}

/// Changes a tokenizer.json so that marks are taken out of text after special tokens were looked
/// for in it. Returns the special tokens, or `None` if it has not the form of one.
pub(super) fn prepare(
    json: &mut Value,
    named: &[(&'static str, String)],
) -> Option<Vec<(String, u32)>> {
    let fields = json.as_object_mut()?;
    fields.insert("truncation".to_owned(), Value::Null);
    fields.insert("padding".to_owned(), Value::Null);
    let unmark = json!({"type": "Replace", "pattern": {"String": MARK}, "content": ""});
    let normalizer = match fields.remove("normalizer").unwrap_or_default() {
        Value::Null => unmark,
        own => json!({"type": "Sequence", "normalizers": [unmark, own]}),
    };
    fields.insert("normalizer".to_owned(), normalizer);
    let mut special = Vec::new();
    for token in fields.get_mut("added_tokens")?.as_array_mut()? {
        let text = token["content"].as_str()?.to_owned();
        let id = u32::try_from(token["id"].as_u64()?).ok()?;
        if token["special"] == true || named.iter().any(|(_, known)| *known == text) {
            token["special"] = true.into();
            // A normalized one would be looked for when the marks are gone.
            token["normalized"] = false.into();
            special.push((text, id));
        }
    }
    Some(special)
}

/// Whether plain text gets the token `begin` in front.
pub(super) fn begins_every_text(
    tokenizer: &Tokenizer,
    config: &Map<String, Value>,
    begin: u32,
) -> bool {
    if let Some(says) = config.get("add_bos_token").and_then(Value::as_bool) {
        return says;
    }
    let begins = |add_special_tokens| {
        tokenizer
            .encode("a", add_special_tokens)
            .is_ok_and(|encoding| encoding.get_ids().first() == Some(&begin))
    };
    begins(true) && !begins(false)
}

/// The chat templates by name; the only one is called `default`.
pub(crate) fn chat_templates<'a>(
    config: &'a Map<String, Value>,
    file: Option<&'a str>,
) -> Vec<(&'a str, &'a str)> {
    if let Some(source) = file {
        return vec![("default", source)];
    }
    match config.get("chat_template") {
        Some(Value::String(source)) => vec![("default", source)],
        Some(Value::Array(list)) => list
            .iter()
            .filter_map(|entry| Some((entry["name"].as_str()?, entry["template"].as_str()?)))
            .collect(),
        _ => Vec::new(),
    }
}
