//! The messages and tools of a request, which are answered and not learned from.

use super::fault::Fault;
use super::message::{Message, parse_message};
use super::row;
use crate::errors::{ApiError, ErrorCode};
use serde_json::{Map, Value};
use std::collections::BTreeSet;

/// Reads and checks the `messages` of a request.
///
/// # Errors
/// `invalid_value` with the key path of what is wrong.
pub fn parse_conversation(messages: &Value) -> Result<Vec<Message>, ApiError> {
    let list = messages.as_array().filter(|list| !list.is_empty()).ok_or_else(|| {
        Fault::at_key(
            "messages",
            "must be a list of messages that is not empty.",
            "Write [{\"role\": \"user\", \"content\": …}].",
        )
        .into_request_error()
    })?;
    let mut repairs = BTreeSet::new();
    let message = |(index, value)| {
        parse_message(value, &format!("messages[{index}]"), &mut repairs)
            .map_err(Fault::into_request_error)
    };
    list.iter().enumerate().map(message).collect()
}

/// Reads and checks the `tools` of a request; none where there are none.
///
/// # Errors
/// `invalid_value` with the key path of what is wrong.
pub fn parse_tools(fields: &Map<String, Value>) -> Result<Option<Value>, ApiError> {
    let tools = row::tools(fields).map_err(Fault::into_request_error)?;
    for (index, tool) in
        tools.iter().flat_map(|tools| tools.as_array().into_iter().flatten()).enumerate()
    {
        check_tool(tool, index).map_err(Fault::into_request_error)?;
    }
    Ok(tools)
}

/// A call is told from text by the name of its tool.
fn check_tool(tool: &Value, index: usize) -> Result<(), Fault> {
    if tool.get("type").is_some_and(|kind| kind != "function") {
        let place = format_args!("tools[{index}].type");
        return Err(Fault::at_key(place, "must be \"function\".", row::TOOL_HINT));
    }
    if tool["function"]["name"].as_str().is_none_or(str::is_empty) {
        let place = format_args!("tools[{index}].function.name");
        return Err(Fault::at_key(place, "must be a string that is not empty.", row::TOOL_HINT));
    }
    Ok(())
}

impl Fault {
    /// The error that a client reads, about its own request.
    fn into_request_error(self) -> ApiError {
        let place = self.place.unwrap_or_default();
        let message = format!("Invalid value: {} {}", self.rule, self.hint);
        ApiError::new(ErrorCode::InvalidValue, message).with_param(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::Role;
    use serde_json::json;

    #[test]
    fn a_conversation_needs_no_answer_and_names_what_is_wrong_by_its_path() {
        let asked = json!([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]);
        let messages = parse_conversation(&asked).expect("in order");
        assert_eq!(messages[1], Message::new(Role::User, "u"));
        for (wrong, param) in [
            (json!([]), "messages"),
            (json!("hello"), "messages"),
            (json!([{"role": "user", "content": "a"}, {"role": "robot"}]), "messages[1].role"),
            (json!([{"role": "user"}]), "messages[0].content"),
        ] {
            let error = parse_conversation(&wrong).expect_err("refused");
            assert_eq!(error.param.as_deref(), Some(param), "{error}");
            assert!(error.message.starts_with("Invalid value: messages"), "{error}");
        }
        for (wrong, param) in [
            (json!(7), "tools[1]"),
            (json!({"type": "code", "function": {"name": "f"}}), "tools[1].type"),
            (json!({"type": "function"}), "tools[1].function.name"),
            (json!({"name": "f", "parameters": {}}), "tools[1].function.name"),
        ] {
            let tools = json!({"tools": [{"function": {"name": "f"}}, wrong]});
            let error = parse_tools(tools.as_object().expect("object")).expect_err("refused");
            assert_eq!(error.param.as_deref(), Some(param), "{error}");
        }
    }
}
