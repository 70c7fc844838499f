//! `tokenizer.json` and its companions → the tokenizer in a GGUF's metadata.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value as Json;

use super::GgufError;
use super::header::Value;
use super::pretokenizer::Pretokenizer;

/// Entries of `tokenizer.ggml.token_type`, as llama.cpp numbers them.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
/// A row of the embedding that no text leads to.
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// The parts of `tokenizer.json` that a GGUF has a place for.
#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    normalizer: Json,
    #[serde(default)]
    pre_tokenizer: Json,
    model: Model,
}

#[derive(Deserialize)]
struct Added {
    id: usize,
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    vocab: HashMap<String, usize>,
    #[serde(default)]
    merges: Vec<Merge>,
    #[serde(default)]
    unk_token: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
}

/// Two pieces, in either of the two spellings of `tokenizer.json`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Joined(String),
}

impl Merge {
    fn pair(&self) -> (&str, &str) {
        match self {
            Self::Pair(left, right) => (left, right),
            Self::Joined(both) => both.split_once(' ').unwrap_or((both, "")),
        }
    }
}

/// A tokenizer as a GGUF has it.
pub(super) struct Tokenizer {
    pub(super) metadata: Vec<(String, Value)>,
    /// Texts of the tokens that end an answer.
    pub(super) stops: Vec<String>,
}

/// What is known of a tokenizer beside `tokenizer.json`.
pub(super) struct Roles<'a> {
    /// `bos_token`, `eos_token` and the others of `tokenizer_config.json`, with their texts.
    pub(super) named: &'a [(&'static str, String)],
    /// Whether every text begins with the BOS token.
    pub(super) begins: bool,
    /// `eos_token_id` of `generation_config.json`: a number, a list, or null.
    pub(super) stops: &'a Json,
    /// The chat template.
    pub(super) template: Option<&'a str>,
}

/// Carries over the tokenizer of `tokenizer_json` to a model whose embedding has `rows` rows.
pub(super) fn tokenizer(
    tokenizer_json: &[u8],
    roles: &Roles<'_>,
    rows: usize,
) -> Result<Tokenizer, GgufError> {
    let file: File = serde_json::from_slice(tokenizer_json)
        .map_err(|error| GgufError::new(format!("tokenizer.json: {error}")))?;
    if file.model.kind != "BPE" {
        return Err(GgufError::new(format!(
            "the tokenizer is of the kind {:?}, and only BPE can be carried over; download it \
             with format=merged",
            file.model.kind
        )));
    }
    let (tokens, types) = vocabulary(&file, rows)?;
    let ids: HashMap<&str, usize> =
        tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
    let mut metadata = Vec::new();
    let mut put = |name: &str, value: Value| {
        metadata.push((format!("tokenizer.ggml.{name}"), value));
    };
    if file.model.byte_fallback {
        put("model", "llama".into());
        put("pre", "default".into());
        put("scores", Value::Reals(scores(&file.model.merges, &ids, tokens.len())));
        put("add_space_prefix", Value::Flag(space_first(&file.normalizer, &file.pre_tokenizer)));
    } else {
        let pre =
            Pretokenizer::name_of(&file.pre_tokenizer, &file.normalizer, file.model.ignore_merges);
        let pre = pre.ok_or_else(|| {
            GgufError::new(
                "the pre_tokenizer of tokenizer.json is none that GGUF has a name for; download \
                 the model with format=merged",
            )
        })?;
        put("model", "gpt2".into());
        put("pre", pre.into());
        let joined = file.model.merges.iter().map(|merge| {
            let (left, right) = merge.pair();
            format!("{left} {right}")
        });
        put("merges", Value::Texts(joined.collect()));
        put("add_space_prefix", Value::Flag(false));
    }
    put("token_type", Value::Integers(types));
    let mut eos = None;
    for (role, name) in [
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"),
        ("pad_token", "padding_token_id"),
    ] {
        let text = roles.named.iter().find(|(known, _)| *known == role).map(|(_, text)| text);
        if let Some(&id) = text.and_then(|text| ids.get(text.as_str())) {
            put(name, (id as u32).into());
            eos = if role == "eos_token" { Some(id) } else { eos };
        }
    }
    let mut stops: Vec<usize> = eos.into_iter().collect();
    let more = match roles.stops {
        Json::Array(list) => list.iter().filter_map(Json::as_u64).collect(),
        other => other.as_u64().into_iter().collect::<Vec<_>>(),
    };
    for id in more.into_iter().map(|id| id as usize).filter(|&id| id < tokens.len()) {
        if !stops.contains(&id) {
            stops.push(id);
        }
    }
    // The second of two is what ends a turn.
    if let [_, turn] = stops[..] {
        put("eot_token_id", (turn as u32).into());
    }
    put("add_bos_token", Value::Flag(roles.begins));
    put("add_eos_token", Value::Flag(false));
    let stops = stops.into_iter().map(|id| tokens[id].clone()).collect();
    put("tokens", Value::Texts(tokens));
    if let Some(template) = roles.template {
        metadata.push(("tokenizer.chat_template".to_owned(), template.into()));
    }
    Ok(Tokenizer { metadata, stops })
}

/// Every row of the embedding with its token, and what kind each is of.
fn vocabulary(file: &File, rows: usize) -> Result<(Vec<String>, Vec<i32>), GgufError> {
    let mut tokens: Vec<Option<(String, i32)>> = vec![None; rows];
    let own = file.model.vocab.iter().map(|(token, &id)| {
        let kind = match token.as_str() {
            token if file.model.unk_token.as_deref() == Some(token) => UNKNOWN,
            token if file.model.byte_fallback && is_byte(token) => BYTE,
            _ => NORMAL,
        };
        (id, token, kind)
    });
    let added = file.added_tokens.iter().map(|added| {
        let is_unknown = file.model.unk_token.as_ref() == Some(&added.content);
        let kind = match added.special {
            true if is_unknown && file.model.byte_fallback => UNKNOWN,
            true => CONTROL,
            false => USER_DEFINED,
        };
        (added.id, &added.content, kind)
    });
    for (id, token, kind) in own.chain(added) {
        let Some(place) = tokens.get_mut(id) else {
            return Err(GgufError::new(format!(
                "token {token:?} has number {id}, and the embedding has {rows} rows"
            )));
        };
        *place = Some((token.clone(), kind));
    }
    // As llama.cpp's converter fills them.
    Ok(tokens
        .into_iter()
        .enumerate()
        .map(|(id, token)| token.unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED)))
        .unzip())
}

/// `<0x00>` to `<0xFF>`.
fn is_byte(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// SentencePiece merges pairs best score of the merged piece first; `tokenizer.json` has the pairs
/// in that order and no scores. A piece's score is here minus its place in that order, which gives
/// the order back. Pieces that are never merged come last.
fn scores(merges: &[Merge], ids: &HashMap<&str, usize>, tokens: usize) -> Vec<f32> {
    let mut places: Vec<Option<usize>> = vec![None; tokens];
    let mut next = 0;
    let mut merged = String::new();
    for merge in merges {
        let (left, right) = merge.pair();
        merged.clear();
        merged.push_str(left);
        merged.push_str(right);
        if let Some(&id) = ids.get(merged.as_str())
            && places[id].is_none()
        {
            places[id] = Some(next);
            next += 1;
        }
    }
    // f32 holds whole numbers up to 2^24, beyond any vocabulary.
    places.into_iter().map(|place| -(place.unwrap_or(next) as f32)).collect()
}

/// Whether every text gets a space in front.
fn space_first(normalizer: &Json, pre_tokenizer: &Json) -> bool {
    let parts = |json: &Json, list: &str| -> Vec<Json> {
        json[list].as_array().cloned().unwrap_or_else(|| vec![json.clone()])
    };
    let prepends = parts(normalizer, "normalizers").iter().any(|part| part["type"] == "Prepend");
    let splits = parts(pre_tokenizer, "pretokenizers").iter().any(|part| {
        part["type"] == "Metaspace"
            && (part["prepend_scheme"] == "always"
                || part["prepend_scheme"] == "first"
                || part["add_prefix_space"] == true)
    });
    prepends || splits
}
