//! The filter `tojson` as Hugging Face's chat templates have it: Python's `json.dumps` with
//! `ensure_ascii=False`, and none of the HTML escapes of Jinja's own.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// `value | tojson(indent=None, separators=None, sort_keys=False)`.
pub(super) fn tojson(
    value: &Value,
    indent: Option<usize>,
    arguments: Kwargs,
) -> Result<String, Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => arguments.get("indent")?,
    };
    if arguments.get::<Option<bool>>("ensure_ascii")? == Some(true) {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "tojson does not support ensure_ascii=True",
        ));
    }
    let separators: Option<(String, String)> = arguments
        .get::<Option<Vec<String>>>("separators")?
        .and_then(|pair| <[String; 2]>::try_from(pair).ok())
        .map(Into::into);
    let (item, key) = separators
        .unwrap_or_else(|| (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()));
    let sort_keys = arguments.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    arguments.assert_all_used()?;
    let mut writer = Writer { out: String::new(), indent, item, key, sort_keys };
    writer.write(value, 0)?;
    Ok(writer.out)
}

struct Writer {
    out: String,
    indent: Option<usize>,
    item: String,
    key: String,
    sort_keys: bool,
}

impl Writer {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.out.push_str(&value.to_string()),
            ValueKind::Number => self.out.push_str(&python_float(f64::try_from(value.clone())?)),
            ValueKind::String => self.write_string(value.as_str().unwrap_or_default())?,
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<_> = value.try_iter()?.collect();
                self.write_all('[', ']', depth, &items, |writer, item| {
                    writer.write(item, depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<_> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.write_all('{', '}', depth, &keys, |writer, key| {
                    writer.write_string(&key.to_string())?;
                    let separator = writer.key.clone();
                    writer.out.push_str(&separator);
                    writer.write(&value.get_item(key)?, depth + 1)
                })?;
            }
            kind => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("an {kind} value is not JSON serializable"),
                ));
            }
        }
        Ok(())
    }

    fn write_all(
        &mut self,
        open: char,
        close: char,
        depth: usize,
        items: &[Value],
        mut write: impl FnMut(&mut Self, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                let separator = self.item.clone();
                self.out.push_str(&separator);
            }
            self.new_line(depth + 1);
            write(self, item)?;
        }
        if !items.is_empty() {
            self.new_line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn write_string(&mut self, text: &str) -> Result<(), Error> {
        // serde_json escapes what Python escapes without ensure_ascii, and nothing more.
        let text = serde_json::to_string(text).map_err(|error| {
            Error::new(ErrorKind::InvalidOperation, "not JSON").with_source(error)
        })?;
        self.out.push_str(&text);
        Ok(())
    }
}

/// A float as Python's `repr` writes it: shortest digits, an exponent below 1e-4 and from 1e16 on.
fn python_float(value: f64) -> String {
    if value.is_nan() {
        return "NaN".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let magnitude = value.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        let text = format!("{value:e}");
        if let Some((digits, exponent)) = text.split_once('e') {
            return match exponent.strip_prefix('-') {
                Some(exponent) => format!("{digits}e-{exponent:0>2}"),
                None => format!("{digits}e+{exponent:0>2}"),
            };
        }
    }
    format!("{value:?}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::{Environment, context};

    fn render(template: &str, value: &str) -> String {
        let value: serde_json::Value = serde_json::from_str(value).expect("JSON");
        let mut environment = Environment::new();
        environment.add_filter("tojson", tojson);
        environment
            .render_str(template, context! { v => super::super::template::to_template(&value) })
            .expect("render")
    }

    #[test]
    fn it_writes_what_python_writes() {
        assert_eq!(
            render("{{ v | tojson }}", r#"{"b":"<é>'&\n\u0001","a":[1,-2.0,null,true,{}],"c":[]}"#),
            "{\"b\": \"<é>'&\\n\\u0001\", \"a\": [1, -2.0, null, true, {}], \"c\": []}"
        );
    }

    #[test]
    fn indent_separators_and_sorted_keys_are_pythons() {
        assert_eq!(
            render("{{ v | tojson(indent=2) }}", r#"{"b":[1,{"c":2}],"a":{}}"#),
            "{\n  \"b\": [\n    1,\n    {\n      \"c\": 2\n    }\n  ],\n  \"a\": {}\n}"
        );
        assert_eq!(
            render("{{ v | tojson(separators=(',', ':'), sort_keys=true) }}", r#"{"b":1,"a":2}"#),
            "{\"a\":2,\"b\":1}"
        );
    }

    #[test]
    fn floats_are_written_as_python_writes_them() {
        for (value, text) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.5, "1.5"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.25e-7, "1.25e-07"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.7e300, "1.7e+300"),
        ] {
            assert_eq!(python_float(value), text);
        }
    }

    #[test]
    fn an_undefined_value_is_an_error_as_in_python() {
        let mut environment = Environment::new();
        environment.add_filter("tojson", tojson);
        assert!(environment.render_str("{{ nothing | tojson }}", ()).is_err());
    }
}
