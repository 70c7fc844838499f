//! The tokenizer in a GGUF's metadata → `tokenizer.json` and its companions.

use serde_json::{Map, Value, json};

use super::metadata::Metadata;
use crate::error::EngineError;

/// The one kind of vocabulary that can be rebuilt exactly: byte-level BPE.
const BYTE_LEVEL_BPE: &str = "gpt2";

/// Entries of `tokenizer.ggml.token_type`, as llama.cpp numbers them.
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// Ids of the tokens with a role.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct SpecialTokens {
    pub(super) bos: Option<u64>,
    pub(super) eos: Option<u64>,
    pub(super) pad: Option<u64>,
    unknown: Option<u64>,
    /// Ends a turn, where that is another token than `eos`.
    end_of_turn: Option<u64>,
}

impl SpecialTokens {
    fn read(metadata: &Metadata) -> Result<Self, EngineError> {
        let find = |name: &str| metadata.find_number(&format!("tokenizer.ggml.{name}_token_id"));
        let eos = find("eos")?;
        Ok(Self {
            bos: find("bos")?,
            eos,
            // A model without a padding token pads with its end, as the trainers around it do.
            pad: find("padding")?.or(eos),
            unknown: find("unknown")?,
            end_of_turn: find("eot")?.filter(|&id| Some(id) != eos),
        })
    }

    /// `generation_config.json`.
    pub(super) fn generation_config(&self) -> Value {
        let eos = match (self.eos, self.end_of_turn) {
            (Some(eos), Some(turn)) => json!([eos, turn]),
            (eos, turn) => json!(eos.or(turn)),
        };
        json!({
            "_from_model_config": true,
            "bos_token_id": self.bos,
            "eos_token_id": eos,
            "pad_token_id": self.pad,
        })
    }

    /// Each role's name in `tokenizer_config.json` beside its token.
    fn named<'a>(
        &self,
        metadata: &Metadata,
        tokens: &[&'a str],
    ) -> Result<Vec<(&'static str, &'a str)>, EngineError> {
        let roles = [
            ("bos_token", self.bos),
            ("eos_token", self.eos),
            ("pad_token", self.pad),
            ("unk_token", self.unknown),
        ];
        roles
            .into_iter()
            .filter_map(|(role, id)| id.map(|id| (role, id)))
            .map(|(role, id)| match tokens.get(id as usize) {
                Some(token) => Ok((role, *token)),
                None => Err(metadata.error(format_args!(
                    "{role} is number {id} of a vocabulary of {}",
                    tokens.len()
                ))),
            })
            .collect()
    }
}

/// The files that hold a tokenizer.
pub(super) struct Tokenizer {
    pub(super) special: SpecialTokens,
    pub(super) tokenizer: Value,
    pub(super) tokenizer_config: Value,
    pub(super) special_tokens_map: Value,
}

/// Rebuilds the tokenizer; `vocabulary` is the number of rows of the token embedding.
pub(super) fn rebuild(
    metadata: &Metadata,
    context_length: u64,
    vocabulary: usize,
) -> Result<Tokenizer, EngineError> {
    let kind = metadata.text("tokenizer.ggml.model")?;
    if kind != BYTE_LEVEL_BPE {
        return Err(metadata.error(format_args!(
            "the tokenizer is of the kind {kind:?} (tokenizer.ggml.model), and only byte-level \
             BPE ({BYTE_LEVEL_BPE:?}) can be rebuilt from a GGUF: import the model from its \
             Hugging Face directory"
        )));
    }
    let pre = Pretokenizer::named(metadata.find_text("tokenizer.ggml.pre")?.unwrap_or_default())
        .map_err(|name| {
            metadata.error(format_args!(
                "the pre-tokenizer {name:?} (tokenizer.ggml.pre) is not known: import the model \
                 from its Hugging Face directory"
            ))
        })?;
    let tokens = metadata.texts("tokenizer.ggml.tokens")?;
    let types = metadata.integers("tokenizer.ggml.token_type")?;
    let merges = metadata.texts("tokenizer.ggml.merges")?;
    if tokens.len() != vocabulary || types.len() != tokens.len() {
        return Err(metadata.error(format_args!(
            "{vocabulary} rows of the token embedding, {} tokens and {} token types do not belong \
             together",
            tokens.len(),
            types.len()
        )));
    }
    let special = SpecialTokens::read(metadata)?;
    let roles = special.named(metadata, &tokens)?;
    let template = metadata.find_text("tokenizer.chat_template")?.ok_or_else(|| {
        metadata.error(
            "there is no chat template (tokenizer.chat_template), without which conversations \
             cannot be written as text: import an instruct model",
        )
    })?;
    let added = added_tokens(&tokens, &types);
    let post_processor = match metadata.find_flag("tokenizer.ggml.add_bos_token")? {
        Some(true) => begin_with(&roles, special.bos),
        _ => Value::Null,
    };
    // The control tokens that the template spells are the ones that mark turns.
    let turn_marks: Vec<&str> = tokens
        .iter()
        .zip(&types)
        .filter(|(token, kind)| **kind == CONTROL && template.contains(**token))
        .map(|(token, _)| *token)
        .collect();

    Ok(Tokenizer {
        tokenizer: tokenizer_json(&tokens, &merges, &added, &pre, &post_processor),
        tokenizer_config: tokenizer_config(
            &roles,
            &added,
            &turn_marks,
            template,
            context_length,
            vocabulary,
        ),
        special_tokens_map: special_tokens_map(&roles, &turn_marks),
        special,
    })
}

fn added_tokens(tokens: &[&str], types: &[i32]) -> Vec<(usize, Value)> {
    let mut added = Vec::new();
    for (id, (token, kind)) in tokens.iter().zip(types).enumerate() {
        if ![UNKNOWN, CONTROL, USER_DEFINED].contains(kind) {
            continue;
        }
        let token = json!({
            "content": token,
            "single_word": false,
            "lstrip": false,
            "rstrip": false,
            "normalized": false,
            "special": *kind != USER_DEFINED,
        });
        added.push((id, token));
    }
    added
}

fn tokenizer_json(
    tokens: &[&str],
    merges: &[&str],
    added: &[(usize, Value)],
    pre: &Pretokenizer,
    post_processor: &Value,
) -> Value {
    let vocab: Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), json!(id))).collect();
    let added: Vec<Value> = added
        .iter()
        .map(|(id, token)| {
            let mut token = token.clone();
            token["id"] = json!(id);
            token
        })
        .collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": pre.normalizer,
        "pre_tokenizer": pre.json,
        "post_processor": post_processor,
        "decoder": byte_level(true, true),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": pre.ignore_merges,
            "vocab": vocab,
            "merges": merges,
        },
    })
}

fn tokenizer_config(
    roles: &[(&str, &str)],
    added: &[(usize, Value)],
    turn_marks: &[&str],
    template: &str,
    context_length: u64,
    vocabulary: usize,
) -> Value {
    let decoder: Map<String, Value> =
        added.iter().map(|(id, token)| (id.to_string(), token.clone())).collect();
    let mut config = json!({
        "add_prefix_space": false,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": turn_marks,
        "chat_template": template,
        "clean_up_tokenization_spaces": false,
        "model_max_length": context_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "vocab_size": vocabulary,
    });
    for (role, token) in roles {
        config[*role] = json!(token);
    }
    config
}

fn special_tokens_map(roles: &[(&str, &str)], turn_marks: &[&str]) -> Value {
    let mut map = Map::new();
    for (role, token) in roles {
        let token = json!({
            "content": token,
            "lstrip": false,
            "normalized": false,
            "rstrip": false,
            "single_word": false,
        });
        map.insert((*role).to_owned(), token);
    }
    map.insert("additional_special_tokens".to_owned(), json!(turn_marks));
    Value::Object(map)
}

/// A post-processor that puts the first token of every text, for a model that was trained so.
fn begin_with(roles: &[(&str, &str)], bos: Option<u64>) -> Value {
    let Some((_, token)) = roles.iter().find(|(role, _)| *role == "bos_token") else {
        return Value::Null;
    };
    let start = json!({"SpecialToken": {"id": token, "type_id": 0}});
    let first = json!({"Sequence": {"id": "A", "type_id": 0}});
    let second = json!({"Sequence": {"id": "B", "type_id": 1}});
    let second_start = json!({"SpecialToken": {"id": token, "type_id": 1}});
    json!({
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, second_start, second],
        "special_tokens": {*token: {"id": token, "ids": [bos], "tokens": [token]}},
    })
}

/// How text is cut into words before BPE. GGUF names the way, and each program brings its own
/// table of what a name means.
struct Pretokenizer {
    json: Value,
    normalizer: Value,
    /// Take a word that is a token as it is, without merging up to it.
    ignore_merges: bool,
}

impl Pretokenizer {
    /// The pre-tokenizer that Hugging Face's `tokenizer.json` has for the models of that name.
    fn named(name: &str) -> Result<Self, &str> {
        let digits = json!({"type": "Digits", "individual_digits": true});
        let plain = |json| Self { json, normalizer: Value::Null, ignore_merges: false };
        match name {
            "gpt-2" | "phi-2" | "olmo" => Ok(plain(byte_level(false, true))),
            "smollm" | "starcoder" | "refact" => Ok(plain(sequence(digits, true))),
            "llama-bpe" | "llama3" | "llama-v3" => {
                Ok(Self { ignore_merges: true, ..plain(sequence(split(r"\p{N}{1,3}"), false)) })
            }
            "qwen2" | "deepseek-r1-qwen" => Ok(Self {
                normalizer: json!({"type": "NFC"}),
                ..plain(sequence(split(r"\p{N}"), false))
            }),
            other => Err(other),
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

/// The regular expression of cl100k and its children, which differ in how `digits` are cut.
fn split(digits: &str) -> Value {
    let regex = format!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    );
    json!({
        "type": "Split",
        "pattern": {"Regex": regex},
        "behavior": "Isolated",
        "invert": false,
    })
}
