//! Schemas of requests that models answer, made of the constants that they are checked against.

use super::requests::reference;
use crate::serving::{MAX_LOGPROBS, MAX_N, MAX_STOPS};
use serde_json::{Value, json};
use tunesmith_core::dataset::Role;
use tunesmith_core::sampling::MAX_TOP_LOGPROBS;

/// The fields of both kinds.
fn sampling() -> Value {
    let number = |low: f64, high: f64| json!({ "type": ["number", "null"], "minimum": low, "maximum": high });
    json!({
        "model": {
            "type": "string",
            "minLength": 1,
            "description": "A base model, a tuned model or a checkpoint, by its name.",
        },
        "max_tokens": { "type": ["integer", "null"], "minimum": 1 },
        "temperature": number(0.0, 2.0),
        "top_p": number(0.0, 1.0),
        "seed": {
            "type": ["integer", "null"],
            "description": "The same seed, request and model give the same answer.",
        },
        "n": { "type": ["integer", "null"], "minimum": 1, "maximum": MAX_N },
        "stop": {
            "description": "Strings that end an answer and are no part of it.",
            "anyOf": [
                { "type": ["string", "null"], "minLength": 1 },
                { "type": "array", "maxItems": MAX_STOPS, "items": { "type": "string", "minLength": 1 } },
            ],
        },
        "frequency_penalty": number(-2.0, 2.0),
        "presence_penalty": number(-2.0, 2.0),
        "logit_bias": {
            "type": ["object", "null"],
            "propertyNames": { "pattern": "^[0-9]+$" },
            "additionalProperties": { "type": "number", "minimum": -100, "maximum": 100 },
        },
        "stream": {
            "type": ["boolean", "null"],
            "description": "Whether the answer comes as server-sent events, each a chunk.",
        },
        "stream_options": {
            "type": ["object", "null"],
            "properties": { "include_usage": { "type": ["boolean", "null"] } },
        },
    })
}

fn with(mut properties: Value, more: Value, required: &[&str]) -> Value {
    if let (Some(properties), Value::Object(more)) = (properties.as_object_mut(), more) {
        properties.extend(more);
    }
    json!({ "type": "object", "required": required, "properties": properties })
}

/// `POST /v1/chat/completions`.
pub(super) fn chat() -> Value {
    let message = json!({
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": { "type": "string", "enum": Role::ALL.map(Role::as_str) },
            "content": {
                "description": "Text, or a list of text parts.",
                "anyOf": [{ "type": ["string", "null"] }, { "type": "array" }],
            },
        },
    });
    let tool = json!({
        "type": "object",
        "required": ["function"],
        "properties": {
            "type": { "const": "function" },
            "function": {
                "type": "object",
                "required": ["name"],
                "properties": { "name": { "type": "string", "minLength": 1 } },
            },
        },
    });
    let more = json!({
        "messages": { "type": "array", "minItems": 1, "items": message },
        "max_completion_tokens": { "type": ["integer", "null"], "minimum": 1 },
        "logprobs": { "type": ["boolean", "null"] },
        "top_logprobs": {
            "type": ["integer", "null"], "minimum": 0, "maximum": MAX_TOP_LOGPROBS,
        },
        "tools": { "type": ["array", "null"], "items": tool },
        "tool_choice": {
            "anyOf": [
                { "enum": ["auto", "none", "required", null] },
                {
                    "type": "object",
                    "required": ["type", "function"],
                    "properties": {
                        "type": { "const": "function" },
                        "function": {
                            "type": "object",
                            "required": ["name"],
                            "properties": { "name": { "type": "string" } },
                        },
                    },
                },
            ],
        },
        "parallel_tool_calls": { "type": ["boolean", "null"] },
        "response_format": {
            "anyOf": [
                { "type": "null" },
                {
                    "type": "object",
                    "required": ["type"],
                    "properties": { "type": { "enum": ["text", "json_object"] } },
                },
                {
                    "type": "object",
                    "required": ["type", "json_schema"],
                    "properties": {
                        "type": { "const": "json_schema" },
                        "json_schema": {
                            "type": "object",
                            "required": ["schema"],
                            "properties": {
                                "name": { "type": "string" },
                                "schema": {
                                    "type": "object", "description": "What an answer must be.",
                                },
                            },
                        },
                    },
                },
            ],
        },
        "metadata": reference("Metadata"),
    });
    with(sampling(), more, &["model", "messages"])
}

/// `POST /v1/completions`.
pub(super) fn completion() -> Value {
    let ids = json!({
        "type": "array", "minItems": 1, "items": { "type": "integer", "minimum": 0 },
    });
    let more = json!({
        "prompt": {
            "description": "Text, in which special tokens may be spelled, or token ids; one or \
                            many.",
            "anyOf": [
                { "type": "string" },
                { "type": "array", "minItems": 1, "items": { "type": "string" } },
                ids.clone(),
                { "type": "array", "minItems": 1, "items": ids },
            ],
        },
        "echo": {
            "type": ["boolean", "null"], "description": "Whether an answer begins with its prompt.",
        },
        "logprobs": { "type": ["integer", "null"], "minimum": 0, "maximum": MAX_LOGPROBS },
    });
    with(sampling(), more, &["model", "prompt"])
}
