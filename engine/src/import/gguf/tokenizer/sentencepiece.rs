//! SentencePiece BPE with byte fallback, as Llama 2, Mistral, Phi-3 and Gemma have it.
//!
//! Spaces become ▁, then pairs of pieces are merged, best score of the merged piece first, and
//! what is no piece falls back to its bytes (Kudo and Richardson 2018). A GGUF holds the pieces
//! and their scores; `tokenizer.json` wants the pairs, in order.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::super::metadata::Metadata;
use super::super::model::Family;
use super::{BYTE, NORMAL, Parts, UNKNOWN, USER_DEFINED, Vocabulary};
use crate::error::EngineError;

/// What a space becomes.
const META: &str = "▁";

/// What `tokenizer.json` holds for this vocabulary.
pub(super) fn parts(
    metadata: &Metadata,
    family: Family,
    vocabulary: &Vocabulary<'_>,
) -> Result<Parts, EngineError> {
    let scores = metadata.reals("tokenizer.ggml.scores")?;
    if scores.len() != vocabulary.tokens.len() {
        return Err(metadata.error(format_args!(
            "{} tokens and {} scores (tokenizer.ggml.scores) do not belong together",
            vocabulary.tokens.len(),
            scores.len()
        )));
    }
    if !vocabulary.types.contains(&BYTE) {
        return Err(metadata.error(
            "the SentencePiece vocabulary has no byte tokens, without which unknown characters \
             are lost: import the model from its Hugging Face directory",
        ));
    }
    if metadata.find_flag("tokenizer.ggml.remove_extra_whitespaces")? == Some(true) {
        return Err(metadata.error(
            "the tokenizer drops white space (tokenizer.ggml.remove_extra_whitespaces), which \
             cannot be carried over: import the model from its Hugging Face directory",
        ));
    }
    let unknown = match metadata.find_number("tokenizer.ggml.unknown_token_id")? {
        Some(id) => vocabulary.tokens.get(id as usize),
        None => {
            let mut kinds = vocabulary.tokens.iter().zip(vocabulary.types);
            kinds.find(|(_, kind)| **kind == UNKNOWN).map(|(token, _)| token)
        }
    };
    let space_first = metadata.find_flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": META});
    let (normalizer, pre_tokenizer) = if space_first {
        // Every text between special tokens gets a space in front.
        let prepend = json!({"type": "Prepend", "prepend": META});
        (json!({"type": "Sequence", "normalizers": [prepend, replace]}), Value::Null)
    } else {
        let split = json!({
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": false,
        });
        (replace, split)
    };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": META}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if space_first {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(Parts {
        normalizer,
        pre_tokenizer,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": vocabulary.ids(),
            "merges": merges(vocabulary, scores),
        }),
        added_tokens: vocabulary.added_tokens(|id| {
            json!({
                // SentencePiece looks for its user-defined pieces once spaces are ▁. With a space
                // put in front this cannot be said, since it would go into the pieces as well.
                "normalized": vocabulary.types[id] == USER_DEFINED && !space_first,
                "rstrip": family == Family::Phi3 && strips_behind(&vocabulary.tokens[id]),
            })
        }),
        begins: metadata.find_flag("tokenizer.ggml.add_bos_token")?.unwrap_or(true),
    })
}

/// Phi-3's own tokens swallow the white space behind them. GGUF does not say so; llama.cpp knows
/// it by the model's name.
fn strips_behind(token: &str) -> bool {
    !["<unk>", "<s>", "<|endoftext|>"].contains(&token)
}

/// The pairs of pieces that make a piece, best score first. Only normal pieces are made and
/// merged: the others stand for themselves.
fn merges(vocabulary: &Vocabulary<'_>, scores: &[f32]) -> Vec<String> {
    let normal: HashMap<&str, usize> = vocabulary
        .tokens
        .iter()
        .enumerate()
        .filter(|(id, _)| vocabulary.types[*id] == NORMAL)
        .map(|(id, token)| (token.as_str(), id))
        .collect();
    let mut pairs: Vec<(usize, &str, &str)> = Vec::new();
    for (&token, &id) in &normal {
        for (split, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(split);
            if normal.contains_key(left) && normal.contains_key(right) {
                pairs.push((id, left, right));
            }
        }
    }
    pairs.sort_unstable_by(|one, other| {
        scores[other.0].total_cmp(&scores[one.0]).then_with(|| one.cmp(other))
    });
    // Pieces hold no space, so it parts the two.
    pairs.into_iter().map(|(_, left, right)| format!("{left} {right}")).collect()
}
