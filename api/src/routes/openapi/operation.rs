//! One operation of the API as the document describes it.

use crate::idempotency::{IDEMPOTENCY_KEY, MAX_IDEMPOTENCY_KEY};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use tunesmith_core::errors::ErrorCode;

const JSON: &str = "application/json";

/// Whose key opens it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// It asks for none.
    Anybody,
    /// A project's.
    Project,
    /// An organisation's admin key.
    Admin,
    /// Either.
    ProjectOrAdmin,
}

/// A method of a path.
#[derive(Debug)]
pub(super) struct Operation {
    pub(super) method: &'static str,
    pub(super) path: &'static str,
    id: &'static str,
    tag: &'static str,
    summary: &'static str,
    text: Option<&'static str>,
    access: Access,
    parameters: Vec<Value>,
    body: Option<Value>,
    /// Content by its type, by status.
    replies: BTreeMap<u16, Map<String, Value>>,
    errors: Vec<ErrorCode>,
}

impl Operation {
    fn new(
        method: &'static str,
        path: &'static str,
        (tag, id): (&'static str, &'static str),
        summary: &'static str,
    ) -> Self {
        Self {
            method,
            path,
            id,
            tag,
            summary,
            text: None,
            access: Access::Project,
            parameters: Vec::new(),
            body: None,
            replies: BTreeMap::new(),
            errors: Vec::new(),
        }
    }

    pub(super) fn get(
        path: &'static str,
        tag_and_id: (&'static str, &'static str),
        summary: &'static str,
    ) -> Self {
        Self::new("get", path, tag_and_id, summary)
    }

    pub(super) fn post(
        path: &'static str,
        tag_and_id: (&'static str, &'static str),
        summary: &'static str,
    ) -> Self {
        Self::new("post", path, tag_and_id, summary)
    }

    pub(super) fn delete(
        path: &'static str,
        tag_and_id: (&'static str, &'static str),
        summary: &'static str,
    ) -> Self {
        Self::new("delete", path, tag_and_id, summary)
    }

    /// What the summary leaves out.
    pub(super) fn text(mut self, text: &'static str) -> Self {
        self.text = Some(text);
        self
    }

    pub(super) fn access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }

    /// A part of the path.
    pub(super) fn at(mut self, name: &str, example: &str, description: &str) -> Self {
        self.parameters.push(json!({
            "name": name,
            "in": "path",
            "required": true,
            "description": description,
            "schema": { "type": "string", "minLength": 1 },
            "example": example,
        }));
        self
    }

    /// A parameter of the query string; a value outside its schema is refused.
    pub(super) fn query(mut self, name: &str, schema: Value, description: &str) -> Self {
        self.parameters.push(json!({
            "name": name, "in": "query", "description": description, "schema": schema,
        }));
        self.errors([ErrorCode::InvalidValue])
    }

    pub(super) fn header(mut self, name: &str, schema: Value, description: &str) -> Self {
        self.parameters.push(json!({
            "name": name, "in": "header", "description": description, "schema": schema,
        }));
        self
    }

    /// An operation that makes something once, however often the client asks.
    pub(super) fn once(self, repeated: &str) -> Self {
        let key = json!({ "type": "string", "minLength": 1, "maxLength": MAX_IDEMPOTENCY_KEY });
        let description = format!("For a day, the same key with the same body {repeated}.");
        self.header(IDEMPOTENCY_KEY, key, &description).errors([ErrorCode::IdempotencyConflict])
    }

    /// `limit` and `after`.
    pub(super) fn page(self, default: u64, max: u64) -> Self {
        self.query(
            "limit",
            json!({ "type": "integer", "minimum": 0, "maximum": max, "default": default }),
            "How many entries a page has at most; with 0, `has_more` tells whether there are any.",
        )
        .query(
            "after",
            json!({ "type": "string" }),
            "The id of the entry that the page follows.",
        )
    }

    /// A parameter whose values are objects in brackets, as `metadata[key]=value`.
    pub(super) fn deep(mut self, name: &str, schema: Value, description: &str) -> Self {
        self.parameters.push(json!({
            "name": name,
            "in": "query",
            "style": "deepObject",
            "explode": true,
            "description": description,
            "schema": schema,
        }));
        self.errors([ErrorCode::InvalidValue])
    }

    /// A JSON body, with an example that the server takes.
    pub(super) fn body(mut self, schema: Value, example: Value) -> Self {
        self.body = Some(json!({
            "required": true, "content": { JSON: { "schema": schema, "example": example } },
        }));
        self.errors([
            ErrorCode::InvalidBody,
            ErrorCode::InvalidValue,
            ErrorCode::MissingRequiredParameter,
            ErrorCode::PayloadTooLarge,
        ])
    }

    /// A form, `multipart/form-data`.
    pub(super) fn form(mut self, schema: Value) -> Self {
        self.body = Some(json!({
            "required": true, "content": { "multipart/form-data": { "schema": schema } },
        }));
        self.errors([
            ErrorCode::InvalidBody,
            ErrorCode::InvalidValue,
            ErrorCode::MissingRequiredParameter,
            ErrorCode::PayloadTooLarge,
        ])
    }

    /// A reply of status 200 in JSON.
    pub(super) fn reply(self, schema: Value) -> Self {
        self.content(200, JSON, schema)
    }

    /// A reply of status 200 as server-sent events, each with one of `schema` in JSON, and the last
    /// with `[DONE]`. OpenAPI 3.1 has one schema for a stream, that of each event.
    pub(super) fn events(self, schema: &Value) -> Self {
        let kind = "text/event-stream";
        let event = json!({
            "type": "object",
            "required": ["data"],
            "properties": {
                "id": { "type": "string" },
                "data": {
                    "anyOf": [
                        { "const": "[DONE]" },
                        { "type": "string", "contentMediaType": JSON, "contentSchema": schema },
                    ],
                },
            },
        });
        self.content(200, kind, event)
    }

    pub(super) fn content(mut self, status: u16, kind: &str, schema: Value) -> Self {
        self.replies
            .entry(status)
            .or_default()
            .insert(kind.to_owned(), json!({ "schema": schema }));
        self
    }

    /// Content of this kind, whole or one range of it.
    pub(super) fn parts(self, kind: &str) -> Self {
        let text = || json!({ "type": "string" });
        self.header("Range", text(), "One range of bytes, as `bytes=0-99`.")
            .header("If-Range", text(), "The `ETag` of what there is a part of already.")
            .content(200, kind, json!({}))
            .content(206, kind, json!({}))
            .errors([ErrorCode::RangeNotSatisfiable])
    }

    pub(super) fn errors(mut self, codes: impl IntoIterator<Item = ErrorCode>) -> Self {
        for code in codes {
            if !self.errors.contains(&code) {
                self.errors.push(code);
            }
        }
        self
    }

    /// The operation object of OpenAPI.
    pub(super) fn to_openapi(&self) -> Value {
        let mut operation = json!({
            "operationId": self.id, "tags": [self.tag], "summary": self.summary,
        });
        let key = match self.access {
            Access::Admin => Some("Asks for an admin key."),
            Access::ProjectOrAdmin => Some("Takes an admin key too."),
            Access::Anybody | Access::Project => None,
        };
        let text: Vec<&str> = self.text.into_iter().chain(key).collect();
        if !text.is_empty() {
            operation["description"] = json!(text.join(" "));
        }
        if self.access == Access::Anybody {
            operation["security"] = json!([]);
        }
        if !self.parameters.is_empty() {
            operation["parameters"] = json!(self.parameters);
        }
        if let Some(body) = &self.body {
            operation["requestBody"] = body.clone();
        }
        let mut responses = Map::new();
        for (status, content) in &self.replies {
            let mut reply = json!({ "description": meaning_of(*status) });
            if !content.is_empty() {
                reply["content"] = json!(content);
            }
            responses.insert(status.to_string(), reply);
        }
        let mut refusals: BTreeMap<u16, Vec<ErrorCode>> = BTreeMap::new();
        let common: &[ErrorCode] = match self.access {
            Access::Anybody => &[ErrorCode::InvalidValue],
            Access::Project => &[
                ErrorCode::InvalidValue,
                ErrorCode::InvalidApiKey,
                ErrorCode::InsufficientPermissions,
                ErrorCode::RateLimitExceeded,
            ],
            Access::Admin => &[
                ErrorCode::InvalidValue,
                ErrorCode::InvalidApiKey,
                ErrorCode::InsufficientPermissions,
            ],
            Access::ProjectOrAdmin => {
                &[ErrorCode::InvalidValue, ErrorCode::InvalidApiKey, ErrorCode::RateLimitExceeded]
            }
        };
        let ours: &[ErrorCode] = match self.access {
            Access::Anybody => &[],
            _ => &[ErrorCode::Internal, ErrorCode::Unavailable],
        };
        for &code in self.errors.iter().chain(common).chain(ours) {
            let codes = refusals.entry(code.http_status()).or_default();
            if !codes.contains(&code) {
                codes.push(code);
            }
        }
        for (status, codes) in refusals {
            let meanings: Vec<String> = codes
                .iter()
                .map(|code| format!("`{}`: {}", code.as_str(), code.meaning()))
                .collect();
            let description = meanings.join(" ");
            responses.insert(
                status.to_string(),
                json!({
                    "description": description,
                    "content": { JSON: { "schema": { "$ref": "#/components/schemas/Error" } } },
                }),
            );
        }
        operation["responses"] = Value::Object(responses);
        operation
    }
}

fn meaning_of(status: u16) -> &'static str {
    match status {
        202 => "Not yet; ask again after the seconds of `Retry-After`.",
        206 => "A part of it.",
        _ => "Done.",
    }
}
