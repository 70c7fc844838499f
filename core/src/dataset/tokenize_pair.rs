//! A preference pair as token ids.
//!
//! Each answer is rendered with its prompt as one conversation. What is compared is the last turn
//! alone, from where the model would begin to write up to the token that ends the turn; earlier
//! turns of the assistant's belong to the prompt.

use super::fault::Fault;
use super::message::Message;
use super::row::{Example, Row};
use super::tokenize::{TokenizeOptions, Tokens, from_tokenizer, two_parts};
use super::tokenize_chat::last_turn;
use super::tokenizer::ChatTokenizer;
use crate::errors::ApiError;
use std::ops::Range;

/// A pair ready to train.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenizedPair {
    /// Where it begins in its file, from 1.
    pub line: usize,
    /// The prompt with the preferred answer.
    pub chosen: TokenizedAnswer,
    /// The prompt with the other one.
    pub rejected: TokenizedAnswer,
}

impl TokenizedPair {
    /// Whether one of the answers was cut at `max_seq_length`.
    #[must_use]
    pub fn is_truncated(&self) -> bool {
        self.chosen.truncated || self.rejected.truncated
    }
}

/// A prompt and an answer to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizedAnswer {
    /// The tokens of both.
    pub ids: Vec<u32>,
    /// The answer's tokens. Never empty, and never the first token, which nothing predicts.
    pub completion: Range<usize>,
    /// Whether it was cut at `max_seq_length`.
    pub truncated: bool,
}

/// Turns a pair into tokens; `param` is the job's parameter that names its file.
///
/// # Errors
/// `invalid_file_format` with the row's line, when the model's chat template cannot render it or
/// nothing of an answer is left.
pub fn tokenize_pair(
    tokenizer: &ChatTokenizer,
    row: &Row,
    options: &TokenizeOptions,
    param: &str,
) -> Result<TokenizedPair, ApiError> {
    let tokenized = answers_of(tokenizer, row, options).and_then(|[chosen, rejected]| {
        Ok(TokenizedPair {
            line: row.line,
            chosen: answer_of(chosen, "preferred", options)?,
            rejected: answer_of(rejected, "non-preferred", options)?,
        })
    });
    tokenized.map_err(|fault| fault.into_api_error(row.line, param))
}

/// The tokens of the preferred answer and of the other one, each with its prompt, before any cut.
pub(super) fn answers_of(
    tokenizer: &ChatTokenizer,
    row: &Row,
    options: &TokenizeOptions,
) -> Result<[Tokens; 2], Fault> {
    match &row.example {
        Example::ChatPair { messages, tools, chosen, rejected } => {
            let tokenize = |answer: &Message| {
                let conversation: Vec<Message> = messages.iter().chain([answer]).cloned().collect();
                last_turn(tokenizer, &conversation, tools.as_ref(), options)
            };
            Ok([tokenize(chosen)?, tokenize(rejected)?])
        }
        Example::TextPair { prompt, chosen, rejected } => {
            let tokenize = |answer: &str| {
                two_parts(tokenizer, prompt, answer).map_err(|error| from_tokenizer(&error))
            };
            Ok([tokenize(chosen)?, tokenize(rejected)?])
        }
        _ => Err(Fault::new(
            "the row is no preference pair.",
            "Examples without a pair belong to method \"supervised\".",
        )),
    }
}

pub(super) fn answer_of(
    tokens: Tokens,
    name: &str,
    options: &TokenizeOptions,
) -> Result<TokenizedAnswer, Fault> {
    let Tokens { mut ids, weights } = tokens;
    let whole = ids.len();
    ids.truncate(options.max_seq_length);
    let is_answer = |index: &usize| *index > 0 && weights[*index].is_completion();
    let first = (0..ids.len()).find(is_answer);
    let Some(first) = first else {
        let fault = if whole > ids.len() {
            Fault::new(
                format!(
                    "the row has {whole} tokens with the {name} answer and is cut at {}, before \
                     that answer.",
                    ids.len()
                ),
                "Shorten what stands before the answer, or raise max_seq_length.",
            )
        } else {
            Fault::new(
                format!(
                    "no token of the {name} answer is left when the model's chat template has \
                     rendered it."
                ),
                "Check the answer, or choose another model.",
            )
        };
        return Err(fault.trains_nothing());
    };
    let length = (first..ids.len()).take_while(|&index| weights[index].is_completion()).count();
    Ok(TokenizedAnswer { truncated: whole > ids.len(), ids, completion: first..first + length })
}

#[cfg(test)]
mod tests {
    use super::super::message::Role;
    use super::super::testing::chatml;
    use super::*;

    const OPTIONS: TokenizeOptions =
        TokenizeOptions { max_seq_length: 1000, prompt_loss_weight: 0.0 };

    fn conversation(messages: Vec<Message>, chosen: &str, rejected: &str) -> Row {
        let answer = |text: &str| Message::new(Role::Assistant, text);
        let example = Example::ChatPair {
            messages,
            tools: None,
            chosen: answer(chosen),
            rejected: answer(rejected),
        };
        Row { line: 7, example }
    }

    fn tokenized(row: &Row, max_seq_length: usize) -> Result<TokenizedPair, ApiError> {
        let options = TokenizeOptions { max_seq_length, ..OPTIONS };
        tokenize_pair(&chatml(), row, &options, "training_file")
    }

    fn answer(answer: &TokenizedAnswer) -> String {
        chatml().decode_with_special(&answer.ids[answer.completion.clone()]).expect("decode")
    }

    #[test]
    fn only_the_last_turn_is_compared_up_to_its_end() {
        let messages = vec![
            Message::new(Role::User, "q"),
            Message::new(Role::Assistant, "earlier"),
            Message::new(Role::User, "r"),
        ];
        let pair = tokenized(&conversation(messages, "a b", "c"), 1000).expect("tokens");
        assert_eq!(answer(&pair.chosen), "a b<|im_end|>");
        assert_eq!(answer(&pair.rejected), "c<|im_end|>");
        let start = pair.chosen.completion.start;
        assert_eq!(start, pair.rejected.completion.start);
        assert_eq!(pair.chosen.ids[..start], pair.rejected.ids[..start], "one prompt");
        assert_eq!(pair.chosen.ids.len(), pair.chosen.completion.end + 1, "the newline after it");
        assert!(!pair.is_truncated());
    }

    #[test]
    fn texts_end_with_the_end_token() {
        let example = Example::TextPair {
            prompt: "1+1=".to_owned(),
            chosen: "2".to_owned(),
            rejected: "33".to_owned(),
        };
        let pair = tokenized(&Row { line: 1, example }, 1000).expect("tokens");
        assert_eq!(answer(&pair.chosen), "2<|im_end|>");
        assert_eq!(answer(&pair.rejected), "33<|im_end|>");
        assert_eq!(pair.rejected.completion, 4..7);
    }

    #[test]
    fn a_pair_without_prompt_compares_all_but_the_first_token() {
        let text = |text: &str| text.to_owned();
        let example =
            Example::TextPair { prompt: text(""), chosen: text("ab"), rejected: text("c") };
        let pair = tokenized(&Row { line: 1, example }, 1000).expect("tokens");
        assert_eq!((pair.chosen.completion, pair.rejected.completion), (1..3, 1..2));
    }

    #[test]
    fn an_answer_is_cut_and_says_so_and_one_that_is_gone_is_refused() {
        let row = conversation(vec![Message::new(Role::User, "q")], &"a".repeat(60), "b");
        let pair = tokenized(&row, 50).expect("tokens");
        assert!(pair.chosen.truncated && !pair.rejected.truncated && pair.is_truncated());
        assert_eq!((pair.chosen.ids.len(), pair.chosen.completion.end), (50, 50));
        let error = tokenized(&row, 20).expect_err("no answer is left");
        assert!(
            error.message.starts_with("Line 7: the row has") && error.message.contains("preferred"),
            "{}",
            error.message
        );
    }

    #[test]
    fn a_row_without_a_pair_is_refused() {
        let row = Row { line: 2, example: Example::Text { text: "a".to_owned() } };
        let error = tokenized(&row, 100).expect_err("no pair");
        assert!(error.message.starts_with("Line 2: the row is no preference pair"));
    }
}
