//! Texts with `{{ item.x }}` and `{{ sample.output_text }}` in them.
//!
//! A path and nothing more: no filters, no loops, so that a request cannot keep a server busy.

use serde_json::Value;
use std::borrow::Cow;

/// A text with places to fill.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Template(Vec<Piece>);

#[derive(Debug, Clone, PartialEq)]
enum Piece {
    Text(String),
    Place(Root, Vec<Step>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Root {
    Item,
    OutputText,
    OutputJson,
}

#[derive(Debug, Clone, PartialEq)]
enum Step {
    Key(String),
    Index(usize),
}

/// Why a place cannot be filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RenderError {
    SampleIsNotJson,
    UnknownVariable,
}

impl Template {
    /// Reads a template; the error is the rule that it breaks.
    pub(super) fn parse(source: &str) -> Result<Self, String> {
        let mut pieces = Vec::new();
        let mut rest = source;
        while let Some((text, after)) = rest.split_once("{{") {
            let (place, after) = after
                .split_once("}}")
                .ok_or_else(|| "a text whose every {{ has its }}".to_owned())?;
            if !text.is_empty() {
                pieces.push(Piece::Text(text.to_owned()));
            }
            pieces.push(read_place(place.trim())?);
            rest = after;
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest.to_owned()));
        }
        Ok(Self(pieces))
    }

    /// The text for the answer `sample` to `item`.
    pub(super) fn render(&self, sample: &str, item: &Value) -> Result<String, RenderError> {
        let mut output_json = None;
        let mut text = String::new();
        for piece in &self.0 {
            let filled = match piece {
                Piece::Text(text) => Cow::Borrowed(text.as_str()),
                Piece::Place(Root::OutputText, _) => Cow::Borrowed(sample),
                Piece::Place(Root::Item, steps) => shown(walk(item, steps)?),
                Piece::Place(Root::OutputJson, steps) => {
                    if output_json.is_none() {
                        let parsed: Value = serde_json::from_str(sample)
                            .map_err(|_| RenderError::SampleIsNotJson)?;
                        output_json = Some(parsed);
                    }
                    let value = output_json.as_ref().ok_or(RenderError::SampleIsNotJson)?;
                    Cow::Owned(shown(walk(value, steps)?).into_owned())
                }
            };
            text.push_str(&filled);
        }
        Ok(text)
    }
}

fn walk<'a>(value: &'a Value, steps: &[Step]) -> Result<&'a Value, RenderError> {
    steps
        .iter()
        .try_fold(value, |value, step| match step {
            Step::Key(key) => value.get(key),
            Step::Index(index) => value.get(index),
        })
        .ok_or(RenderError::UnknownVariable)
}

/// A string as it is, anything else as JSON.
fn shown(value: &Value) -> Cow<'_, str> {
    match value {
        Value::String(text) => Cow::Borrowed(text),
        other => Cow::Owned(other.to_string()),
    }
}

fn read_place(place: &str) -> Result<Piece, String> {
    let rule = || {
        format!(
            "a text whose places are item.…, sample.output_text or sample.output_json.…, with \
             keys after full stops and indices in brackets; not {{{{ {place} }}}}"
        )
    };
    let steps = read_steps(place).ok_or_else(rule)?;
    let key = |index: usize| match steps.get(index) {
        Some(Step::Key(key)) => Some(key.as_str()),
        _ => None,
    };
    let (root, skipped) = match (key(0), key(1)) {
        (Some("item"), _) => (Root::Item, 1),
        (Some("sample"), Some("output_text")) if steps.len() == 2 => (Root::OutputText, 2),
        (Some("sample"), Some("output_json")) => (Root::OutputJson, 2),
        _ => return Err(rule()),
    };
    Ok(Piece::Place(root, steps[skipped..].to_vec()))
}

/// `a.b[0]["c d"]` in its steps; none if it is something else.
fn read_steps(path: &str) -> Option<Vec<Step>> {
    let mut steps = Vec::new();
    let mut rest = path;
    loop {
        if let Some(inner) = rest.strip_prefix('[') {
            let (index, after) = match inner.chars().next()? {
                quote @ ('"' | '\'') => {
                    let (key, after) = inner[1..].split_once(quote)?;
                    (Step::Key(key.to_owned()), after.strip_prefix(']')?)
                }
                _ => {
                    let (index, after) = inner.split_once(']')?;
                    (Step::Index(index.trim().parse().ok()?), after)
                }
            };
            steps.push(index);
            rest = after;
        } else {
            let name = if steps.is_empty() { rest } else { rest.strip_prefix('.')? };
            let end = name
                .find(|c: char| !(c.is_alphanumeric() || c == '_' || c == '-'))
                .unwrap_or(name.len());
            if end == 0 {
                return None;
            }
            steps.push(Step::Key(name[..end].to_owned()));
            rest = &name[end..];
        }
        if rest.is_empty() {
            return Some(steps);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rendered(source: &str, sample: &str, item: &Value) -> Result<String, RenderError> {
        Template::parse(source).expect(source).render(sample, item)
    }

    #[test]
    fn places_are_filled_with_texts_as_they_are_and_values_as_json() {
        let item = json!({"a": "x", "n": 1.5, "list": [{"k v": true}], "o": {"b": null}});
        for (source, text) in [
            ("no place", "no place"),
            ("{{item.a}}", "x"),
            ("<{{ item.n }}|{{item.list[0]['k v']}}>", "<1.5|true>"),
            ("{{ item.o }}{{ item.o.b }}", "{\"b\":null}null"),
            ("{{sample.output_text}}!", "{\"z\": [7]}!"),
            ("{{sample.output_json.z[0]}}", "7"),
        ] {
            assert_eq!(rendered(source, "{\"z\": [7]}", &item).as_deref(), Ok(text), "{source}");
        }
        assert_eq!(rendered("{{item.b}}", "", &item), Err(RenderError::UnknownVariable));
        assert_eq!(rendered("{{item.list[1]}}", "", &item), Err(RenderError::UnknownVariable));
        assert_eq!(
            rendered("{{sample.output_json}}", "{", &item),
            Err(RenderError::SampleIsNotJson)
        );
    }

    #[test]
    fn what_a_place_does_not_hold_is_filled_in_once_and_not_read_again() {
        let item = json!({"a": "{{item.secret}}", "secret": "s"});
        assert_eq!(rendered("{{item.a}}", "", &item).as_deref(), Ok("{{item.secret}}"));
    }

    #[test]
    fn other_places_are_refused() {
        for source in [
            "{{x}}",
            "{{ }}",
            "{{item.}}",
            "{{item",
            "{{sample.x}}",
            "{{item|upper}}",
            "{{item[x]}}",
        ] {
            assert!(Template::parse(source).is_err(), "{source}");
        }
    }
}
