//! One message of a conversation, checked.

use super::fault::{Fault, quoted};
use super::format::Repair;
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::fmt;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Instructions for the whole conversation.
    System,
    /// The same by its newer name.
    Developer,
    /// The person.
    User,
    /// The model: what is trained.
    Assistant,
    /// The answer of a tool that the assistant called.
    Tool,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::System, Self::Developer, Self::User, Self::Assistant, Self::Tool];

    /// The word on the wire and in chat templates.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Developer => "developer",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }

    /// The role that `word` names.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == word)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A message as a chat template sees it, and what its tokens count in training.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said; `None` beside tool calls.
    pub content: Option<String>,
    /// Factor on the loss of an assistant's tokens, within 0 to 1; it has no meaning for others.
    pub weight: f32,
    /// Everything else: `name`, `tool_calls` with their arguments as objects, `tool_call_id`.
    pub rest: Map<String, Value>,
}

impl Message {
    /// A plain message.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: Some(content.into()), weight: 1.0, rest: Map::new() }
    }

    /// What the assistant thought before it said its content, where that is a field of its own.
    pub(super) fn thoughts(&self) -> Option<&Value> {
        let is_assistant = self.role == Role::Assistant;
        let mut fields = REASONING_FIELDS.iter().filter(|_| is_assistant);
        fields.find_map(|name| self.rest.get(*name))
    }

    /// Whether it calls tools.
    #[must_use]
    pub fn has_tool_calls(&self) -> bool {
        self.rest.contains_key(TOOL_CALLS)
    }
}

const TOOL_CALLS: &str = "tool_calls";

/// The names under which a message's thoughts are given, the first the one that most templates
/// read.
pub(super) const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Reads and checks a list of messages that stands under the key `path`.
pub(super) fn parse_messages(
    value: &Value,
    path: &str,
    repairs: &mut BTreeSet<Repair>,
) -> Result<Vec<Message>, Fault> {
    let Value::Array(list) = value else {
        return Err(Fault::at_key(
            path,
            format!("is {}, but must be a list of messages.", quoted(value)),
            "Write [{\"role\": \"user\", \"content\": …}, {\"role\": \"assistant\", …}].",
        ));
    };
    let messages = list
        .iter()
        .enumerate()
        .map(|(index, value)| parse_message(value, &format!("{path}[{index}]"), repairs))
        .collect::<Result<Vec<_>, _>>()?;
    check_conversation(&messages, path)?;
    Ok(messages)
}

/// Refuses a conversation in which there is nothing to learn.
pub(super) fn check_conversation(messages: &[Message], path: &str) -> Result<(), Fault> {
    if messages.is_empty() {
        return Err(Fault::at_key(
            path,
            "is empty, but must have at least one assistant message.",
            "Remove the row.",
        ));
    }
    let mut assistant = messages.iter().filter(|m| m.role == Role::Assistant).peekable();
    if assistant.peek().is_none() {
        return Err(Fault::at_key(
            path,
            "must have at least one assistant message, but has none.",
            "End the conversation with the answer that the model should learn, \
             {\"role\": \"assistant\", \"content\": …}.",
        ));
    }
    if assistant.all(|message| message.weight == 0.0) {
        return Err(Fault::at_key(
            path,
            "has weight 0 on every assistant message, but at least one must count.",
            "Give a weight above 0 to a message that should be learned.",
        )
        .trains_nothing());
    }
    Ok(())
}

/// Reads and checks one message.
pub(super) fn parse_message(
    value: &Value,
    path: &str,
    repairs: &mut BTreeSet<Repair>,
) -> Result<Message, Fault> {
    let Value::Object(fields) = value else {
        return Err(Fault::at_key(
            path,
            format!("is {}, but must be an object.", quoted(value)),
            "Write {\"role\": …, \"content\": …}.",
        ));
    };
    let mut message = Message {
        role: role(fields, path)?,
        content: None,
        weight: weight(fields, path)?.unwrap_or(1.0),
        rest: Map::new(),
    };
    for (key, value) in fields {
        match key.as_str() {
            _ if value.is_null() => {}
            "role" | "weight" => {}
            "content" => {
                let (content, weight) = content(value, path)?;
                message.content = Some(content);
                message.weight *= weight.unwrap_or(1.0);
            }
            TOOL_CALLS => {
                let calls = tool_calls(value, path, repairs)?;
                message.rest.insert(key.clone(), calls);
            }
            "function_call" => {
                return Err(Fault::at_key(
                    format_args!("{path}.function_call"),
                    "is the old form of a call to a tool.",
                    "Write \"tool_calls\": [{\"type\": \"function\", \"function\": {\"name\": …, \
                     \"arguments\": …}}].",
                ));
            }
            _ => {
                message.rest.insert(key.clone(), value.clone());
            }
        }
    }
    if message.content.is_none() && !message.has_tool_calls() {
        return Err(Fault::at_key(
            format_args!("{path}.content"),
            "is missing, but must be text.",
            "Only an assistant message with tool_calls may leave it out.",
        ));
    }
    if message.role != Role::Assistant {
        if message.has_tool_calls() {
            return Err(Fault::at_key(
                format_args!("{path}.tool_calls"),
                format!("stands in a message of role \"{}\".", message.role),
                "Only the assistant calls tools.",
            ));
        }
        if message.weight != 1.0 || fields.get("weight").is_some_and(|weight| !weight.is_null()) {
            repairs.insert(Repair::WeightIgnored);
        }
    }
    Ok(message)
}

fn role(fields: &Map<String, Value>, path: &str) -> Result<Role, Fault> {
    let all = Role::ALL.map(Role::as_str).join(", ");
    let hint = "Rename it to the one that it means.";
    match fields.get("role") {
        None => Err(Fault::at_key(
            format_args!("{path}.role"),
            format!("is missing, but must be one of {all}."),
            "Say who speaks in each message.",
        )),
        Some(value) => value.as_str().and_then(Role::parse).ok_or_else(|| {
            Fault::at_key(
                format_args!("{path}.role"),
                format!("is {}, but must be one of {all}.", quoted(value)),
                hint,
            )
        }),
    }
}

/// The field `weight` of a message or of a content part.
fn weight(fields: &Map<String, Value>, path: &str) -> Result<Option<f32>, Fault> {
    let Some(value) = fields.get("weight").filter(|value| !value.is_null()) else {
        return Ok(None);
    };
    value
        .as_f64()
        .filter(|weight| (0.0..=1.0).contains(weight))
        .map(|weight| Some(weight as f32))
        .ok_or_else(|| {
            Fault::at_key(
                format_args!("{path}.weight"),
                format!("is {}, but must be a number from 0 to 1.", quoted(value)),
                "Write 0 to leave the message out of training, 1 or nothing to train it.",
            )
        })
}

/// Text, or a list of text parts joined; beside it the parts' weight.
fn content(value: &Value, path: &str) -> Result<(String, Option<f32>), Fault> {
    let parts = match value {
        Value::String(text) => return Ok((text.clone(), None)),
        Value::Array(parts) => parts,
        _ => {
            return Err(Fault::at_key(
                format_args!("{path}.content"),
                format!("is {}, but must be text.", quoted(value)),
                "Write it as a JSON string.",
            ));
        }
    };
    let mut joined = String::new();
    let mut weights = Vec::with_capacity(parts.len());
    for (index, part) in parts.iter().enumerate() {
        let path = format!("{path}.content[{index}]");
        let kind = part.get("type").unwrap_or(&Value::Null);
        if kind != "text" {
            return Err(Fault::at_key(
                format_args!("{path}.type"),
                format!("is {}, but must be \"text\".", quoted(kind)),
                "Only text is read: remove images, audio and files.",
            ));
        }
        let Some(text) = part.get("text").and_then(Value::as_str) else {
            return Err(Fault::at_key(
                format_args!("{path}.text"),
                "is missing, but must be text.",
                "Write {\"type\": \"text\", \"text\": …}.",
            ));
        };
        joined.push_str(text);
        let fields = part.as_object().map(|fields| weight(fields, &path)).transpose()?;
        weights.push(fields.flatten().unwrap_or(1.0));
    }
    if parts.is_empty() {
        return Err(Fault::at_key(
            format_args!("{path}.content"),
            "is an empty list, but must be text.",
            "Write it as a JSON string.",
        ));
    }
    if weights.iter().any(|&weight| weight != weights[0]) {
        return Err(Fault::at_key(
            format_args!("{path}.content"),
            "has parts of different weight.",
            "A message counts as a whole: put the weight on the message, or split it.",
        ));
    }
    Ok((joined, Some(weights[0])))
}

/// Checks tool calls and turns their arguments into objects, which is what chat templates expect.
fn tool_calls(value: &Value, path: &str, repairs: &mut BTreeSet<Repair>) -> Result<Value, Fault> {
    let path = format!("{path}.{TOOL_CALLS}");
    let hint = "Write [{\"id\": …, \"type\": \"function\", \"function\": {\"name\": …, \
                \"arguments\": \"{…}\"}}].";
    let list = value.as_array().filter(|list| !list.is_empty()).ok_or_else(|| {
        Fault::at_key(&path, format!("is {}, but must be a list of calls.", quoted(value)), hint)
    })?;
    let mut calls = Vec::with_capacity(list.len());
    for (index, call) in list.iter().enumerate() {
        let path = format!("{path}[{index}].function");
        let mut call = call.clone();
        let function = call
            .get_mut("function")
            .and_then(Value::as_object_mut)
            .ok_or_else(|| Fault::at_key(&path, "is missing, but must be an object.", hint))?;
        if !function.get("name").is_some_and(Value::is_string) {
            return Err(Fault::at_key(
                format_args!("{path}.name"),
                "is missing, but must be text.",
                hint,
            ));
        }
        let arguments = function.get("arguments").unwrap_or(&Value::Null);
        let object = match arguments {
            Value::Object(_) => {
                repairs.insert(Repair::ArgumentsObject);
                Some(arguments.clone())
            }
            Value::String(text) => serde_json::from_str(text).ok().filter(Value::is_object),
            _ => None,
        };
        let object = object.ok_or_else(|| {
            Fault::at_key(
                format_args!("{path}.arguments"),
                format!("is {}, but must be the text of a JSON object.", quoted(arguments)),
                "Write \"{}\" for a call without arguments.",
            )
        })?;
        function.insert("arguments".to_owned(), object);
        calls.push(call);
    }
    Ok(Value::Array(calls))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: &Value) -> (Result<Message, Fault>, BTreeSet<Repair>) {
        let mut repairs = BTreeSet::new();
        (parse_message(value, "messages[1]", &mut repairs), repairs)
    }

    fn refusal(value: &Value) -> String {
        let fault = read(value).0.expect_err(&value.to_string());
        fault.into_api_error(7, "training_file").message
    }

    #[test]
    fn a_role_that_is_not_known_is_refused_with_those_that_are() {
        assert_eq!(
            refusal(&json!({"role": "robot", "content": "beep"})),
            "Line 7: messages[1].role is \"robot\", but must be one of system, developer, user, \
             assistant, tool. Rename it to the one that it means."
        );
    }

    #[test]
    fn each_broken_rule_names_its_key_path() {
        let call =
            |function: Value| json!({"role": "assistant", "tool_calls": [{"function": function}]});
        for (message, path) in [
            (json!("hello"), "messages[1] is \"hello\", but must be an object"),
            (json!({"content": "a"}), "messages[1].role is missing"),
            (json!({"role": 1, "content": "a"}), "messages[1].role is 1"),
            (json!({"role": "user"}), "messages[1].content is missing"),
            (json!({"role": "assistant", "content": null}), "messages[1].content is missing"),
            (json!({"role": "user", "content": 5}), "messages[1].content is 5"),
            (json!({"role": "user", "content": []}), "messages[1].content is an empty list"),
            (
                json!({"role": "user", "content": [{"type": "text", "text": "see"},
                    {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]}),
                "messages[1].content[1].type is \"image_url\"",
            ),
            (json!({"role": "user", "content": [{"type": "text"}]}), "messages[1].content[0].text"),
            (json!({"role": "assistant", "content": "a", "weight": 2}), "messages[1].weight is 2"),
            (json!({"role": "assistant", "content": "a", "weight": "1"}), "messages[1].weight is"),
            (json!({"role": "assistant", "content": "a", "weight": true}), "messages[1].weight is"),
            (
                json!({"role": "assistant", "content": [
                    {"type": "text", "text": "a", "weight": 1},
                    {"type": "text", "text": "b", "weight": 0}]}),
                "messages[1].content has parts of different weight",
            ),
            (json!({"role": "assistant", "tool_calls": []}), "messages[1].tool_calls is []"),
            (
                json!({"role": "assistant", "tool_calls": [{}]}),
                "messages[1].tool_calls[0].function is missing",
            ),
            (call(json!({"arguments": "{}"})), "messages[1].tool_calls[0].function.name"),
            (
                call(json!({"name": "f", "arguments": "x = 1"})),
                "messages[1].tool_calls[0].function.arguments is \"x = 1\"",
            ),
            (
                json!({"role": "user", "content": "a",
                    "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}),
                "messages[1].tool_calls stands in a message of role \"user\"",
            ),
            (
                json!({"role": "assistant", "function_call": {"name": "f"}}),
                "messages[1].function_call",
            ),
        ] {
            let text = refusal(&message);
            assert!(text.starts_with(&format!("Line 7: {path}")), "{text}");
        }
    }

    #[test]
    fn text_parts_are_joined_and_their_common_weight_counts() {
        let (message, _) = read(&json!({"role": "assistant", "weight": 0.5, "content": [
            {"type": "text", "text": "a", "weight": 0.5},
            {"type": "text", "text": "b", "weight": 0.5},
        ]}));
        let message = message.expect("message");
        assert_eq!((message.content.as_deref(), message.weight), (Some("ab"), 0.25));
    }

    #[test]
    fn tool_call_arguments_become_an_object_whichever_way_they_are_written() {
        for (arguments, repaired) in
            [(json!("{\"b\": 1, \"a\": 2}"), false), (json!({"b": 1, "a": 2}), true)]
        {
            let (message, repairs) = read(&json!({"role": "assistant", "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}},
            ]}));
            let message = message.expect("message");
            assert_eq!(message.content, None);
            let function = &message.rest["tool_calls"][0]["function"];
            assert_eq!(function["arguments"].to_string(), "{\"b\":1,\"a\":2}");
            assert_eq!(repairs.contains(&Repair::ArgumentsObject), repaired);
        }
    }

    #[test]
    fn a_weight_on_a_users_message_is_ignored_and_reported() {
        let (message, repairs) = read(&json!({"role": "user", "content": "a", "weight": 1}));
        assert!(message.is_ok());
        assert!(repairs.contains(&Repair::WeightIgnored));
    }

    #[test]
    fn a_conversation_needs_an_assistant_message_that_counts() {
        let user = Message::new(Role::User, "a");
        let silent = Message { weight: 0.0, ..Message::new(Role::Assistant, "b") };
        for (messages, rule) in [
            (vec![], "messages is empty"),
            (vec![user.clone()], "messages must have at least one assistant message"),
            (vec![user.clone(), silent.clone()], "messages has weight 0 on every assistant"),
        ] {
            let fault = check_conversation(&messages, "messages").expect_err(rule);
            let text = fault.into_api_error(1, "training_file").message;
            assert!(text.contains(rule), "{text}");
        }
        let heard = Message::new(Role::Assistant, "c");
        assert_eq!(check_conversation(&[user, silent, heard], "messages"), Ok(()));
    }
}
