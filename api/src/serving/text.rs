//! The text of one answer as it grows: whole characters alone, and nothing of a stop string.

use std::sync::Arc;
use tunesmith_core::dataset::{ChatTokenizer, TextStream, TokenizerError};
use tunesmith_core::sampling::TokenLogprob;

/// A part of an answer.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Piece {
    pub(super) text: String,
    /// The tokens that the text came from.
    pub(super) tokens: Vec<AnswerToken>,
}

impl Piece {
    pub(super) fn is_empty(&self) -> bool {
        self.text.is_empty() && self.tokens.is_empty()
    }
}

/// A token of an answer.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct AnswerToken {
    pub(super) token: TokenLogprob,
    pub(super) top: Vec<TokenLogprob>,
    /// Where its text begins, in bytes of the answer's.
    begin: usize,
    /// The same in characters.
    pub(super) offset: usize,
}

/// The answer so far.
pub(super) struct AnswerText {
    stream: TextStream,
    stops: Arc<[String]>,
    /// Text that may turn out to be the beginning of a stop string.
    held: String,
    /// Tokens that were not given out.
    tokens: Vec<AnswerToken>,
    /// Bytes that were given out.
    given: usize,
    /// Bytes and characters of the text so far, the held part included.
    length: usize,
    characters: usize,
}

impl AnswerText {
    /// An answer that goes on from a prompt's text, where there is one.
    pub(super) fn new(
        tokenizer: Arc<ChatTokenizer>,
        after: Option<&[u32]>,
        stops: Arc<[String]>,
    ) -> Self {
        Self {
            stream: match after {
                Some(prompt) => TextStream::after(tokenizer, prompt),
                None => TextStream::new(tokenizer),
            },
            stops,
            held: String::new(),
            tokens: Vec::new(),
            given: 0,
            length: 0,
            characters: 0,
        }
    }

    /// Takes a token; gives what can be shown by now, and whether a stop string ends the answer.
    pub(super) fn push(
        &mut self,
        token: TokenLogprob,
        top: Vec<TokenLogprob>,
    ) -> Result<(Piece, bool), TokenizerError> {
        let (begin, offset) = (self.length, self.characters);
        self.tokens.push(AnswerToken { token, top, begin, offset });
        let text = self.stream.push(token.id)?;
        Ok(self.take(&text))
    }

    /// What is left when the model ends the answer. A stop string may still be in it.
    pub(super) fn finish(&mut self) -> Result<Piece, TokenizerError> {
        let text = self.stream.finish()?;
        let (mut piece, stopped) = self.take(&text);
        if !stopped {
            piece.text.push_str(&std::mem::take(&mut self.held));
            piece.tokens.append(&mut self.tokens);
        }
        Ok(piece)
    }

    fn take(&mut self, text: &str) -> (Piece, bool) {
        self.length += text.len();
        self.characters += text.chars().count();
        self.held.push_str(text);
        let stop = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        let shown = stop.unwrap_or_else(|| self.held.len() - self.may_be_a_stop());
        let kept = self.held.split_off(shown);
        let text = std::mem::replace(&mut self.held, kept);
        self.given += shown;
        let given = self.given;
        let count = self.tokens.partition_point(|token| token.begin < given);
        let tokens = self.tokens.drain(..count).collect();
        (Piece { text, tokens }, stop.is_some())
    }

    /// Bytes at the end of the held text that a stop string may begin with.
    fn may_be_a_stop(&self) -> usize {
        let held = self.held.as_str();
        let begins = |stop: &String| {
            let ends = stop.char_indices().map(|(end, _)| end).skip(1);
            ends.filter(|&end| held.ends_with(&stop[..end])).max()
        };
        self.stops.iter().filter_map(begins).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::tokenizer;

    /// The pieces of an answer of words, up to the one that stops it.
    fn pieces(words: &[&str], stops: &[&str]) -> (Vec<String>, usize, bool) {
        let tokenizer = Arc::new(tokenizer());
        let stops = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut answer = AnswerText::new(Arc::clone(&tokenizer), None, stops);
        let (mut texts, mut tokens) = (Vec::new(), 0);
        for word in words {
            let id = tokenizer.encode_plain(word).expect("ids")[0];
            let token = TokenLogprob { id, logprob: -1.0 };
            let (piece, stopped) = answer.push(token, Vec::new()).expect("text");
            tokens += piece.tokens.len();
            texts.push(piece.text);
            if stopped {
                return (texts, tokens, true);
            }
        }
        let piece = answer.finish().expect("text");
        tokens += piece.tokens.len();
        texts.push(piece.text);
        (texts, tokens, false)
    }

    // The tokenizer's decoder sets a space between words.

    #[test]
    fn without_a_stop_string_each_token_comes_at_once() {
        let (texts, tokens, _) = pieces(&["question", "answer", "user"], &[]);
        assert_eq!(texts, ["question", " answer", " user", ""]);
        assert_eq!(tokens, 3);
    }

    #[test]
    fn a_stop_string_that_spans_tokens_is_cut_and_not_shown() {
        let (texts, tokens, stopped) =
            pieces(&["question", "answer", "user", "user"], &["swer us", "never"]);
        assert_eq!((texts.concat().as_str(), stopped), ("question an", true));
        // The token in which the stop string begins is shown in part.
        assert_eq!(tokens, 2);
    }

    #[test]
    fn what_only_begins_like_a_stop_string_is_shown_later() {
        let (texts, tokens, stopped) =
            pieces(&["question", "answer", "question"], &["answer user"]);
        assert_eq!(texts, ["question", " ", "answer question", ""]);
        assert_eq!((tokens, stopped), (3, false));
        let (texts, _, stopped) = pieces(&["question", "answer"], &["answer user"]);
        assert_eq!((texts.concat().as_str(), stopped), ("question answer", false));
    }

    #[test]
    fn the_stop_string_that_comes_first_counts() {
        let (texts, _, stopped) = pieces(&["question", "answer"], &["stion", "que"]);
        assert_eq!((texts.concat().as_str(), stopped), ("", true));
    }
}
