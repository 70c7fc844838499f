//! A request for a chat completion, checked.

use super::chat::ChatAnswer;
use super::format::{ToolChoice, response_schema};
use super::reply::AnswerRequest;
use super::sampling_request::{Asked, FIELDS, TAKEN_WITHOUT_EFFECT, flag};
use super::{Serving, unsupported};
use crate::failure::{Failure, invalid_value, missing};
use crate::fields::{self, given, integer, metadata, required};
use crate::warnings::unknown_fields;
use serde_json::{Map, Value, json};
use std::future::Future;
use tunesmith_core::dataset::{Message, parse_conversation, parse_tools};
use tunesmith_core::errors::ApiError;
use tunesmith_core::ids::ProjectId;
use tunesmith_core::sampling::MAX_TOP_LOGPROBS;

/// The fields that are read beside those of sampling.
const OF_CHAT: [&str; 13] = [
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "modalities",
    "store",
    "functions",
    "function_call",
];

/// A request in order.
#[derive(Debug, Clone)]
pub(crate) struct ChatRequest {
    pub(super) model: String,
    pub(super) asked: Asked,
    pub(super) messages: Vec<Message>,
    /// As the chat template takes them; none where no call is wanted.
    pub(super) tools: Option<Value>,
    /// What an answer must be, where it is not free.
    pub(super) json_schema: Option<Value>,
    /// Whether an answer may call more than one.
    pub(super) parallel_calls: bool,
    /// Alternatives to show with each token; none to show no probabilities.
    pub(super) top_logprobs: Option<u8>,
    warnings: Vec<String>,
}

impl AnswerRequest for ChatRequest {
    type Reply = ChatAnswer;

    fn parse(body: &Map<String, Value>) -> Result<Self, ApiError> {
        let model = required(body, "model")?;
        let messages = given(body, "messages").ok_or_else(|| missing("messages"))?;
        let messages = parse_conversation(messages)?;
        refuse_what_is_not_done(body)?;
        metadata(body)?;
        let response = response_schema(body)?;
        let choice = ToolChoice::parse(body)?;
        let tools = match choice {
            ToolChoice::None => None,
            _ => parse_tools(body)?,
        };
        let call = choice.schema(tools.as_ref())?;
        let known = [&FIELDS[..], &OF_CHAT[..], &TAKEN_WITHOUT_EFFECT[..]].concat();
        Ok(Self {
            model,
            asked: Asked::parse(body, &["max_completion_tokens", "max_tokens"])?,
            messages,
            tools,
            // The format is that of an answer in words; one that must be a call is none.
            json_schema: call.or(response),
            parallel_calls: given(body, "parallel_tool_calls").is_none()
                || flag(body, "parallel_tool_calls")?,
            top_logprobs: top_logprobs(body)?,
            warnings: unknown_fields(&fields::unknown(body, &known)).into_iter().collect(),
        })
    }

    fn streams(&self) -> bool {
        self.asked.stream
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn begin(
        &self,
        serving: &Serving,
        project: &ProjectId,
        low_priority: bool,
    ) -> impl Future<Output = Result<Self::Reply, Failure>> + Send {
        ChatAnswer::begin(serving, project, self, low_priority)
    }
}

impl ChatRequest {
    /// The names of the tools that an answer may call.
    pub(super) fn tool_names(&self) -> Vec<String> {
        let tools = self.tools.as_ref().and_then(Value::as_array).into_iter().flatten();
        let names = tools.filter_map(|tool| tool["function"]["name"].as_str());
        names.map(str::to_owned).collect()
    }
}

fn refuse_what_is_not_done(body: &Map<String, Value>) -> Result<(), ApiError> {
    for name in ["functions", "function_call"] {
        if given(body, name).is_some() {
            let why = "It is the old form of 'tools' and 'tool_choice': write those.";
            return Err(unsupported(name, why));
        }
    }
    if let Some(modalities) = given(body, "modalities")
        && *modalities != json!(["text"])
    {
        return Err(unsupported("modalities", "Models answer in text here: write [\"text\"]."));
    }
    if flag(body, "store")? {
        return Err(unsupported("store", "Answers are not kept here: leave it out."));
    }
    Ok(())
}

fn top_logprobs(body: &Map<String, Value>) -> Result<Option<u8>, ApiError> {
    let top = integer(body, "top_logprobs", 0..=u64::from(MAX_TOP_LOGPROBS))?;
    match (flag(body, "logprobs")?, top) {
        (true, top) => Ok(Some(top.unwrap_or(0) as u8)),
        (false, None) => Ok(None),
        (false, Some(top)) => {
            Err(invalid_value("top_logprobs", top, "left out unless 'logprobs' is true"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(change: &Value) -> Result<ChatRequest, ApiError> {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
        for (name, value) in change.as_object().expect("object") {
            body[name] = value.clone();
        }
        ChatRequest::parse(body.as_object().expect("object"))
    }

    #[test]
    fn what_is_not_done_here_is_refused_by_name_and_reason() {
        for (field, value) in [
            ("functions", json!([])),
            ("function_call", json!("auto")),
            ("modalities", json!(["text", "audio"])),
            ("store", json!(true)),
            ("tool_choice", json!({"type": "allowed_tools", "allowed_tools": {}})),
        ] {
            let error = parse(&json!({ field: value })).expect_err(field);
            assert_eq!(error.code.as_str(), "unsupported_parameter", "{value}");
            assert_eq!(error.param.as_deref(), Some(field));
        }
        let taken = json!({"modalities": ["text"], "store": false, "user": "u", "metadata": {},
                           "response_format": {"type": "text"}, "tool_choice": "auto"});
        assert!(parse(&taken).expect("in order").warnings().is_empty());
    }

    #[test]
    fn a_mistake_is_refused_by_its_path() {
        for (change, param) in [
            (json!({"model": null}), "model"),
            (json!({"messages": null}), "messages"),
            (json!({"messages": []}), "messages"),
            (json!({"messages": [{"role": "robot", "content": "a"}]}), "messages[0].role"),
            (json!({"top_logprobs": 2}), "top_logprobs"),
            (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
            (json!({"tools": [1]}), "tools[0]"),
            (json!({"tool_choice": "any"}), "tool_choice"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"response_format": "json"}), "response_format"),
            (json!({"response_format": {"type": "xml"}}), "response_format.type"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": 1}}}),
                "response_format.json_schema.name",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}),
                "response_format.json_schema.schema",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"schema": []}}}),
                "response_format.json_schema.schema",
            ),
            (json!({"metadata": {"a": 1}}), "metadata"),
        ] {
            assert_eq!(parse(&change).expect_err(param).param.as_deref(), Some(param));
        }
        let warned = parse(&json!({"top_k": 5})).expect("in order");
        assert_eq!(warned.warnings(), ["Unknown fields were ignored: top_k."]);
    }

    #[test]
    fn an_answer_must_be_json_where_that_is_asked_and_a_call_where_one_is_forced() {
        let schema = |change: Value| parse(&change).expect("in order").json_schema;
        assert_eq!(schema(json!({"response_format": {"type": "text"}})), None);
        let object = json!({"type": "object"});
        let format = json!({"type": "json_object"});
        assert_eq!(schema(json!({"response_format": format})), Some(object.clone()));
        let by_schema =
            json!({"type": "json_schema", "json_schema": {"schema": {"type": "array"}}});
        assert_eq!(schema(json!({"response_format": by_schema})), Some(json!({"type": "array"})));
        let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {}}}]);
        let free = json!({"tools": tools, "response_format": format});
        assert_eq!(schema(free), Some(object));
        let forced = json!({"tools": tools, "tool_choice": "required", "response_format": format});
        let call = schema(forced).expect("a schema");
        assert_eq!(call["anyOf"][0]["properties"]["name"]["const"], "f");
    }

    #[test]
    fn no_tool_is_shown_to_a_model_that_must_not_call_any() {
        let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {}}}]);
        let request = parse(&json!({"tools": tools})).expect("in order");
        assert_eq!((request.tool_names(), request.parallel_calls), (vec!["f".to_owned()], true));
        let none = json!({"tools": tools, "tool_choice": "none", "parallel_tool_calls": false});
        let request = parse(&none).expect("in order");
        assert_eq!((request.tools, request.parallel_calls), (None, false));
    }
}
