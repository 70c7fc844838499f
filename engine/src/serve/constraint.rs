//! Answers that are JSON by a schema: which tokens may come next.
//!
//! The schema becomes a grammar over bytes, which is walked with the bytes of the tokens that are
//! chosen (llguidance).

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory, token_bytes_from_tokenizer_json};
use serde_json::{Value, json};

use crate::model_directory::{TOKENIZER, read_json};

/// What may stand between a key and its value, and between two of them. JSON allows white space
/// without end, with which a small model goes on for ever.
const KEY_SEPARATOR: &str = ":[ ]?";
const ITEM_SEPARATOR: &str = ",[ ]?";
/// What a schema says to llguidance beside JSON schema.
const OPTIONS: &str = "x-guidance";

/// Makes constraints for the answers of one model.
#[derive(Debug)]
pub(super) struct Constraints {
    model_dir: PathBuf,
    /// By the tokens that end an answer, of which a model's requests have the same.
    factories: HashMap<Vec<u32>, Factory>,
}

/// Has no text of its own.
struct Factory(ParserFactory);

impl fmt::Debug for Factory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Factory")
    }
}

/// What one answer must become.
#[derive(Clone)]
pub(super) struct Constraint(Matcher);

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Constraint")
    }
}

impl Constraints {
    /// For the model in the Hugging Face directory `model_dir`.
    pub(super) fn new(model_dir: PathBuf) -> Self {
        Self { model_dir, factories: HashMap::new() }
    }

    /// An answer that is JSON by `schema`, and that tokens of `stop_ids` end.
    ///
    /// # Errors
    /// For whoever asked: a schema that is none, or that is not understood in all its parts.
    pub(super) fn of(&mut self, schema: &Value, stop_ids: &[u32]) -> Result<Constraint, String> {
        let mut schema = schema.clone();
        if let Value::Object(fields) = &mut schema {
            let options = json!({
                "whitespace_flexible": false,
                "key_separator": KEY_SEPARATOR,
                "item_separator": ITEM_SEPARATOR,
            });
            fields.insert(OPTIONS.to_owned(), options);
        }
        let factory = self.factory(stop_ids)?;
        let parser = factory.create_parser(TopLevelGrammar::from_json_schema(schema));
        let parser = parser.map_err(|error| format!("The JSON schema cannot be used: {error}."))?;
        Ok(Constraint(Matcher::new(Ok(parser))))
    }

    fn factory(&mut self, stop_ids: &[u32]) -> Result<&ParserFactory, String> {
        if !self.factories.contains_key(stop_ids) {
            let made = token_bytes(&self.model_dir)
                .and_then(|tokens| factory(&tokens, stop_ids))
                .map_err(|why| {
                format!("Answers of this model cannot be constrained: {why}.")
            })?;
            self.factories.insert(stop_ids.to_vec(), Factory(made));
        }
        Ok(&self.factories[stop_ids].0)
    }
}

/// The bytes of each token.
fn token_bytes(model_dir: &Path) -> Result<Vec<Vec<u8>>, String> {
    let path = model_dir.join(TOKENIZER);
    let json = read_json(&path).map_err(|error| error.to_string())?;
    token_bytes_from_tokenizer_json(&json)
        .map_err(|error| format!("{} is not understood: {error}", path.display()))
}

fn factory(tokens: &[Vec<u8>], stop_ids: &[u32]) -> Result<ParserFactory, String> {
    let known: Vec<u32> =
        stop_ids.iter().copied().filter(|&id| (id as usize) < tokens.len()).collect();
    let &first = known.first().ok_or("no token of it ends an answer")?;
    let trie = TokTrie::from(&TokRxInfo::new(tokens.len() as u32, first), tokens);
    let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie.with_eos_tokens(&known)));
    let mut factory = ParserFactory::new_simple(&environment).map_err(|error| error.to_string())?;
    factory.quiet();
    Ok(factory)
}

impl Constraint {
    /// The tokens that may come next.
    ///
    /// # Errors
    /// For whoever asked: the schema grew over what is computed for one answer.
    pub(super) fn allowed(&mut self) -> Result<SimpleVob, String> {
        self.0.compute_mask_or_eos().map_err(|error| failed(&error))
    }

    /// Goes on with a token that is allowed. Whether the answer is complete now: nothing but an end
    /// may follow.
    ///
    /// # Errors
    /// As [`Constraint::allowed`].
    pub(super) fn push(&mut self, token: u32) -> Result<bool, String> {
        self.0.consume_token(token).map_err(|error| failed(&error))?;
        Ok(self.0.is_stopped())
    }
}

fn failed(error: &dyn fmt::Display) -> String {
    format!("The answer cannot be held to the JSON schema any further: {error}.")
}
