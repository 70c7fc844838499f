//! Long texts for continued pretraining, in windows that a model can attend to.
//!
//! Where a conversation is cut at `max_seq_length`, a text goes on in the next window, so that
//! every token of it is learned. A window begins with the last token of the one before it, whose
//! weight is 0 there: it is what the window's first new token is predicted from. So each token but
//! the text's first is a target exactly once.

use super::row::{Example, Row};
use super::tokenize::{TokenizeOptions, TokenizedRow, tokenize_row};
use super::tokenizer::ChatTokenizer;
use crate::errors::ApiError;

/// Turns a row into tokens: a text into as many windows as it needs; any other row stays one, and
/// is cut.
///
/// # Errors
/// As [`tokenize_row`].
pub fn tokenize_windows(
    tokenizer: &ChatTokenizer,
    row: &Row,
    options: &TokenizeOptions,
    param: &str,
) -> Result<Vec<TokenizedRow>, ApiError> {
    if !matches!(row.example, Example::Text { .. }) {
        return tokenize_row(tokenizer, row, options, param).map(|row| vec![row]);
    }
    let uncut = TokenizeOptions { max_seq_length: usize::MAX, ..*options };
    let whole = tokenize_row(tokenizer, row, &uncut, param)?;
    // A window of one token would have nothing to predict.
    let length = options.max_seq_length.max(2);
    let mut windows = Vec::with_capacity(whole.ids.len().div_ceil(length - 1));
    let mut start = 0;
    loop {
        let end = whole.ids.len().min(start + length);
        let mut weights = whole.weights[start..end].to_vec();
        weights[0] = 0.0;
        let ids = whole.ids[start..end].to_vec();
        let starts = vec![0];
        windows.push(TokenizedRow { line: whole.line, ids, weights, starts, truncated: false });
        if end == whole.ids.len() {
            return Ok(windows);
        }
        start = end - 1;
    }
}

#[cfg(test)]
mod tests {
    use super::super::message::{Message, Role};
    use super::super::testing::{END, byte_tokenizer, chatml};
    use super::*;
    use serde_json::json;

    fn windows(tokenizer: &ChatTokenizer, text: &str, max_seq_length: usize) -> Vec<TokenizedRow> {
        let row = Row { line: 3, example: Example::Text { text: text.to_owned() } };
        let options = TokenizeOptions { max_seq_length, prompt_loss_weight: 0.1 };
        tokenize_windows(tokenizer, &row, &options, "training_file").expect("windows")
    }

    /// The targets of all windows, in their order.
    fn targets(windows: &[TokenizedRow]) -> Vec<u32> {
        let of_window = |window: &TokenizedRow| {
            let all = window.ids.iter().zip(&window.weights);
            all.filter(|&(_, weight)| *weight == 1.0).map(|(&id, _)| id).collect::<Vec<_>>()
        };
        windows.iter().flat_map(of_window).collect()
    }

    #[test]
    fn a_text_that_fits_is_one_window_with_its_end() {
        let [window] = &windows(&chatml(), "abc", 4)[..] else { panic!("one window") };
        assert_eq!(window.weights, [0.0, 1.0, 1.0, 1.0]);
        assert_eq!(window.ids.last(), Some(&END));
    }

    #[test]
    fn every_token_but_the_first_is_a_target_once_however_long_the_windows_are() {
        let text = "the quick brown fox jumps over the lazy dog";
        for max_seq_length in [2, 3, 8, 16, 43, 44, 45, 100] {
            let windows = windows(&chatml(), text, max_seq_length);
            let whole: Vec<u32> =
                chatml().encode(text).expect("ids").into_iter().chain([END]).collect();
            assert_eq!(targets(&windows), whole[1..], "{max_seq_length}");
            for window in &windows {
                assert!((2..=max_seq_length).contains(&window.ids.len()));
                assert_eq!((window.weights[0], window.line), (0.0, 3));
                assert!(!window.truncated);
            }
            let pairs = windows.windows(2);
            assert!(pairs.into_iter().all(|pair| pair[0].ids.last() == pair[1].ids.first()));
        }
    }

    #[test]
    fn the_begin_token_comes_once_and_the_end_token_once() {
        let tokenizer =
            byte_tokenizer(&json!({}), &json!({"bos_token": "<s>", "add_bos_token": true}));
        let windows = windows(&tokenizer, &"a<s>".repeat(9), 10);
        assert_eq!(windows[0].ids[0], 258);
        let all: Vec<u32> = windows.iter().flat_map(|window| window.ids.clone()).collect();
        assert_eq!(all.iter().filter(|&&id| id == 258).count(), 1);
        assert_eq!(all.iter().filter(|&&id| id == END).count(), 1);
    }

    #[test]
    fn other_rows_are_one_sequence_and_are_cut() {
        let messages =
            vec![Message::new(Role::User, "a"), Message::new(Role::Assistant, "b".repeat(50))];
        let row = Row { line: 1, example: Example::Chat { messages, tools: None } };
        let options = TokenizeOptions { max_seq_length: 40, prompt_loss_weight: 0.1 };
        let rows = tokenize_windows(&chatml(), &row, &options, "training_file").expect("rows");
        assert_eq!(rows.len(), 1);
        assert!(rows[0].truncated);
    }
}
