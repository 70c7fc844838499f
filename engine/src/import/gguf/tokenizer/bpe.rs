//! Byte-level BPE: GPT-2's kind of tokenizer, with the many ways to cut text into words.

use serde_json::json;
use tunesmith_core::gguf::{Pretokenizer, byte_level};

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
