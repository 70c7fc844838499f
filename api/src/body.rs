//! A request's JSON body, read with a cap and hashed on the way.

use crate::failure::{Failure, broken_body, invalid_value};
use crate::{fields, warnings};
use actix_web::web::Payload;
use actix_web::{HttpResponse, HttpResponseBuilder};
use bytes::BytesMut;
use futures::StreamExt as _;
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};
use tunesmith_core::errors::{ApiError, ErrorCode};

/// The largest JSON body: far over any job, far under what would hurt.
const MAX_JSON_BYTES: usize = 1 << 20;

/// A JSON object as it came.
#[derive(Debug)]
pub(crate) struct JsonBody {
    /// Its fields.
    pub(crate) fields: Map<String, Value>,
    /// The SHA-256 of the body's bytes: two requests with the same one ask for the same.
    pub(crate) sha256: [u8; 32],
}

impl JsonBody {
    /// A reply of success that names the fields which are not among `known`: nothing reads them.
    pub(crate) fn reply(&self, known: &[&str]) -> HttpResponseBuilder {
        let mut reply = HttpResponse::Ok();
        let unknown = warnings::unknown_fields(&fields::unknown(&self.fields, known));
        warnings::add(&mut reply, unknown.as_slice());
        reply
    }
}

/// The largest body that holds a conversation or a prompt: some millions of tokens.
const MAX_LONG_JSON_BYTES: usize = 16 << 20;

/// Reads the body to its end.
///
/// # Errors
/// `payload_too_large`, `invalid_body` for one that breaks off or is not a JSON object, or
/// `invalid_value` for text that holds U+0000.
pub(crate) async fn read_json(payload: Payload) -> Result<JsonBody, Failure> {
    read(payload, MAX_JSON_BYTES).await
}

/// The same for a body that may hold much text.
///
/// # Errors
/// Those of [`read_json`].
pub(crate) async fn read_long_json(payload: Payload) -> Result<JsonBody, Failure> {
    read(payload, MAX_LONG_JSON_BYTES).await
}

async fn read(mut payload: Payload, most: usize) -> Result<JsonBody, Failure> {
    let mut body = BytesMut::new();
    while let Some(piece) = payload.next().await {
        let piece = piece.map_err(broken_body)?;
        if body.len() + piece.len() > most {
            return Err(ApiError::new(
                ErrorCode::PayloadTooLarge,
                format!("The request's body is over the {most} bytes that are accepted."),
            )
            .into());
        }
        body.extend_from_slice(&piece);
    }
    Ok(JsonBody { fields: parse(&body)?, sha256: Sha256::digest(&body).into() })
}

fn parse(body: &[u8]) -> Result<Map<String, Value>, ApiError> {
    let not_json = |what: &dyn std::fmt::Display| {
        ApiError::new(
            ErrorCode::InvalidBody,
            format!(
                "We could not parse the JSON body of your request: {what}. A JSON object is expected."
            ),
        )
    };
    match serde_json::from_slice(body) {
        Ok(Value::Object(fields)) => match nul_in_fields(&fields, "") {
            None => Ok(fields),
            Some(path) => {
                Err(invalid_value(&path, "text with U+0000", "text without that character"))
            }
        },
        Ok(_) => Err(not_json(&"it is JSON, but not an object")),
        Err(error) => Err(not_json(&error)),
    }
}

/// Where the text holds U+0000, which JSON can write and PostgreSQL cannot store.
fn nul_in(value: &Value, path: &str) -> Option<String> {
    match value {
        Value::String(text) => text.contains('\0').then(|| path.to_owned()),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .find_map(|(index, item)| nul_in(item, &format!("{path}[{index}]"))),
        Value::Object(fields) => nul_in_fields(fields, path),
        Value::Null | Value::Bool(_) | Value::Number(_) => None,
    }
}

fn nul_in_fields(fields: &Map<String, Value>, path: &str) -> Option<String> {
    fields.iter().find_map(|(key, value)| {
        let is_in_key = key.contains('\0');
        let key = key.replace('\0', "\\u0000");
        let path = if path.is_empty() { key } else { format!("{path}.{key}") };
        if is_in_key { Some(path) } else { nul_in(value, &path) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_json_is_refused_with_its_place() {
        let error = parse(b"{\"model\": }").expect_err("malformed");
        assert_eq!(error.code, ErrorCode::InvalidBody);
        assert!(error.message.contains("line 1 column 11"), "{error}");
        assert!(parse(b"[]").is_err());
        assert!(parse(b"").is_err());
    }

    #[test]
    fn text_that_cannot_be_stored_is_refused_with_its_path() {
        for (body, path) in [
            (r#"{"model": "a\u0000"}"#, "model"),
            (r#"{"metadata": {"a": "b", "c": "\u0000"}}"#, "metadata.c"),
            (r#"{"part_ids": ["a", "\u0000"]}"#, "part_ids[1]"),
            (r#"{"metadata": {"a\u0000b": ""}}"#, "metadata.a\\u0000b"),
        ] {
            let error = parse(body.as_bytes()).expect_err(body);
            assert_eq!(error.code, ErrorCode::InvalidValue);
            assert_eq!(error.param.as_deref(), Some(path));
        }
        // A backslash and a u are not that character.
        assert!(parse(br#"{"model": "\\u0000"}"#).is_ok());
    }

    #[test]
    fn json_nested_too_deep_is_refused_and_not_a_crash() {
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(parse(deep.as_bytes()).is_err());
    }
}
