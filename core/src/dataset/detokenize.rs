//! Tokens of an answer back into text, one after another.

use super::message::{Message, Role};
use super::protect::BLANK;
use super::tokenizer::{ChatTokenizer, TokenizerError};
use std::sync::Arc;

/// What stands for bytes that are no text.
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;
/// Tokens whose text is kept back at most, in wait for the rest of a character. No character has
/// more bytes than four, so what is longer is none.
const MAX_HELD: usize = 16;
/// Tokens of a prompt that decide how the text after it begins.
const CONTEXT_TOKENS: usize = 8;

/// The text of a growing answer.
///
/// The text of a token depends on its neighbours: a character may be spread over several, and
/// decoders in the way of SentencePiece take the space off the first. So a token's text is what the
/// text of the last few tokens gains by it, and a character is given out when it is whole.
pub struct TextStream {
    tokenizer: Arc<ChatTokenizer>,
    ids: Vec<u32>,
    /// The text of the tokens from here to `read` was given out, and is what new text follows.
    begin: usize,
    read: usize,
}

impl TextStream {
    /// The text of an answer by itself.
    #[must_use]
    pub fn new(tokenizer: Arc<ChatTokenizer>) -> Self {
        Self::after(tokenizer, &[])
    }

    /// The text that goes on from a prompt.
    #[must_use]
    pub fn after(tokenizer: Arc<ChatTokenizer>, prompt: &[u32]) -> Self {
        let ids = prompt[prompt.len().saturating_sub(CONTEXT_TOKENS)..].to_vec();
        Self { tokenizer, begin: 0, read: ids.len(), ids }
    }

    /// Takes the next token; gives the text that is complete by it, which may be none.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        self.ids.push(id);
        let gained = self.gained()?;
        let is_cut = gained.ends_with(REPLACEMENT) && self.ids.len() - self.read < MAX_HELD;
        if gained.is_empty() || is_cut {
            return Ok(String::new());
        }
        (self.begin, self.read) = (self.read, self.ids.len());
        Ok(gained)
    }

    /// What is left at the end: a character that never became whole is left out.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn finish(&mut self) -> Result<String, TokenizerError> {
        let gained = self.gained()?;
        let held: Vec<u8> =
            self.ids[self.read..].iter().flat_map(|&id| self.tokenizer.token_bytes(id)).collect();
        self.read = self.ids.len();
        if std::str::from_utf8(&held).is_ok() {
            return Ok(gained);
        }
        Ok(gained.trim_end_matches(REPLACEMENT).to_owned())
    }

    fn gained(&self) -> Result<String, TokenizerError> {
        let before = self.tokenizer.decode(&self.ids[self.begin..self.read])?;
        let now = self.tokenizer.decode(&self.ids[self.begin..])?;
        if let Some(gained) = now.strip_prefix(&before) {
            return Ok(gained.to_owned());
        }
        // A character that the prompt had begun is whole now.
        let same = now.chars().zip(before.chars()).take_while(|(a, b)| a == b).count();
        Ok(now.chars().skip(same).collect())
    }
}

impl ChatTokenizer {
    /// The bytes of a token as it stands in the middle of a text; none for an id that is no token.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(token) = self.token(id) else { return Vec::new() };
        if self.is_added(id) {
            return token.into_bytes();
        }
        if self.is_byte_level() {
            return token.chars().filter_map(byte_of_letter).collect();
        }
        let byte = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
        if let Some(byte) = byte.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            return vec![byte];
        }
        token.replace('\u{2581}', " ").into_bytes()
    }

    /// The tokens at which an answer in a conversation ends: those at which generation stops, and
    /// the one that the chat template writes after what the assistant says.
    #[must_use]
    pub fn turn_end_ids(&self) -> Vec<u32> {
        let mut ids = self.eos_ids().to_vec();
        let turn = [Message::new(Role::User, "a"), Message::new(Role::Assistant, BLANK)];
        let rendered = self.render(&turn, None, false).unwrap_or_default();
        let after = rendered.rsplit_once(BLANK).map_or("", |(_, after)| after.trim_start());
        let first = self.encode(after).ok().and_then(|ids| ids.first().copied());
        ids.extend(first.filter(|&id| self.is_special(id) && !self.eos_ids().contains(&id)));
        ids
    }
}

/// The byte that a letter of a byte-level vocabulary stands for, as GPT-2 chose them: printable
/// ones stand for themselves, and the others follow 255 in their order.
pub(super) fn byte_of_letter(letter: char) -> Option<u8> {
    let is_printable = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let code = u32::from(letter);
    match u8::try_from(code) {
        Ok(byte) => is_printable(byte).then_some(byte),
        Err(_) => {
            let index = usize::try_from(code - 256).ok()?;
            (0..=u8::MAX).filter(|&byte| !is_printable(byte)).nth(index)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{END, byte_tokenizer, chatml};
    use super::*;
    use serde_json::json;

    /// The pieces that `ids` give, one after another, the last one at the end.
    fn pieces(stream: &mut TextStream, ids: &[u32]) -> Vec<String> {
        let mut pieces: Vec<String> =
            ids.iter().map(|&id| stream.push(id).expect("decodes")).collect();
        pieces.push(stream.finish().expect("decodes"));
        pieces
    }

    #[test]
    fn a_character_is_given_out_when_it_is_whole() {
        let tokenizer = Arc::new(chatml());
        let ids = tokenizer.encode_plain("aé€😀!").expect("ids");
        assert_eq!(ids.len(), 11);
        let mut stream = TextStream::new(Arc::clone(&tokenizer));
        let pieces = pieces(&mut stream, &ids);
        assert_eq!(pieces, ["a", "", "é", "", "", "€", "", "", "", "😀", "!", ""]);
    }

    #[test]
    fn a_character_that_is_cut_off_at_the_end_is_left_out_and_a_real_mark_stays() {
        let tokenizer = Arc::new(chatml());
        let ids = tokenizer.encode_plain("a😀").expect("ids");
        let mut stream = TextStream::new(Arc::clone(&tokenizer));
        assert_eq!(pieces(&mut stream, &ids[..ids.len() - 1]).concat(), "a");
        let ids = tokenizer.encode_plain("a\u{fffd}").expect("ids");
        let mut stream = TextStream::new(Arc::clone(&tokenizer));
        assert_eq!(pieces(&mut stream, &ids).concat(), "a\u{fffd}");
    }

    #[test]
    fn bytes_that_are_no_text_do_not_hold_back_what_follows() {
        let tokenizer = Arc::new(chatml());
        let stray = tokenizer.encode_plain("é").expect("ids")[1];
        let letter = tokenizer.encode_plain("a").expect("ids")[0];
        let mut stream = TextStream::new(tokenizer);
        assert_eq!(pieces(&mut stream, &[stray, letter]), ["", "\u{fffd}a", ""]);
    }

    /// One token a word, with the marks and the decoder of SentencePiece.
    fn sentencepiece() -> ChatTokenizer {
        let mut vocabulary = json!({"<unk>": 0, "▁Hello": 1, "▁world": 2, "s": 3});
        for byte in 0..=255_u32 {
            vocabulary[format!("<0x{byte:02X}>")] = json!(10 + byte);
        }
        let decoder = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        let model = json!({"type": "BPE", "dropout": null, "unk_token": "<unk>",
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": true, "vocab": vocabulary, "merges": []});
        let added = json!([{"id": 300, "content": "</s>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true}]);
        byte_tokenizer(
            &json!({"decoder": decoder, "model": model, "added_tokens": added,
                    "pre_tokenizer": null, "normalizer": null, "post_processor": null}),
            &json!({"eos_token": "</s>"}),
        )
    }

    #[test]
    fn sentencepiece_takes_the_first_space_of_an_answer_and_keeps_it_after_a_prompt() {
        let tokenizer = Arc::new(sentencepiece());
        let words = [1, 2, 3, 2];
        let mut alone = TextStream::new(Arc::clone(&tokenizer));
        assert_eq!(pieces(&mut alone, &words), ["Hello", " world", "s", " world", ""]);
        let mut after = TextStream::after(Arc::clone(&tokenizer), &[1]);
        assert_eq!(pieces(&mut after, &words[1..]).concat(), " worlds world");
        let bytes: Vec<u32> = "€".bytes().map(|byte| 10 + u32::from(byte)).collect();
        let mut stream = TextStream::new(Arc::clone(&tokenizer));
        assert_eq!(pieces(&mut stream, &bytes), ["", "", "€", ""]);
        // A character that the prompt began.
        let mut stream = TextStream::after(tokenizer, &bytes[..1]);
        assert_eq!(pieces(&mut stream, &bytes[1..]), ["", "€", ""]);
    }

    #[test]
    fn a_tokens_bytes_are_those_that_it_adds_to_a_text() {
        let bytes = chatml();
        let ids = bytes.encode_plain(" é\n").expect("ids");
        let found: Vec<u8> = ids.iter().flat_map(|&id| bytes.token_bytes(id)).collect();
        assert_eq!(found, " é\n".as_bytes());
        assert_eq!(bytes.token_bytes(END), b"<|im_end|>");
        assert!(bytes.token_bytes(9999).is_empty());
        let pieces = sentencepiece();
        assert_eq!(pieces.token_bytes(2), b" world");
        assert_eq!(pieces.token_bytes(10 + 0xe2), [0xe2]);
    }

    #[test]
    fn an_answer_ends_where_the_template_ends_it_too() {
        assert_eq!(chatml().turn_end_ids(), [END]);
        let other = byte_tokenizer(&json!({}), &json!({"eos_token": "<s>"}));
        assert_eq!(other.turn_end_ids(), [258, END]);
        let silent = byte_tokenizer(&json!({}), &json!({"chat_template": null}));
        assert_eq!(silent.turn_end_ids(), [END]);
    }
}
