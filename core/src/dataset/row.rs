//! One row of a file: which shape it has, and what it teaches.

use super::fault::{Fault, quoted, shortened};
use super::format::{Repair, Shape};
use super::message::{Message, Role, check_conversation, parse_messages};
use super::preference::PAIR_KEYS;
use serde_json::{Map, Value};
use std::collections::BTreeSet;

/// A checked row.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Where it begins in its file, from 1.
    pub line: usize,
    /// What it teaches.
    pub example: Example,
}

/// What a row teaches.
#[expect(
    clippy::large_enum_variant,
    reason = "all rows of a job are of one kind, so the room of the larger one is not wasted"
)]
#[derive(Debug, Clone, PartialEq)]
pub enum Example {
    /// A conversation, of which the assistant's turns are learned.
    Chat {
        /// Its messages.
        messages: Vec<Message>,
        /// Tools that the assistant may call, as the chat template takes them.
        tools: Option<Value>,
    },
    /// A text of which the second part is learned.
    PromptCompletion {
        /// The first part.
        prompt: String,
        /// The second part.
        completion: String,
    },
    /// A text that is learned whole.
    Text {
        /// It.
        text: String,
    },
    /// Two answers to a conversation, of which the first is preferred.
    ChatPair {
        /// What is answered.
        messages: Vec<Message>,
        /// Tools that the assistant may call, as the chat template takes them.
        tools: Option<Value>,
        /// The preferred answer.
        chosen: Message,
        /// The other one.
        rejected: Message,
    },
    /// Two ways to go on from a text, of which the first is preferred.
    TextPair {
        /// The text.
        prompt: String,
        /// The preferred one.
        chosen: String,
        /// The other one.
        rejected: String,
    },
}

/// Keys of which every row has one.
pub(super) const ROW_KEYS: [&str; 8] = [
    "messages",
    "conversations",
    "completion",
    "instruction",
    "text",
    "chosen",
    "preferred_output",
    "prompt",
];

/// Reads and checks the object of one row.
pub(super) fn parse_row(
    fields: &Map<String, Value>,
    repairs: &mut BTreeSet<Repair>,
) -> Result<(Shape, Example), Fault> {
    let has = |key: &str| fields.contains_key(key);
    if PAIR_KEYS.into_iter().any(has) {
        return Err(Fault::new(
            "the row is a preference pair, but method \"supervised\" takes chat rows \
             {\"messages\": […]} or prompt/completion rows.",
            "Preference pairs belong to method \"dpo\".",
        ));
    }
    if let Some(messages) = fields.get("messages") {
        let messages = parse_messages(messages, "messages", repairs)?;
        return Ok((Shape::Chat, Example::Chat { messages, tools: tools(fields)? }));
    }
    if let Some(conversations) = fields.get("conversations") {
        let messages = sharegpt(conversations)?;
        return Ok((Shape::ShareGpt, Example::Chat { messages, tools: None }));
    }
    if has("prompt") || has("completion") {
        let prompt = text(fields, "prompt")?.to_owned();
        let completion = filled_text(fields, "completion")?.to_owned();
        return Ok((Shape::PromptCompletion, Example::PromptCompletion { prompt, completion }));
    }
    if has("instruction") {
        let messages = alpaca(fields)?;
        return Ok((Shape::Alpaca, Example::Chat { messages, tools: None }));
    }
    if has("text") {
        let text = filled_text(fields, "text")?.to_owned();
        return Ok((Shape::Text, Example::Text { text }));
    }
    let keys: Vec<_> = fields.keys().map(|key| format!("\"{key}\"")).collect();
    let found = if keys.is_empty() {
        "the row is an empty object".to_owned()
    } else {
        format!("the row has the keys {}", shortened(&keys.join(", ")))
    };
    Err(Fault::new(
        format!(
            "{found}, but must have \"messages\" (chat), or \"prompt\" and \"completion\", or \
             \"text\"."
        ),
        "Also read are \"instruction\" with \"output\" (alpaca) and \"conversations\" (sharegpt).",
    ))
}

pub(super) fn text<'a>(fields: &'a Map<String, Value>, key: &str) -> Result<&'a str, Fault> {
    match fields.get(key) {
        Some(Value::String(text)) => Ok(text),
        Some(value) => Err(Fault::at_key(
            key,
            format!("is {}, but must be text.", quoted(value)),
            "Write it as a JSON string.",
        )),
        None => Err(Fault::at_key(
            key,
            "is missing, but must be text.",
            "Give every row the same keys.",
        )),
    }
}

/// Text that is learned, so it must not be empty.
pub(super) fn filled_text<'a>(fields: &'a Map<String, Value>, key: &str) -> Result<&'a str, Fault> {
    let text = text(fields, key)?;
    if text.is_empty() {
        return Err(Fault::at_key(
            key,
            "is empty, but is what the model should learn.",
            "Fill it in, or remove the row.",
        ));
    }
    Ok(text)
}

pub(super) const TOOL_HINT: &str =
    "Write {\"type\": \"function\", \"function\": {\"name\": …, \"parameters\": …}}.";

pub(super) fn tools(fields: &Map<String, Value>) -> Result<Option<Value>, Fault> {
    match fields.get("tools") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(list)) if list.is_empty() => Ok(None),
        Some(tools @ Value::Array(list)) => match list.iter().position(|t| !t.is_object()) {
            None => Ok(Some(tools.clone())),
            Some(index) => Err(Fault::at_key(
                format_args!("tools[{index}]"),
                format!("is {}, but must be an object.", quoted(&list[index])),
                TOOL_HINT,
            )),
        },
        Some(value) => Err(Fault::at_key(
            "tools",
            format!("is {}, but must be a list of tools.", quoted(value)),
            "Write [{\"type\": \"function\", \"function\": {…}}], or leave it out.",
        )),
    }
}

/// Stanford Alpaca's rows: an instruction, perhaps an input to it, and the answer.
fn alpaca(fields: &Map<String, Value>) -> Result<Vec<Message>, Fault> {
    let optional = |key: &str| match fields.get(key) {
        None | Some(Value::Null) => Ok(""),
        Some(_) => text(fields, key),
    };
    let system = optional("system")?;
    let input = optional("input")?;
    let mut question = text(fields, "instruction")?.to_owned();
    if !input.is_empty() {
        if !question.is_empty() {
            question.push_str("\n\n");
        }
        question.push_str(input);
    }
    let mut messages = Vec::new();
    if !system.is_empty() {
        messages.push(Message::new(Role::System, system));
    }
    messages.push(Message::new(Role::User, question));
    messages.push(Message::new(Role::Assistant, filled_text(fields, "output")?));
    Ok(messages)
}

/// ShareGPT's rows: turns with other names for role and content.
fn sharegpt(value: &Value) -> Result<Vec<Message>, Fault> {
    const NAMES: [(&str, Role); 6] = [
        ("human", Role::User),
        ("user", Role::User),
        ("gpt", Role::Assistant),
        ("assistant", Role::Assistant),
        ("system", Role::System),
        ("tool", Role::Tool),
    ];
    let hint = "Write [{\"from\": \"human\", \"value\": …}, {\"from\": \"gpt\", \"value\": …}].";
    let Value::Array(turns) = value else {
        return Err(Fault::at_key(
            "conversations",
            format!("is {}, but must be a list of turns.", quoted(value)),
            hint,
        ));
    };
    let mut messages = Vec::with_capacity(turns.len());
    for (index, turn) in turns.iter().enumerate() {
        let path = format!("conversations[{index}]");
        let from = turn.get("from").unwrap_or(&Value::Null);
        let role = NAMES.into_iter().find(|(name, _)| from == name).map(|(_, role)| role);
        let role = role.ok_or_else(|| {
            let all = NAMES.map(|(name, _)| name).join(", ");
            Fault::at_key(
                format_args!("{path}.from"),
                format!("is {}, but must be one of {all}.", quoted(from)),
                hint,
            )
        })?;
        let content = turn.get("value").and_then(Value::as_str).ok_or_else(|| {
            Fault::at_key(format_args!("{path}.value"), "is missing, but must be text.", hint)
        })?;
        messages.push(Message::new(role, content));
    }
    check_conversation(&messages, "conversations")?;
    Ok(messages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: &Value) -> Result<(Shape, Example), Fault> {
        parse_row(value.as_object().expect("object"), &mut BTreeSet::new())
    }

    fn refusal(value: &Value) -> String {
        read(value).expect_err(&value.to_string()).into_api_error(3, "training_file").message
    }

    #[test]
    fn a_preference_pair_is_refused_naming_the_method_it_belongs_to() {
        for row in [
            json!({"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []}),
            json!({"prompt": "a", "chosen": "b", "rejected": "c"}),
        ] {
            let text = refusal(&row);
            assert!(text.contains("preference pair"), "{text}");
            assert!(text.contains("method \"supervised\""), "{text}");
            assert!(text.ends_with("belong to method \"dpo\"."), "{text}");
        }
    }

    #[test]
    fn a_row_of_no_known_shape_is_refused_with_its_keys() {
        assert!(refusal(&json!({"question": "a", "answer": "b"})).starts_with(
            "Line 3: the row has the keys \"question\", \"answer\", but must have \"messages\""
        ));
        assert!(refusal(&json!({})).starts_with("Line 3: the row is an empty object"));
    }

    #[test]
    fn a_missing_or_wrong_field_is_named() {
        for (row, rule) in [
            (json!({"prompt": "a"}), "completion is missing"),
            (json!({"completion": "a"}), "prompt is missing"),
            (json!({"prompt": "a", "completion": 7}), "completion is 7"),
            (json!({"prompt": "a", "completion": ""}), "completion is empty"),
            (json!({"text": ""}), "text is empty"),
            (json!({"instruction": "a"}), "output is missing"),
            (json!({"conversations": {}}), "conversations is {}"),
            (json!({"conversations": [{"from": "robot", "value": ""}]}), "conversations[0].from"),
            (json!({"conversations": [{"from": "gpt"}]}), "conversations[0].value is missing"),
            (json!({"messages": "hi"}), "messages is \"hi\", but must be a list"),
        ] {
            let text = refusal(&row);
            assert!(text.starts_with(&format!("Line 3: {rule}")), "{text}");
        }
        let assistant = json!([{"role": "assistant", "content": "a"}]);
        let text = refusal(&json!({"messages": assistant, "tools": {"a": 1}}));
        assert!(text.starts_with("Line 3: tools is {"), "{text}");
        let text = refusal(&json!({"messages": assistant, "tools": ["a"]}));
        assert!(text.starts_with("Line 3: tools[0] is \"a\""), "{text}");
    }

    #[test]
    fn alpaca_becomes_a_conversation() {
        let row = json!({"instruction": "Add.", "input": "1 2", "output": "3", "system": "Terse."});
        let (shape, example) = read(&row).expect("row");
        assert_eq!(shape, Shape::Alpaca);
        let messages = vec![
            Message::new(Role::System, "Terse."),
            Message::new(Role::User, "Add.\n\n1 2"),
            Message::new(Role::Assistant, "3"),
        ];
        assert_eq!(example, Example::Chat { messages, tools: None });
    }

    #[test]
    fn sharegpt_becomes_a_conversation() {
        let (shape, example) = read(&json!({"id": 1, "conversations": [
            {"from": "system", "value": "s"}, {"from": "human", "value": "u"},
            {"from": "gpt", "value": "a"}, {"from": "tool", "value": "t"},
        ]}))
        .expect("row");
        assert_eq!(shape, Shape::ShareGpt);
        let Example::Chat { messages, .. } = example else { panic!("{example:?}") };
        let roles: Vec<_> = messages.iter().map(|message| message.role).collect();
        assert_eq!(roles, [Role::System, Role::User, Role::Assistant, Role::Tool]);
    }
}
