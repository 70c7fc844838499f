//! Calls to tools in what a model says.
//!
//! Two forms are read, which most families were trained on: `<tool_call>{"name": …, "arguments":
//! {…}}</tool_call>` (Hermes, Qwen), and an answer that is one JSON object `{"name": …,
//! "parameters": {…}}` (Llama 3.1) or a list of such (Mistral). Whatever else stays text.

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;
use tunesmith_core::ids::random_text;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// A call to a tool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub(crate) struct ToolCall {
    id: String,
    #[serde(rename = "type")]
    #[schemars(extend("const" = "function"))]
    kind: &'static str,
    function: FunctionCall,
}

/// Which function, and with what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
struct FunctionCall {
    name: String,
    /// A JSON object as text.
    arguments: String,
}

/// Reads an answer as it grows: gives out what is text for sure and keeps what may be a call.
#[derive(Debug, Default)]
pub(super) struct ToolReader {
    /// The names of the tools.
    names: Vec<String>,
    held: String,
    has_text: bool,
    /// Whether all that comes is to be read at the end.
    holds_all: bool,
}

impl ToolReader {
    /// For an answer that may call these tools.
    pub(super) fn new(names: Vec<String>) -> Self {
        Self { names, ..Self::default() }
    }

    /// Takes more of the answer; gives the text of it that can be shown.
    pub(super) fn push(&mut self, text: &str) -> String {
        self.held.push_str(text);
        if self.holds_all {
            return String::new();
        }
        if !self.has_text {
            let begun = self.held.trim_start();
            if begun.is_empty() {
                return String::new();
            }
            if begun.starts_with(['{', '[']) {
                self.holds_all = true;
                return String::new();
            }
        }
        let shown = match self.held.find(OPEN) {
            Some(at) => {
                self.holds_all = true;
                at
            }
            None => self.held.len() - may_open(&self.held),
        };
        let kept = self.held.split_off(shown);
        let shown = std::mem::replace(&mut self.held, kept);
        // White space before a call is no answer.
        if !self.has_text && shown.trim().is_empty() {
            self.held.insert_str(0, &shown);
            return String::new();
        }
        self.has_text = true;
        shown
    }

    /// The rest of the answer: text, and calls.
    pub(super) fn finish(&mut self) -> (String, Vec<ToolCall>) {
        let held = std::mem::take(&mut self.held);
        let calls = if held.contains(OPEN) { marked(&held) } else { self.bare(&held) };
        match calls {
            Some(calls) if !calls.is_empty() => (String::new(), calls),
            _ => (held, Vec::new()),
        }
    }

    /// An answer that is JSON and nothing else, and calls tools that there are.
    fn bare(&self, text: &str) -> Option<Vec<ToolCall>> {
        if !self.holds_all {
            return None;
        }
        let calls = match serde_json::from_str(text.trim()).ok()? {
            Value::Array(list) => list,
            object => vec![object],
        };
        let calls: Vec<ToolCall> = calls.iter().map(call).collect::<Option<_>>()?;
        calls.iter().all(|call| self.names.contains(&call.function.name)).then_some(calls)
    }
}

/// Bytes at the end of the text that a mark may begin with.
fn may_open(text: &str) -> usize {
    (1..OPEN.len()).rev().find(|&length| text.ends_with(&OPEN[..length])).unwrap_or(0)
}

/// The calls between marks; none if one cannot be read.
fn marked(text: &str) -> Option<Vec<ToolCall>> {
    let calls = text.split(OPEN).skip(1).map(|part| {
        let body = part.split(CLOSE).next().unwrap_or_default();
        call(&serde_json::from_str(body.trim()).ok()?)
    });
    calls.collect()
}

fn call(value: &Value) -> Option<ToolCall> {
    let name = value.get("name")?.as_str()?.to_owned();
    let arguments = value.get("arguments").or_else(|| value.get("parameters"))?;
    let arguments = match arguments {
        Value::Object(_) => arguments.to_string(),
        Value::String(text) => text.clone(),
        _ => return None,
    };
    let id = format!("call_{}", random_text(&mut rand::rng(), 24));
    Some(ToolCall { id, kind: "function", function: FunctionCall { name, arguments } })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Text that is shown on the way, text at the end, and name and arguments of each call, with
    /// the answer cut into pieces of `size` bytes.
    fn read(answer: &str, size: usize) -> (String, Vec<(String, String)>) {
        let mut reader = ToolReader::new(vec!["f".to_owned(), "g".to_owned()]);
        let pieces = answer.as_bytes().chunks(size);
        let mut text: String =
            pieces.map(|piece| reader.push(std::str::from_utf8(piece).expect("ASCII"))).collect();
        let (rest, calls) = reader.finish();
        text.push_str(&rest);
        let calls = calls.into_iter().map(|call| (call.function.name, call.function.arguments));
        (text, calls.collect())
    }

    fn calls(expected: &[(&str, &str)]) -> Vec<(String, String)> {
        expected.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
    }

    #[test]
    fn calls_are_read_however_the_answer_is_cut() {
        for size in [1, 3, 1000] {
            let hermes = "\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"b\": 1, \"a\": 2}}\n\
                          </tool_call>\n<tool_call>{\"name\": \"h\", \"arguments\": {}}</tool_call>";
            let expected = calls(&[("f", "{\"b\":1,\"a\":2}"), ("h", "{}")]);
            assert_eq!(read(hermes, size), (String::new(), expected));
            let said = "I look.<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
            assert_eq!(read(said, size), ("I look.".to_owned(), calls(&[("f", "{}")])));
            let llama = " {\"name\": \"g\", \"parameters\": {\"x\": \"y\"}}";
            assert_eq!(read(llama, size), (String::new(), calls(&[("g", "{\"x\":\"y\"}")])));
            let mistral =
                "[{\"name\": \"f\", \"arguments\": {}}, {\"name\": \"g\", \"arguments\": {}}]";
            assert_eq!(read(mistral, size), (String::new(), calls(&[("f", "{}"), ("g", "{}")])));
        }
    }

    #[test]
    fn what_is_no_call_stays_text() {
        for text in [
            "plain",
            " a < b, <tool",
            "{\"answer\": 42}",
            "{\"name\": \"unknown\", \"parameters\": {}}",
            "[1, 2",
            "see <tool_call>{broken</tool_call>",
            "  ",
        ] {
            for size in [1, 1000] {
                assert_eq!(read(text, size), (text.to_owned(), Vec::new()), "{text}");
            }
        }
    }
}
