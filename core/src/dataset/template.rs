//! Chat templates: Jinja as Hugging Face transformers sets it up.

use super::tojson::tojson;
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value};
use std::borrow::Cow;
use time::format_description::parse_strftime_owned;
use time::{Date, Month, OffsetDateTime};

/// Templates may write today's date. A row must give the same tokens when it is validated, when
/// it is trained and when a run goes on after midnight, so the date is a constant: the one that
/// Llama's own templates fall back to.
const TODAY: OffsetDateTime = match Date::from_calendar_date(2024, Month::July, 26) {
    Ok(date) => date.midnight().assume_utc(),
    Err(_) => panic!("a day of July"),
};

const NAME: &str = "chat_template";

/// A compiled chat template.
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
}

impl ChatTemplate {
    /// Compiles `source`; `special_tokens` are variables such as `bos_token` with their texts.
    pub(super) fn compile(
        source: &str,
        special_tokens: &[(&'static str, String)],
    ) -> Result<Self, Error> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
        environment.set_syntax(syntax);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", tojson);
        // For Jinja2 None is no iterable.
        environment
            .add_test("iterable", |value: Value| !value.is_none() && value.try_iter().is_ok());
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| strftime(&format));
        for (name, text) in special_tokens {
            environment.add_global(*name, text.clone());
        }
        environment.add_template_owned(NAME, without_generation_marks(source).into_owned())?;
        Ok(Self { environment, source: source.to_owned() })
    }

    /// Renders `messages`; absent tools are `None`, as in transformers.
    pub(super) fn render(
        &self,
        messages: Value,
        tools: Value,
        add_generation_prompt: bool,
    ) -> Result<String, Error> {
        self.environment.get_template(NAME)?.render(minijinja::context! {
            messages,
            tools,
            documents => Value::from(()),
            add_generation_prompt,
        })
    }

    /// Whether the template deals with `name` at all, a field or a role.
    pub(super) fn mentions(&self, name: &str) -> bool {
        self.source.contains(name)
    }
}

fn strftime(format: &str) -> Result<String, Error> {
    let invalid = |error: &dyn std::error::Error| {
        Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {error}"))
    };
    let description = parse_strftime_owned(format).map_err(|error| invalid(&error))?;
    TODAY.format(&description).map_err(|error| invalid(&error))
}

/// transformers marks the assistant's part with `{% generation %}`, a tag of its own that writes
/// nothing; a plain condition has the same effect on white space.
fn without_generation_marks(source: &str) -> Cow<'_, str> {
    if !source.contains("generation") {
        return Cow::Borrowed(source);
    }
    let mut replaced = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let (before, tag) = rest[..start + length].split_at(start + 2);
        let word = tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        replaced.push_str(before);
        match word {
            "generation" => replaced.push_str(&tag.replace(word, "if true")),
            "endgeneration" => replaced.push_str(&tag.replace(word, "endif")),
            _ => replaced.push_str(tag),
        }
        rest = &rest[start + length..];
    }
    replaced.push_str(rest);
    Cow::Owned(replaced)
}

/// A JSON value as templates see it.
pub(super) fn to_template(value: &serde_json::Value) -> Value {
    match value {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(value) => Value::from(*value),
        serde_json::Value::Number(number) => {
            if let Some(number) = number.as_i64() {
                Value::from(number)
            } else if let Some(number) = number.as_u64() {
                Value::from(number)
            } else {
                Value::from(number.as_f64())
            }
        }
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(list) => list.iter().map(to_template).collect(),
        serde_json::Value::Object(fields) => {
            Value::from_pairs(fields.iter().map(|(key, value)| (key.as_str(), to_template(value))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, messages: &serde_json::Value) -> Result<String, Error> {
        ChatTemplate::compile(source, &[("bos_token", "<s>".to_owned())])?.render(
            to_template(messages),
            Value::from(()),
            true,
        )
    }

    #[test]
    fn blocks_are_trimmed_as_transformers_trims_them() {
        let source = "{{ bos_token }}\n{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\nend\n";
        assert_eq!(
            render(source, &json!([{"content": "a"}, {"content": "b"}])).expect("render"),
            "<s>\na\nb\nend"
        );
    }

    #[test]
    fn python_methods_and_loop_controls_work() {
        let source = "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}\
                      {{ m.content.strip().split('|')[-1].upper() }}{{ m.get('x', 'none') }}{% endfor %}";
        assert_eq!(
            render(source, &json!([{"content": " a|b "}, {"content": "c"}])).expect("render"),
            "Bnone"
        );
    }

    #[test]
    fn none_is_no_iterable() {
        let source = "{{ tools is iterable }}{{ messages is iterable }}{{ nothing is iterable }}{{ 1 is iterable }}";
        assert_eq!(render(source, &json!([])).expect("render"), "FalseTrueTrueFalse");
    }

    #[test]
    fn a_template_can_refuse_with_a_message_of_its_own() {
        let error = render("{{ raise_exception('roles must alternate') }}", &json!([]))
            .expect_err("refused");
        assert!(error.to_string().contains("roles must alternate"), "{error}");
    }

    #[test]
    fn the_date_is_always_the_same() {
        assert_eq!(
            render("{{ strftime_now('%d %b %Y') }}", &json!([])).expect("render"),
            "26 Jul 2024"
        );
        assert!(render("{{ strftime_now('%!') }}", &json!([])).is_err());
    }

    #[test]
    fn generation_marks_write_nothing_and_keep_white_space() {
        assert_eq!(
            render("a {%- generation -%} b {% endgeneration %} c", &json!([])).expect("render"),
            "ab  c"
        );
        let untouched = "{% if add_generation_prompt %}x{% endif %}";
        assert_eq!(without_generation_marks(untouched), untouched);
    }

    #[test]
    fn no_tools_are_none_and_keys_keep_their_order() {
        assert_eq!(
            render("{{ tools is none }}{{ messages | tojson }}", &json!([{"b": 1, "a": 2}]))
                .expect("render"),
            "True[{\"b\": 1, \"a\": 2}]"
        );
    }
}
