//! What holds for every file, however odd.

use super::testing::chatml;
use super::{TokenizeOptions, read_rows, tokenize_row};
use proptest::prelude::*;
use serde_json::{Value, json};

/// JSON of the words that rows are made of, in any arrangement.
fn json_value() -> impl Strategy<Value = Value> {
    let word = prop::sample::select(vec![
        "messages",
        "role",
        "content",
        "weight",
        "assistant",
        "user",
        "system",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "{}",
        "prompt",
        "completion",
        "text",
        "type",
        "tools",
        "conversations",
        "from",
        "value",
        "human",
        "gpt",
        "instruction",
        "output",
        "<|im_end|>",
    ]);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        word.clone().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 5, move |inner| {
        let fields = prop::collection::vec((word.clone(), inner.clone()), 0..5);
        prop_oneof![
            prop::collection::vec(inner, 0..5).prop_map(Value::Array),
            fields.prop_map(|fields| {
                Value::Object(
                    fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
                )
            }),
        ]
    })
}

/// A conversation with an answer in it.
fn chat_row() -> impl Strategy<Value = Value> {
    let role = prop::sample::select(vec!["user", "assistant", "system", "tool", "developer"]);
    let content = prop_oneof![".{0,20}", "[<|im_endstar>\u{fdd0}\u{fdd1}]{0,24}"];
    let message = (role, content.clone(), prop::sample::select(vec![0.0, 0.25, 1.0])).prop_map(
        |(role, content, weight)| json!({"role": role, "content": content, "weight": weight}),
    );
    (prop::collection::vec(message, 0..5), content).prop_map(|(mut messages, answer)| {
        messages.push(json!({"role": "assistant", "content": answer}));
        json!({"messages": messages})
    })
}

fn options() -> impl Strategy<Value = TokenizeOptions> {
    (8usize..200, 0.0f32..=1.0).prop_map(|(max_seq_length, prompt_loss_weight)| TokenizeOptions {
        max_seq_length,
        prompt_loss_weight,
    })
}

fn check(bytes: &[u8], options: &TokenizeOptions) -> Result<(), TestCaseError> {
    let Ok(rows) = read_rows(bytes, "training_file") else { return Ok(()) };
    let tokenizer = chatml();
    for row in &rows.rows {
        let Ok(tokens) = tokenize_row(&tokenizer, row, options, "training_file") else { continue };
        prop_assert_eq!(tokens.ids.len(), tokens.weights.len());
        prop_assert!(tokens.ids.len() <= options.max_seq_length);
        prop_assert!(tokens.weights.iter().all(|weight| (0.0..=1.0).contains(weight)));
        prop_assert_eq!(tokens.weights.first(), Some(&0.0));
        prop_assert!(tokens.weights.iter().any(|&weight| weight > 0.0));
    }
    Ok(())
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(
        start in prop::sample::select(vec!["", "{", "[", "\u{feff}", "text\n", "{\"text\": \"a\"}\n"]),
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        options in options(),
    ) {
        check(&[start.as_bytes(), &bytes].concat(), &options)?;
    }

    #[test]
    fn no_json_makes_reader_or_tokenizer_panic(
        rows in prop::collection::vec(json_value(), 0..4),
        options in options(),
    ) {
        let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
        check(lines.as_bytes(), &options)?;
        check(Value::Array(rows).to_string().as_bytes(), &options)?;
    }

    #[test]
    fn every_weight_of_a_conversation_lies_within_0_and_1(
        row in chat_row(),
        options in options(),
    ) {
        check(row.to_string().as_bytes(), &options)?;
    }

    #[test]
    fn a_conversations_special_tokens_are_the_templates_alone(row in chat_row()) {
        let rows = read_rows(row.to_string().as_bytes(), "training_file").expect("a good row");
        let options = TokenizeOptions { max_seq_length: 10_000, prompt_loss_weight: 0.0 };
        let tokens = tokenize_row(&chatml(), &rows.rows[0], &options, "training_file");
        let turns = row["messages"].as_array().map_or(0, Vec::len);
        let ids = tokens.expect("tokens").ids;
        for special in [256, 257] {
            prop_assert_eq!(ids.iter().filter(|&&id| id == special).count(), turns);
        }
    }
}
