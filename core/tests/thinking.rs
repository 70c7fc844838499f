//! A template that drops what an assistant thought in earlier turns.

use serde_json::Value;
use std::path::{Path, PathBuf};
use tunesmith_core::dataset::{
    ChatTokenizer, Example, Message, Role, Row, TokenizeOptions, tokenize_row,
};

fn reference() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/think_template.json");
    let text = std::fs::read(&path).expect("the repository ships the file");
    serde_json::from_slice(&text).expect("JSON")
}

/// SmolLM2's tokenizer with the reference's template.
fn tokenizer(reference: &Value) -> ChatTokenizer {
    let dir = std::env::var_os("TUNESMITH_TEST_MODEL").map_or_else(
        || {
            Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("../target/test-models/SmolLM2-135M-Instruct")
        },
        PathBuf::from,
    );
    let read =
        |name: &str| std::fs::read(dir.join(name)).expect("`scripts/test-setup.sh` makes it");
    let mut config: Value = serde_json::from_slice(&read("tokenizer_config.json")).expect("JSON");
    config["chat_template"] = reference["template"].clone();
    let config = serde_json::to_vec(&config).expect("JSON");
    ChatTokenizer::from_parts(&read("tokenizer.json"), &config, None).expect("tokenizer")
}

fn messages(reference: &Value) -> Vec<Message> {
    let list = reference["messages"].as_array().expect("messages");
    list.iter()
        .map(|message| {
            let role = message["role"].as_str().and_then(Role::parse).expect("role");
            Message::new(role, message["content"].as_str().expect("content"))
        })
        .collect()
}

fn row(messages: &[Message]) -> Row {
    Row { line: 3, example: Example::Chat { messages: messages.to_vec(), tools: None } }
}

const OPTIONS: TokenizeOptions = TokenizeOptions { max_seq_length: 1000, prompt_loss_weight: 0.0 };

#[test]
fn three_turns_with_thoughts_are_rendered_as_hugging_face_renders_them() {
    let reference = reference();
    let (tokenizer, messages) = (tokenizer(&reference), messages(&reference));
    let renderings = reference["renderings"].as_array().expect("renderings");
    assert_eq!(renderings.len(), 12);
    for rendering in renderings {
        let count = rendering["messages"].as_u64().expect("a count") as usize;
        let generation = rendering["add_generation_prompt"].as_bool().expect("a choice");
        let text = tokenizer.render(&messages[..count], None, generation).expect("render");
        assert_eq!(text, rendering["text"].as_str().expect("text"), "{count}, {generation}");
    }
}

#[test]
fn each_answer_with_thoughts_is_a_sequence_with_the_tokens_hugging_face_gives() {
    let reference = reference();
    let (tokenizer, messages) = (tokenizer(&reference), messages(&reference));
    let ids = |count: usize, generation: bool| -> Vec<u32> {
        let renderings = reference["renderings"].as_array().expect("renderings");
        let rendering = renderings.iter().find(|rendering| {
            rendering["messages"] == count && rendering["add_generation_prompt"] == generation
        });
        let ids = rendering.expect("every beginning")["ids"].as_array().expect("ids");
        ids.iter().map(|id| id.as_u64().expect("an id") as u32).collect()
    };
    for prompt_loss_weight in [0.0, 0.1] {
        let options = TokenizeOptions { prompt_loss_weight, ..OPTIONS };
        let tokens =
            tokenize_row(&tokenizer, &row(&messages), &options, "training_file").expect("tokens");
        let sequences: Vec<_> = tokens.sequences().collect();
        assert_eq!(sequences.len(), 3);
        let mut prompts = String::new();
        for (sequence, index) in sequences.into_iter().zip([1, 3, 5]) {
            let (before, up_to) = (ids(index, true), ids(index + 1, false));
            let (found, weights) = (&tokens.ids[sequence.clone()], &tokens.weights[sequence]);
            // The template's last newline is behind the end of the turn.
            assert_eq!(found, &up_to[..up_to.len() - 1], "{index}");
            assert_eq!(found[..before.len()], before, "{index}");
            assert!(weights[before.len()..].iter().all(|&weight| weight == 1.0), "{index}");
            let all = before.iter().zip(weights);
            let counted: Vec<u32> =
                all.filter(|(_, weight)| **weight > 0.0).map(|(&id, _)| id).collect();
            prompts += &tokenizer.decode_with_special(&counted).expect("decode");
        }
        // Each question once, and no answer.
        let expected = "user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n\n\
                        <|im_start|>user\nAnd twice that?<|im_end|>\n<|im_start|>assistant\n\n\
                        <|im_start|>user\nMinus one?<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(prompts, if prompt_loss_weight > 0.0 { expected } else { "" });
    }
}

#[test]
fn the_last_answer_is_learned_with_its_thought_when_earlier_ones_have_none() {
    let reference = reference();
    let (tokenizer, mut messages) = (tokenizer(&reference), messages(&reference));
    for message in &mut messages[..5] {
        if message.role == Role::Assistant {
            *message = Message::new(Role::Assistant, "7");
        }
    }
    let tokens =
        tokenize_row(&tokenizer, &row(&messages), &OPTIONS, "training_file").expect("tokens");
    let learned: Vec<u32> = tokens
        .ids
        .iter()
        .zip(&tokens.weights)
        .filter(|&(_, weight)| *weight == 1.0)
        .map(|(&id, _)| id)
        .collect();
    assert_eq!(
        tokenizer.decode_with_special(&learned).expect("decode"),
        "7<|im_end|>7<|im_end|><think>\nTen less one is nine.\n</think>\n\n9<|im_end|>"
    );
}
