//! One line of a batch's file.

use serde_json::{Map, Value};
use tunesmith_store::batches::BatchError;

const MAX_CUSTOM_ID: usize = 512;

/// A request in order.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// The client's name for it.
    pub(super) custom_id: String,
    /// The model that it asks.
    pub(super) model: String,
    /// What it asks.
    pub(super) body: Map<String, Value>,
}

impl Request {
    /// Reads a line; none if it is blank. The error's line is not yet set.
    pub(super) fn parse(line: &[u8], endpoint: &str) -> Result<Option<Self>, BatchError> {
        if line.iter().all(u8::is_ascii_whitespace) {
            return Ok(None);
        }
        let wrong = |code: &str, param: Option<&str>, message: String| {
            Err(BatchError {
                code: code.to_owned(),
                message,
                param: param.map(str::to_owned),
                line: None,
            })
        };
        let mut value: Value = match serde_json::from_slice(line) {
            Ok(value @ Value::Object(_)) => value,
            Ok(_) => {
                let message = "The line is JSON, but not an object.".to_owned();
                return wrong("invalid_json_line", None, message);
            }
            Err(error) => {
                let message = format!("The line is not JSON in UTF-8: {error}.");
                return wrong("invalid_json_line", None, message);
            }
        };
        let custom_id = match value["custom_id"].as_str() {
            Some(id) if (1..=MAX_CUSTOM_ID).contains(&id.chars().count()) => id.to_owned(),
            _ => {
                let message = format!(
                    "Each line needs a custom_id, a string of 1 to {MAX_CUSTOM_ID} characters."
                );
                return wrong("invalid_custom_id", Some("custom_id"), message);
            }
        };
        if value["method"] != "POST" {
            let message = format!("The method is {}; it must be \"POST\".", value["method"]);
            return wrong("invalid_method", Some("method"), message);
        }
        if value["url"] != endpoint {
            let message = format!(
                "The url is {}; it must be the batch's endpoint, {endpoint}.",
                value["url"]
            );
            return wrong("invalid_url", Some("url"), message);
        }
        let body = match value["body"].take() {
            Value::Object(body) => body,
            _ => Map::new(),
        };
        match body.get("model").and_then(Value::as_str) {
            Some(model) => Ok(Some(Self { custom_id, model: model.to_owned(), body })),
            None => {
                let message = "The body needs a model.".to_owned();
                wrong("missing_required_parameter", Some("body.model"), message)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const ENDPOINT: &str = "/v1/chat/completions";

    #[test]
    fn a_line_in_order_is_read_and_a_blank_one_skipped() {
        let line = json!({"custom_id": "a", "method": "POST", "url": ENDPOINT,
                          "body": {"model": "m", "messages": []}});
        let request = Request::parse(line.to_string().as_bytes(), ENDPOINT).expect("in order");
        let request = request.expect("a request");
        assert_eq!((request.custom_id.as_str(), request.model.as_str()), ("a", "m"));
        assert_eq!(Value::from(request.body), line["body"]);
        assert_eq!(Request::parse(b" \r", ENDPOINT), Ok(None));
    }

    #[test]
    fn a_mistake_is_named_by_its_field() {
        for (change, code) in [
            (json!({"custom_id": ""}), "invalid_custom_id"),
            (json!({"custom_id": 1}), "invalid_custom_id"),
            (json!({"method": "GET"}), "invalid_method"),
            (json!({"url": "/v1/embeddings"}), "invalid_url"),
            (json!({"body": {}}), "missing_required_parameter"),
        ] {
            let mut line = json!({"custom_id": "a", "method": "POST", "url": ENDPOINT,
                                  "body": {"model": "m"}});
            for (name, value) in change.as_object().expect("object") {
                line[name] = value.clone();
            }
            let error = Request::parse(line.to_string().as_bytes(), ENDPOINT).expect_err(code);
            assert_eq!(error.code, code);
        }
        for line in ["{", "[]", "\"x\""] {
            let error = Request::parse(line.as_bytes(), ENDPOINT).expect_err(line);
            assert_eq!(error.code, "invalid_json_line");
        }
        assert!(Request::parse(b"{\"custom_id\": \"\xff\"}", ENDPOINT).is_err());
    }
}
