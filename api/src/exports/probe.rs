//! The texts at which an export is compared with the served model.

use tunesmith_core::dataset::{ChatTokenizer, Message, Role};

/// Tokens of a text that are read: what an export loses shows in the first of them.
const MAX_TOKENS: usize = 48;

/// What is asked and what is answered: prose, code, numbers in JSON, and languages that are not
/// English.
const TEXTS: [(&str, &str); 4] = [
    (
        "What is the capital of France, and how many people live there?",
        "Paris is the capital of France. About two million people live in the city itself, and \
         twelve million in the region around it.",
    ),
    (
        "Write a function that adds two numbers.",
        "```python\ndef add(first, second):\n    return first + second\n```\nCall it as `add(2, 40)`.",
    ),
    (
        "3 apples at 1.20 and 12 pears at 0.75, as JSON.",
        "{\"items\": [{\"name\": \"apple\", \"count\": 3, \"price\": 1.20}, {\"name\": \"pear\"}]}",
    ),
    (
        "Wie spät ist es in Tōkyō, wenn es in Berlin zwölf Uhr mittags ist?",
        "In 東京 ist es dann acht Uhr abends. En Lima son las seis de la mañana.",
    ),
];

/// The texts as this model's tokens, none longer than its context: as chats, where it has a
/// template that takes them.
pub(super) fn prompts(tokenizer: &ChatTokenizer, context_length: u64) -> Vec<Vec<u32>> {
    let longest = usize::try_from(context_length).unwrap_or(usize::MAX).min(MAX_TOKENS);
    let tokens = |(asked, answered): (&str, &str)| {
        let chat = [Message::new(Role::User, asked), Message::new(Role::Assistant, answered)];
        let text = || tokenizer.encode_prompt(&format!("{asked}\n{answered}"));
        let ids = tokenizer.encode_chat(&chat, None, false).or_else(|_| text());
        let mut ids = ids.unwrap_or_default();
        ids.truncate(longest);
        ids
    };
    TEXTS.into_iter().map(tokens).filter(|ids| !ids.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::tokenizer;

    #[test]
    fn texts_are_no_longer_than_the_context() {
        for (context, longest) in [(5, 5), (1 << 20, MAX_TOKENS)] {
            let prompts = prompts(&tokenizer(), context);
            assert!(!prompts.is_empty());
            assert!(prompts.iter().all(|ids| !ids.is_empty() && ids.len() <= longest));
        }
    }
}
