//! A row as the trainer sees it, for a person to look at.

use super::row::Row;
use super::tokenize::{TokenizeOptions, Tokens};
use super::tokenizer::ChatTokenizer;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Tokens of a row that are shown.
const MAX_SHOWN_TOKENS: usize = 512;

/// A row token by token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ShownRow {
    /// Where it begins in its file, from 1.
    pub line: usize,
    /// `preferred` or `non_preferred`, of a pair.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// How many tokens it has, before any cut.
    pub token_count: usize,
    /// Whether it is cut at the context's length.
    pub truncated: bool,
    /// Its first tokens.
    pub tokens: Vec<ShownToken>,
}

/// A token and what it counts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ShownToken {
    /// Its number in the vocabulary.
    pub id: u32,
    /// What it adds to the text: nothing for one that is a part of a character, until the last
    /// part.
    pub text: String,
    /// The weight of predicting it.
    pub weight: f32,
}

impl ShownRow {
    pub(super) fn new(
        tokenizer: &ChatTokenizer,
        row: &Row,
        tokens: &Tokens,
        options: &TokenizeOptions,
        answer: Option<&str>,
    ) -> Self {
        let kept = tokens.ids.len().min(options.max_seq_length);
        let shown = kept.min(MAX_SHOWN_TOKENS);
        let weights = tokens.values(options);
        let texts = texts(tokenizer, &tokens.ids[..shown]);
        let one = |((&id, text), weight)| ShownToken { id, text, weight };
        Self {
            line: row.line,
            answer: answer.map(str::to_owned),
            token_count: tokens.ids.len(),
            truncated: tokens.ids.len() > kept,
            tokens: tokens.ids.iter().zip(texts).zip(weights).map(one).collect(),
        }
    }
}

/// What each of `ids` adds to the text of all of them. A text that a decoder cannot give is empty.
fn texts(tokenizer: &ChatTokenizer, ids: &[u32]) -> Vec<String> {
    let decode = |ids: &[u32]| tokenizer.decode_with_special(ids).unwrap_or_default();
    // The text before is decoded with each token again, as some decoders write a token in another
    // way where it is the first; what ends within a character waits for the rest of it.
    let (mut start, mut done) = (0, 0);
    let mut texts = Vec::with_capacity(ids.len());
    for end in 1..=ids.len() {
        let before = decode(&ids[start..done]);
        let now = decode(&ids[start..end]);
        let is_whole = !now.ends_with('\u{fffd}') || end == ids.len();
        match now.strip_prefix(before.as_str()) {
            Some(added) if is_whole => {
                texts.push(added.to_owned());
                (start, done) = (done, end);
            }
            Some(_) => texts.push(String::new()),
            None => {
                texts.push(decode(&ids[end - 1..end]));
                (start, done) = (end - 1, end);
            }
        }
    }
    texts
}

#[cfg(test)]
mod tests {
    use super::super::row::Example;
    use super::super::testing::chatml;
    use super::super::tokenize::parts_of;
    use super::*;

    fn shown(prompt: &str, completion: &str, max_seq_length: usize) -> ShownRow {
        let options = TokenizeOptions { max_seq_length, prompt_loss_weight: 0.25 };
        let example = Example::PromptCompletion {
            prompt: prompt.to_owned(),
            completion: completion.to_owned(),
        };
        let row = Row { line: 7, example };
        let parts = parts_of(&chatml(), &row, &options).expect("tokens");
        ShownRow::new(&chatml(), &row, &parts[0], &options, None)
    }

    #[test]
    fn each_token_has_its_text_and_its_weight() {
        let row = shown("ab", "c", 100);
        let tokens: Vec<_> =
            row.tokens.iter().map(|token| (token.text.as_str(), token.weight)).collect();
        assert_eq!(tokens, [("a", 0.0), ("b", 0.25), ("c", 1.0), ("<|im_end|>", 1.0)]);
        assert_eq!((row.line, row.token_count, row.truncated), (7, 4, false));
    }

    #[test]
    fn character_of_several_tokens_is_the_last_ones_text() {
        let row = shown("ä", "€", 100);
        let texts: Vec<_> = row.tokens.iter().map(|token| token.text.as_str()).collect();
        assert_eq!(texts, ["", "ä", "", "", "€", "<|im_end|>"]);
    }

    #[test]
    fn row_that_is_cut_shows_what_is_left_of_it() {
        let row = shown("abc", "def", 4);
        assert_eq!((row.tokens.len(), row.token_count, row.truncated), (4, 7, true));
    }
}
