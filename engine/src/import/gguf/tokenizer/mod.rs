//! The tokenizer in a GGUF's metadata → `tokenizer.json` and its companions.

mod bpe;
mod sentencepiece;

use serde_json::{Map, Value, json};

use super::metadata::Metadata;
use super::model::Model;
use crate::error::EngineError;

/// Kinds of vocabulary (`tokenizer.ggml.model`).
const BYTE_LEVEL_BPE: &str = "gpt2";
const SENTENCEPIECE: &str = "llama";

/// Entries of `tokenizer.ggml.token_type`, as llama.cpp numbers them.
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
/// A row of the embedding that no text leads to.
const UNUSED: i64 = 5;
const BYTE: i64 = 6;

/// Tokens that end a turn in the templates of known models.
const TURN_ENDS: [&str; 5] =
    ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endofturn|>"];

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
        tokens: &'a [String],
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
                Some(token) => Ok((role, token.as_str())),
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

/// The pieces, and what kind each is of.
struct Vocabulary<'a> {
    tokens: &'a [String],
    types: &'a [i64],
}

/// What the kinds of tokenizer differ in.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Value,
    /// With their ids, in order.
    added_tokens: Vec<(usize, Value)>,
    /// Whether every text begins with the BOS token.
    begins: bool,
}

impl Vocabulary<'_> {
    fn ids(&self) -> Map<String, Value> {
        self.tokens
            .iter()
            .zip(self.types)
            .enumerate()
            .filter(|(_, (_, kind))| **kind != UNUSED)
            .map(|(id, (token, _))| (token.clone(), json!(id)))
            .collect()
    }

    /// The tokens that are looked for in text before anything else. `own` has the fields that are
    /// not those of most.
    fn added_tokens(&self, own: impl Fn(usize) -> Value) -> Vec<(usize, Value)> {
        let mut added = Vec::new();
        for (id, (token, kind)) in self.tokens.iter().zip(self.types).enumerate() {
            if ![UNKNOWN, CONTROL, USER_DEFINED].contains(kind) {
                continue;
            }
            let mut json = json!({
                "content": token,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": *kind != USER_DEFINED,
            });
            for (name, value) in own(id).as_object().into_iter().flatten() {
                json[name] = value.clone();
            }
            added.push((id, json));
        }
        added
    }
}

/// Rebuilds the tokenizer of `model`.
pub(super) fn rebuild(metadata: &Metadata, model: &Model) -> Result<Tokenizer, EngineError> {
    let kind = metadata.text("tokenizer.ggml.model")?;
    let vocabulary = Vocabulary {
        tokens: metadata.texts("tokenizer.ggml.tokens")?,
        types: metadata.integers("tokenizer.ggml.token_type")?,
    };
    let (tokens, types) = (vocabulary.tokens, vocabulary.types);
    if tokens.len() != model.vocabulary || types.len() != tokens.len() {
        return Err(metadata.error(format_args!(
            "{} rows of the token embedding, {} tokens and {} token types do not belong together",
            model.vocabulary,
            tokens.len(),
            types.len()
        )));
    }
    let parts = match kind {
        BYTE_LEVEL_BPE => bpe::parts(metadata, &vocabulary)?,
        SENTENCEPIECE => sentencepiece::parts(metadata, model.family, &vocabulary)?,
        _ => {
            return Err(metadata.error(format_args!(
                "the tokenizer is of the kind {kind:?} (tokenizer.ggml.model), and only \
                 byte-level BPE ({BYTE_LEVEL_BPE:?}) and SentencePiece ({SENTENCEPIECE:?}) can be \
                 rebuilt from a GGUF: import the model from its Hugging Face directory"
            )));
        }
    };
    let template = metadata.find_text("tokenizer.chat_template")?;
    // The control tokens that the template spells are the ones that mark turns.
    let turn_marks: Vec<&str> = tokens
        .iter()
        .zip(types)
        .filter(|(token, kind)| {
            **kind == CONTROL && template.is_some_and(|template| template.contains(*token))
        })
        .map(|(token, _)| token.as_str())
        .collect();
    let mut special = SpecialTokens::read(metadata)?;
    if special.end_of_turn.is_none()
        && let Some(end) = TURN_ENDS.iter().find(|end| turn_marks.contains(end))
    {
        special.end_of_turn = tokens
            .iter()
            .position(|token| token == end)
            .map(|id| id as u64)
            .filter(|&id| special.eos != Some(id));
    }
    let roles = special.named(metadata, tokens)?;
    let post_processor = if parts.begins { begin_with(&roles, special.bos) } else { Value::Null };
    let tokenizer_config =
        tokenizer_config(&roles, &parts.added_tokens, &turn_marks, template, model);
    let special_tokens_map = special_tokens_map(&roles, &turn_marks);
    let added: Vec<Value> = parts
        .added_tokens
        .into_iter()
        .map(|(id, mut token)| {
            token["id"] = json!(id);
            token
        })
        .collect();
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": post_processor,
        "decoder": parts.decoder,
        "model": parts.model,
    });
    Ok(Tokenizer { special, tokenizer, tokenizer_config, special_tokens_map })
}

fn tokenizer_config(
    roles: &[(&str, &str)],
    added: &[(usize, Value)],
    turn_marks: &[&str],
    template: Option<&str>,
    model: &Model,
) -> Value {
    let decoder: Map<String, Value> =
        added.iter().map(|(id, token)| (id.to_string(), token.clone())).collect();
    let mut config = json!({
        "add_prefix_space": false,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": turn_marks,
        "clean_up_tokenization_spaces": false,
        "model_max_length": model.context_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "vocab_size": model.vocabulary,
    });
    if let Some(template) = template {
        config["chat_template"] = json!(template);
    }
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
