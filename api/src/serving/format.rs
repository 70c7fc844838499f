//! What the text of an answer must be: JSON by a schema, or a call to a tool.

use super::unsupported;
use crate::failure::{invalid_value, missing};
use crate::fields::given;
use serde_json::{Map, Value, json};
use tunesmith_core::errors::ApiError;

/// Which tools an answer may call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ToolChoice {
    /// None of them.
    None,
    /// Any, or none.
    Auto,
    /// One of them.
    Required,
    /// This one.
    Named(String),
}

impl ToolChoice {
    /// Reads `tool_choice`.
    ///
    /// # Errors
    /// `invalid_value` for what is none; `unsupported_parameter` for OpenAI's other ways.
    pub(super) fn parse(body: &Map<String, Value>) -> Result<Self, ApiError> {
        const RULE: &str = "one of auto, none, required, or {\"type\": \"function\", \"function\": \
                            {\"name\": …}}";
        match given(body, "tool_choice") {
            None => Ok(Self::Auto),
            Some(Value::String(word)) => match word.as_str() {
                "auto" => Ok(Self::Auto),
                "none" => Ok(Self::None),
                "required" => Ok(Self::Required),
                other => Err(invalid_value("tool_choice", json!(other), RULE)),
            },
            Some(Value::Object(choice)) if choice.get("type") == Some(&json!("function")) => {
                let function = choice.get("function").unwrap_or(&Value::Null);
                match function.get("name").and_then(Value::as_str) {
                    Some(name) => Ok(Self::Named(name.to_owned())),
                    None => Err(missing("tool_choice.function.name")),
                }
            }
            Some(Value::Object(choice)) if choice.get("type").is_some_and(Value::is_string) => {
                let why = format!("A choice of type {} is not offered.", choice["type"]);
                Err(unsupported("tool_choice", &why))
            }
            Some(other) => Err(invalid_value("tool_choice", other, RULE)),
        }
    }

    /// The schema of an answer that must be a call to one of `tools`; none where it need not be one.
    ///
    /// # Errors
    /// `invalid_value` for a tool that is not among them.
    pub(super) fn schema(&self, tools: Option<&Value>) -> Result<Option<Value>, ApiError> {
        let named = match self {
            Self::None | Self::Auto => return Ok(None),
            Self::Required => None,
            Self::Named(name) => Some(name.as_str()),
        };
        let tools = tools.and_then(Value::as_array).into_iter().flatten();
        let functions: Vec<&Value> = tools
            .map(|tool| &tool["function"])
            .filter(|function| named.is_none_or(|name| function["name"] == *name))
            .collect();
        if functions.is_empty() {
            return Err(match named {
                Some(name) => {
                    let rule = "the name of one of 'tools'";
                    invalid_value("tool_choice.function.name", json!(name), rule)
                }
                None => invalid_value(
                    "tool_choice",
                    "\"required\"",
                    "left out where there are no 'tools'",
                ),
            });
        }
        let calls = functions.iter().enumerate();
        let calls: Vec<Value> = calls.map(|(index, function)| call(index, function)).collect();
        Ok(Some(json!({ "anyOf": calls })))
    }
}

/// The schema of a call, as [`ToolReader`](super::tools::ToolReader) reads one.
fn call(index: usize, function: &Value) -> Value {
    let mut arguments = match function.get("parameters") {
        Some(Value::Object(schema)) if !schema.is_empty() => Value::Object(schema.clone()),
        _ => json!({ "type": "object" }),
    };
    // References count from the root of the whole.
    move_references(&mut arguments, &format!("#/anyOf/{index}/properties/arguments"));
    json!({
        "type": "object",
        "properties": { "name": { "const": function["name"] }, "arguments": arguments },
        "required": ["name", "arguments"],
        "additionalProperties": false,
    })
}

fn move_references(schema: &mut Value, root: &str) {
    match schema {
        Value::Object(fields) => {
            for (name, value) in fields {
                match value {
                    Value::String(target) if name == "$ref" => {
                        if let Some(path) = target.strip_prefix('#') {
                            *target = format!("{root}{path}");
                        }
                    }
                    value => move_references(value, root),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| move_references(item, root)),
        _ => {}
    }
}

/// The schema of `response_format`; none for text.
///
/// # Errors
/// `invalid_value` and `missing_required_parameter`, by path.
pub(super) fn response_schema(body: &Map<String, Value>) -> Result<Option<Value>, ApiError> {
    const FORMAT: &str = "response_format";
    let format = match given(body, FORMAT) {
        None => return Ok(None),
        Some(Value::Object(format)) => format,
        Some(other) => return Err(invalid_value(FORMAT, other, "an object with a type")),
    };
    match format.get("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(json!({ "type": "object" }))),
        Some("json_schema") => {
            let inner = match format.get("json_schema") {
                None | Some(Value::Null) => return Err(missing("response_format.json_schema")),
                Some(inner) => inner,
            };
            if let Some(name) = inner.get("name").filter(|name| !name.is_string()) {
                return Err(invalid_value("response_format.json_schema.name", name, "text"));
            }
            match inner.get("schema") {
                None | Some(Value::Null) => Err(missing("response_format.json_schema.schema")),
                Some(Value::Object(schema)) => Ok(Some(Value::Object(schema.clone()))),
                Some(other) => Err(invalid_value(
                    "response_format.json_schema.schema",
                    other,
                    "a JSON schema, an object",
                )),
            }
        }
        _ => {
            let rule = "one of text, json_object, json_schema";
            let kind = format.get("type").unwrap_or(&Value::Null);
            Err(invalid_value("response_format.type", kind, rule))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(value: &Value) -> Result<ToolChoice, ApiError> {
        let body = json!({ "tool_choice": value });
        ToolChoice::parse(body.as_object().expect("object"))
    }

    #[test]
    fn a_forced_call_is_one_of_the_tools_with_its_arguments() {
        let parameters = json!({"type": "object", "$defs": {"city": {"type": "string"}},
            "properties": {"where": {"$ref": "#/$defs/city"}}});
        let tools = json!([
            {"type": "function", "function": {"name": "f"}},
            {"type": "function", "function": {"name": "g", "parameters": parameters}},
        ]);
        let schema = |choice: ToolChoice| choice.schema(Some(&tools)).expect("there are tools");
        assert_eq!(schema(ToolChoice::Auto), None);
        assert_eq!(schema(ToolChoice::None), None);
        let any = schema(ToolChoice::Required).expect("a schema");
        assert_eq!(any["anyOf"][0]["properties"]["name"], json!({"const": "f"}));
        assert_eq!(any["anyOf"][0]["properties"]["arguments"], json!({"type": "object"}));
        let reference = "/anyOf/1/properties/arguments/properties/where/$ref";
        let target = any.pointer(reference).and_then(Value::as_str).expect("a reference");
        assert_eq!(any.pointer(&target[1..]), Some(&json!({"type": "string"})));
        let one = schema(ToolChoice::Named("g".to_owned())).expect("a schema");
        assert_eq!(one["anyOf"].as_array().map(Vec::len), Some(1));
        let target = "/anyOf/0/properties/arguments/properties/where/$ref";
        assert_eq!(one.pointer(target), Some(&json!("#/anyOf/0/properties/arguments/$defs/city")));
    }

    #[test]
    fn a_choice_that_cannot_be_made_is_refused_by_its_path() {
        let function = |name: &str| json!({"type": "function", "function": {"name": name}});
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        assert_eq!(choice(&function("f")).expect("valid"), ToolChoice::Named("f".to_owned()));
        for (value, param) in [
            (json!("any"), "tool_choice"),
            (json!(1), "tool_choice"),
            (json!({"type": "function"}), "tool_choice.function.name"),
            (json!({"type": "allowed_tools"}), "tool_choice"),
        ] {
            assert_eq!(choice(&value).expect_err(param).param.as_deref(), Some(param));
        }
        let unknown = choice(&function("g")).expect("valid").schema(Some(&tools)).expect_err("g");
        assert_eq!(unknown.param.as_deref(), Some("tool_choice.function.name"));
        let error = choice(&json!("required")).expect("valid").schema(None).expect_err("no tools");
        assert_eq!(error.param.as_deref(), Some("tool_choice"));
    }
}
