//! A request's JSON body, read with a cap and hashed on the way.

use crate::failure::{Failure, broken_body};
use actix_web::web::Payload;
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

/// Reads the body to its end.
///
/// # Errors
/// `payload_too_large`, or `invalid_body` for one that breaks off or is not a JSON object.
pub(crate) async fn read_json(mut payload: Payload) -> Result<JsonBody, Failure> {
    let mut body = BytesMut::new();
    while let Some(piece) = payload.next().await {
        let piece = piece.map_err(broken_body)?;
        if body.len() + piece.len() > MAX_JSON_BYTES {
            return Err(ApiError::new(
                ErrorCode::PayloadTooLarge,
                format!("The request's body is over the {MAX_JSON_BYTES} bytes that are accepted."),
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
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(_) => Err(not_json(&"it is JSON, but not an object")),
        Err(error) => Err(not_json(&error)),
    }
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
    fn json_nested_too_deep_is_refused_and_not_a_crash() {
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(parse(deep.as_bytes()).is_err());
    }
}
