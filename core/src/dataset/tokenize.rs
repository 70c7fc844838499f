//! A row as token ids, each with its weight in the loss.
//!
//! A completion token's weight is 1 times its message's weight, a prompt token's is
//! `prompt_loss_weight`. In a conversation, completion tokens are those that lie inside an
//! assistant's turn, from where the model would begin to write up to the token that ends the turn.

use super::fault::Fault;
use super::row::{Example, Row};
use super::tokenize_chat::chat;
use super::tokenizer::{ChatTokenizer, Encoded, TokenizerError};
use crate::errors::ApiError;
use crate::hyperparameters::ResolvedHyperparameters;
use std::ops::Range;

/// How rows become tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenizeOptions {
    /// Sequences are cut at this many tokens.
    pub max_seq_length: usize,
    /// The weight of a prompt token.
    pub prompt_loss_weight: f32,
}

impl From<&ResolvedHyperparameters> for TokenizeOptions {
    fn from(hyperparameters: &ResolvedHyperparameters) -> Self {
        Self {
            max_seq_length: usize::try_from(hyperparameters.max_seq_length).unwrap_or(usize::MAX),
            prompt_loss_weight: hyperparameters.prompt_loss_weight as f32,
        }
    }
}

/// A row ready to train.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenizedRow {
    /// Where it begins in its file, from 1.
    pub line: usize,
    /// Its tokens.
    pub ids: Vec<u32>,
    /// For each token the weight of predicting it, within 0 to 1; the first of a sequence is 0,
    /// since nothing predicts it. At least one completion token of each sequence has a weight.
    pub weights: Vec<f32>,
    /// Where its sequences begin in `ids`, in order; the first is 0. A row is one sequence, unless
    /// the model's chat template writes the same turn in more than one way.
    pub starts: Vec<usize>,
    /// Whether a sequence was cut at `max_seq_length`.
    pub truncated: bool,
}

impl TokenizedRow {
    /// Where its sequences lie in `ids` and `weights`, end to end. Each is computed on its own.
    pub fn sequences(&self) -> impl Iterator<Item = Range<usize>> {
        let ends = self.starts.iter().skip(1).copied().chain([self.ids.len()]);
        self.starts.iter().zip(ends).map(|(&start, end)| start..end)
    }

    /// The weights of the sequence of these ids; none where it has no such sequence.
    #[must_use]
    pub fn weights_of(&self, ids: &[u32]) -> &[f32] {
        let found = self.sequences().find(|sequence| self.ids[sequence.clone()] == *ids);
        found.map_or(&[], |sequence| &self.weights[sequence])
    }

    /// Tokens of its longest sequence.
    #[must_use]
    pub fn longest_sequence(&self) -> usize {
        self.sequences().map(|sequence| sequence.len()).max().unwrap_or(0)
    }
}

/// Turns a row into tokens; `param` is the job's parameter that names its file.
///
/// # Errors
/// `invalid_file_format` with the row's line, when the model's chat template cannot render it or
/// no target is left of it.
pub fn tokenize_row(
    tokenizer: &ChatTokenizer,
    row: &Row,
    options: &TokenizeOptions,
    param: &str,
) -> Result<TokenizedRow, ApiError> {
    tokenize(tokenizer, row, options).map_err(|fault| fault.into_api_error(row.line, param))
}

fn tokenize(
    tokenizer: &ChatTokenizer,
    row: &Row,
    options: &TokenizeOptions,
) -> Result<TokenizedRow, Fault> {
    let parts = parts_of(tokenizer, row, options)?;
    join(row.line, &parts, options)
}

/// The sequences of a row, before any cut.
pub(super) fn parts_of(
    tokenizer: &ChatTokenizer,
    row: &Row,
    options: &TokenizeOptions,
) -> Result<Vec<Tokens>, Fault> {
    match &row.example {
        Example::Chat { messages, tools } => chat(tokenizer, messages, tools.as_ref(), options),
        Example::PromptCompletion { prompt, completion } => {
            let part = two_parts(tokenizer, prompt, completion);
            Ok(vec![part.map_err(|error| from_tokenizer(&error))?])
        }
        Example::Text { text } => {
            Ok(vec![two_parts(tokenizer, "", text).map_err(|error| from_tokenizer(&error))?])
        }
        Example::ChatPair { .. } | Example::TextPair { .. } => Err(Fault::new(
            "the row is a preference pair and not one sequence.",
            "Preference pairs belong to method \"dpo\".",
        )),
    }
}

/// The row of those sequences, each cut, in which something is left to learn.
pub(super) fn join(
    line: usize,
    parts: &[Tokens],
    options: &TokenizeOptions,
) -> Result<TokenizedRow, Fault> {
    let whole = parts.iter().map(|part| part.ids.len()).max().unwrap_or(0);
    let mut tokenized = TokenizedRow {
        line,
        ids: Vec::new(),
        weights: Vec::new(),
        starts: Vec::new(),
        truncated: whole > options.max_seq_length,
    };
    for part in parts {
        if part.targets(options) == 0 {
            continue;
        }
        let kept = part.ids.len().min(options.max_seq_length);
        tokenized.starts.push(tokenized.ids.len());
        tokenized.ids.extend_from_slice(&part.ids[..kept]);
        let weights = part.values(options);
        tokenized.weights.extend_from_slice(&weights[..kept]);
    }
    if !tokenized.starts.is_empty() {
        return Ok(tokenized);
    }
    let fault = if tokenized.truncated {
        Fault::new(
            format!(
                "the row has {whole} tokens and is cut at {}, before anything that the model \
                 should learn.",
                options.max_seq_length
            ),
            "Shorten what stands before the answer, or raise max_seq_length.",
        )
    } else {
        Fault::new(
            "no token of the row is left to learn when the model's chat template has \
             rendered it.",
            "Check the assistant's messages, or choose another model.",
        )
    };
    Err(fault.trains_nothing())
}

/// One sequence of a row.
pub(super) struct Tokens {
    pub(super) ids: Vec<u32>,
    pub(super) weights: Vec<Weight>,
}

impl Tokens {
    /// The weight of predicting each token; nothing predicts the first.
    pub(super) fn values(&self, options: &TokenizeOptions) -> Vec<f32> {
        let predicted = self.weights.iter().skip(1).map(|weight| weight.value(options));
        [0.0].into_iter().chain(predicted).collect()
    }

    /// Completion tokens with a weight that the cut leaves.
    pub(super) fn targets(&self, options: &TokenizeOptions) -> usize {
        let kept = self.weights.iter().take(options.max_seq_length).skip(1);
        kept.filter(|weight| weight.is_target()).count()
    }
}

/// What the weight of a token comes from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Weight {
    /// The prompt's.
    Prompt,
    /// A completion's: its message's weight.
    Completion(f32),
    /// Of what an earlier sequence of the row has counted, or has no weight anywhere: 0.
    Counted,
}

impl Weight {
    pub(super) const fn is_completion(self) -> bool {
        matches!(self, Self::Completion(_))
    }

    /// Whether it is what the row is there for.
    fn is_target(self) -> bool {
        matches!(self, Self::Completion(weight) if weight > 0.0)
    }

    fn value(self, options: &TokenizeOptions) -> f32 {
        match self {
            Self::Prompt => options.prompt_loss_weight,
            Self::Completion(weight) => weight,
            Self::Counted => 0.0,
        }
    }
}

/// Prompt and completion as one text, and the end token as the last target.
pub(super) fn two_parts(
    tokenizer: &ChatTokenizer,
    prompt: &str,
    completion: &str,
) -> Result<Tokens, TokenizerError> {
    let whole = [prompt, completion].concat();
    let (marked, boundary) = tokenizer.protector().mark_with_boundary(&whole, prompt.len());
    let Encoded { ids, offsets } = tokenizer.encode_marked(&marked)?;
    let weights = offsets.into_iter().map(|(start, _)| match start >= boundary {
        true => Weight::Completion(1.0),
        false => Weight::Prompt,
    });
    Ok(Tokens {
        weights: tokenizer
            .begin_id()
            .map(|_| Weight::Prompt)
            .into_iter()
            .chain(weights)
            .chain([Weight::Completion(1.0)])
            .collect(),
        ids: tokenizer.begin_id().into_iter().chain(ids).chain([tokenizer.end_id()]).collect(),
    })
}

pub(super) fn from_tokenizer(error: &TokenizerError) -> Fault {
    Fault::new(
        format!("{error}."),
        "Change the row to what the template expects, or choose another model.",
    )
}

#[cfg(test)]
mod tests {
    use super::super::message::{Message, Role};
    use super::super::testing::{END, byte_tokenizer, chatml};
    use super::*;
    use serde_json::{Value, json};

    const OPTIONS: TokenizeOptions =
        TokenizeOptions { max_seq_length: 1000, prompt_loss_weight: 0.1 };

    fn user(text: &str) -> Message {
        Message::new(Role::User, text)
    }

    fn assistant(text: &str) -> Message {
        Message::new(Role::Assistant, text)
    }

    fn conversation(messages: Vec<Message>) -> Row {
        Row { line: 7, example: Example::Chat { messages, tools: None } }
    }

    fn tokenized(row: &Row, options: &TokenizeOptions) -> Result<TokenizedRow, ApiError> {
        tokenize_row(&chatml(), row, options, "training_file")
    }

    /// The text of the tokens whose weight is `weight`.
    fn text_of(row: &TokenizedRow, weight: f32) -> String {
        let ids: Vec<_> = row
            .ids
            .iter()
            .zip(&row.weights)
            .filter(|&(_, found)| *found == weight)
            .map(|(&id, _)| id)
            .collect();
        chatml().decode_with_special(&ids).expect("decode")
    }

    #[test]
    fn every_assistant_turn_is_learned_with_its_end_and_nothing_else() {
        let row = conversation(vec![user("a"), assistant("bc"), user("d"), assistant("e")]);
        let row = tokenized(&row, &OPTIONS).expect("tokens");
        assert_eq!(text_of(&row, 1.0), "bc<|im_end|>e<|im_end|>");
        assert_eq!(row.weights[0], 0.0, "nothing predicts the first token");
        assert_eq!(row.weights[1], 0.1);
        assert_eq!(row.weights.last(), Some(&0.1), "the newline after the last turn");
    }

    #[test]
    fn a_messages_weight_counts_for_its_tokens_only() {
        let half = Message { weight: 0.5, ..assistant("b") };
        let none = Message { weight: 0.0, ..assistant("c") };
        let row = conversation(vec![user("a"), half, none, assistant("d")]);
        let row = tokenized(&row, &OPTIONS).expect("tokens");
        assert_eq!(text_of(&row, 0.5), "b<|im_end|>");
        assert_eq!(text_of(&row, 1.0), "d<|im_end|>");
        assert_eq!(
            text_of(&row, 0.0),
            "<|im_start|>c<|im_end|>",
            "the first token and the message"
        );
    }

    #[test]
    fn a_special_token_in_an_answer_does_not_end_the_turn() {
        let row = conversation(vec![user("a"), assistant("b<|im_end|>\nc")]);
        let row = tokenized(&row, &OPTIONS).expect("tokens");
        assert_eq!(text_of(&row, 1.0), "b<|im_end|>\nc<|im_end|>");
        assert_eq!(row.ids.iter().filter(|&&id| id == END).count(), 2);
    }

    #[test]
    fn a_row_is_cut_and_says_so() {
        let row = conversation(vec![user("a"), assistant("bcd"), user("e"), assistant("f")]);
        let options = TokenizeOptions { max_seq_length: 22, ..OPTIONS };
        let row = tokenized(&row, &options).expect("tokens");
        assert!(row.truncated);
        assert_eq!((row.ids.len(), row.weights.len()), (22, 22));
        assert_eq!(text_of(&row, 1.0), "bc");
    }

    #[test]
    fn a_row_whose_every_target_is_cut_away_is_refused_with_its_line() {
        let row = conversation(vec![user(&"a".repeat(100)), assistant("b")]);
        let options = TokenizeOptions { max_seq_length: 50, ..OPTIONS };
        let error = tokenized(&row, &options).expect_err("no target");
        assert_eq!(
            error.message,
            "Line 7: the row has 122 tokens and is cut at 50, before anything that the model \
             should learn. Shorten what stands before the answer, or raise max_seq_length."
        );
        assert_eq!(error.param.as_deref(), Some("training_file"));
        // What the cut leaves of the targets has weight 0.
        let silent = Message { weight: 0.0, ..assistant("b") };
        let row = conversation(vec![user("a"), silent, user(&"a".repeat(100)), assistant("c")]);
        assert!(tokenized(&row, &options).is_err());
    }

    #[test]
    fn prompt_and_completion_are_one_text_with_the_end_token_last() {
        let example =
            Example::PromptCompletion { prompt: "a<s".to_owned(), completion: "> b".to_owned() };
        let row = tokenized(&Row { line: 1, example }, &OPTIONS).expect("tokens");
        assert_eq!(text_of(&row, 1.0), "> b<|im_end|>");
        assert_eq!(row.weights, [0.0, 0.1, 0.1, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(row.ids.last(), Some(&END));
    }

    #[test]
    fn a_token_that_straddles_prompt_and_completion_is_prompt() {
        // One merge makes "ab" one token.
        let mut json: Value = serde_json::from_slice(
            &super::super::testing::byte_tokenizer_json(&json!({}), &json!({})).0,
        )
        .expect("JSON");
        let mut model = json["model"].take();
        model["vocab"]["ab"] = 300.into();
        model["merges"] = json!(["a b"]);
        let tokenizer = byte_tokenizer(&json!({"model": model}), &json!({}));
        let example =
            Example::PromptCompletion { prompt: "xa".to_owned(), completion: "bc".to_owned() };
        let row = tokenize_row(&tokenizer, &Row { line: 1, example }, &OPTIONS, "training_file")
            .expect("tokens");
        assert_eq!(row.ids[1], 300);
        assert_eq!(row.weights, [0.0, 0.1, 1.0, 1.0]);
    }

    #[test]
    fn text_is_learned_whole() {
        let example = Example::Text { text: "abc".to_owned() };
        let row = tokenized(&Row { line: 1, example }, &OPTIONS).expect("tokens");
        assert_eq!(row.weights, [0.0, 1.0, 1.0, 1.0]);
        assert_eq!(row.ids.last(), Some(&END));
    }

    #[test]
    fn text_begins_with_one_begin_token_where_the_model_has_one() {
        let tokenizer =
            byte_tokenizer(&json!({}), &json!({"bos_token": "<s>", "add_bos_token": true}));
        let example = Example::Text { text: "<s>".to_owned() };
        let row = tokenize_row(&tokenizer, &Row { line: 1, example }, &OPTIONS, "training_file")
            .expect("tokens");
        assert_eq!(row.ids[0], 258);
        assert_eq!(row.ids.iter().filter(|&&id| id == 258).count(), 1);
        assert_eq!(row.weights, [0.0, 1.0, 1.0, 1.0, 1.0]);
    }

    #[test]
    fn a_template_that_leaves_the_answer_out_is_refused() {
        let template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}";
        let tokenizer = byte_tokenizer(&json!({}), &json!({"chat_template": template}));
        let row = conversation(vec![user("a"), assistant("b")]);
        let error =
            tokenize_row(&tokenizer, &row, &OPTIONS, "training_file").expect_err("no target");
        assert!(error.message.contains("no token of the row is left to learn"), "{error}");
    }

    #[test]
    fn tool_calls_and_tools_that_a_template_would_drop_are_refused() {
        let mut call = assistant("");
        call.content = None;
        call.rest.insert(
            "tool_calls".to_owned(),
            json!([{"type": "function", "function": {"name": "f", "arguments": {}}}]),
        );
        let row = conversation(vec![user("a"), call.clone()]);
        let error = tokenized(&row, &OPTIONS).expect_err("no place");
        assert!(error.message.starts_with("Line 7: messages[1].tool_calls is given"), "{error}");

        let example = Example::Chat {
            messages: vec![user("a"), assistant("b")],
            tools: Some(json!([{"type": "function", "function": {"name": "f"}}])),
        };
        let error = tokenized(&Row { line: 7, example }, &OPTIONS).expect_err("no place");
        assert!(error.message.starts_with("Line 7: tools is given"), "{error}");

        let template =
            "{% for m in messages %}{{ m.content or m.tool_calls | tojson }}<|im_end|>{% endfor %}";
        let tokenizer = byte_tokenizer(&json!({}), &json!({"chat_template": template}));
        let row = tokenize_row(&tokenizer, &row, &OPTIONS, "training_file").expect("tokens");
        assert_eq!(
            text_of(&row, 1.0),
            "[{\"type\": \"function\", \"function\": {\"name\": \"f\", \"arguments\": {}}}]<|im_end|>"
        );
    }

    #[test]
    fn a_templates_own_refusal_reaches_the_client() {
        let template = "{{ raise_exception('roles must alternate') }}";
        let tokenizer = byte_tokenizer(&json!({}), &json!({"chat_template": template}));
        let row = conversation(vec![user("a"), assistant("b")]);
        let error = tokenize_row(&tokenizer, &row, &OPTIONS, "training_file").expect_err("refused");
        assert!(error.message.contains("conversation: roles must alternate."), "{error}");
    }
}
