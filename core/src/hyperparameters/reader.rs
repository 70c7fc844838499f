//! Reading hyperparameters out of a request; every error names its field, its value and the rule.

use super::Auto;
use super::adapter::{AdapterConfig, AdapterType, InitLoraWeights, Quantization, TARGET_MODULES};
use crate::errors::{ApiError, ErrorCode};
use serde::de::{DeserializeOwned, Deserializer, Visitor, value::Error as Refused};
use serde::{Deserialize as _, forward_to_deserialize_any};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::fmt;

/// What a request may say of an adapter.
pub(super) const ADAPTER_FIELDS: [&str; 11] = [
    "type",
    "r",
    "alpha",
    "dropout",
    "target_modules",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "loraplus_lr_ratio",
    "trainable_layers",
    "quantization",
];

/// A closed range of numbers (open below where `above_min`), as an error message states it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Range {
    pub(super) min: f64,
    pub(super) max: f64,
    pub(super) above_min: bool,
}

/// What a field may be beside `"auto"`.
#[derive(Debug, Clone, Copy)]
pub(super) enum Rule {
    Number(Range),
    Integer(Range),
    Boolean,
    Words(&'static [&'static str]),
}

/// The fields that a reading asks for, each with the path of its object: what there is to be given
/// is written once, where it is read.
pub(super) type Notes = RefCell<Vec<(String, String, Rule)>>;

pub(super) const fn closed(min: f64, max: f64) -> Range {
    Range { min, max, above_min: false }
}

pub(super) const fn above(min: f64, max: f64) -> Range {
    Range { min, max, above_min: true }
}

impl Range {
    fn holds(self, value: f64) -> bool {
        value <= self.max && if self.above_min { value > self.min } else { value >= self.min }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { min, max, above_min } = self;
        if *above_min {
            write!(f, "greater than {min} and at most {max}")
        } else {
            write!(f, "between {min} and {max}")
        }
    }
}

/// Reads fields of one JSON object; every error names the field by its whole path.
pub(super) struct Reader<'a> {
    pub(super) fields: &'a Map<String, Value>,
    pub(super) path: &'a str,
    pub(super) notes: Option<&'a Notes>,
}

impl Reader<'_> {
    /// The field, unless it is absent, null or `"auto"`.
    fn given(&self, name: &str) -> Option<&Value> {
        self.fields.get(name).filter(|value| !value.is_null() && *value != "auto")
    }

    fn note(&self, name: &str, rule: Rule) {
        if let Some(notes) = self.notes {
            notes.borrow_mut().push((self.path.to_owned(), name.to_owned(), rule));
        }
    }

    pub(super) fn invalid(&self, name: &str, value: &Value, rule: impl fmt::Display) -> ApiError {
        ApiError::new(
            ErrorCode::InvalidValue,
            format!("Invalid value for '{name}': {value}. It must be {rule}."),
        )
        .with_param(format!("{}.{name}", self.path))
    }

    pub(super) fn number(&self, name: &str, range: Range) -> Result<Auto<f64>, ApiError> {
        self.note(name, Rule::Number(range));
        let Some(value) = self.given(name) else { return Ok(Auto::Auto) };
        value
            .as_f64()
            .filter(|&number| range.holds(number))
            .map(Auto::Value)
            .ok_or_else(|| self.invalid(name, value, format_args!("\"auto\" or a number {range}")))
    }

    pub(super) fn integer(&self, name: &str, range: Range) -> Result<Auto<u64>, ApiError> {
        self.note(name, Rule::Integer(range));
        let Some(value) = self.given(name) else { return Ok(Auto::Auto) };
        value
            .as_f64()
            .filter(|number| number.fract() == 0.0 && range.holds(*number))
            .map(|number| Auto::Value(number as u64))
            .ok_or_else(|| {
                self.invalid(name, value, format_args!("\"auto\" or a whole number {range}"))
            })
    }

    pub(super) fn boolean(&self, name: &str) -> Result<Auto<bool>, ApiError> {
        self.note(name, Rule::Boolean);
        let Some(value) = self.given(name) else { return Ok(Auto::Auto) };
        value
            .as_bool()
            .map(Auto::Value)
            .ok_or_else(|| self.invalid(name, value, "\"auto\", true or false"))
    }

    /// One of the words of an enum of words.
    pub(super) fn word<T: DeserializeOwned>(&self, name: &str) -> Result<Auto<T>, ApiError> {
        self.note(name, Rule::Words(words::<T>()));
        let Some(value) = self.given(name) else { return Ok(Auto::Auto) };
        T::deserialize(value)
            .map(Auto::Value)
            .map_err(|_| self.invalid(name, value, one_of(words::<T>())))
    }

    pub(super) fn adapter(&self) -> Result<AdapterConfig, ApiError> {
        let mut adapter = AdapterConfig::default();
        let Some(value) = self.given("adapter") else { return Ok(adapter) };
        let Value::Object(fields) = value else {
            return Err(self.invalid("adapter", value, "an object such as {\"type\": \"lora\"}"));
        };
        let path = format!("{}.adapter", self.path);
        let reader = Reader { fields, path: &path, notes: self.notes };
        let is_known = |name: &str| ADAPTER_FIELDS.contains(&name);
        if let Some((name, value)) = fields.iter().find(|(name, _)| !is_known(name)) {
            return Err(reader.invalid(
                name,
                value,
                format_args!("left out: an adapter has {}", ADAPTER_FIELDS.join(", ")),
            ));
        }
        if let Some(value) = reader.given("type") {
            adapter.kind = AdapterType::deserialize(value)
                .map_err(|_| reader.invalid("type", value, "\"lora\" or \"full\""))?;
        }
        let r = reader.integer("r", closed(1.0, 1024.0))?;
        adapter.r = r.unwrap_or_else(|| adapter.r as u64) as usize;
        // PEFT users set alpha to twice the rank; who gives only the rank gets that too.
        adapter.alpha =
            reader.number("alpha", above(0.0, 65_536.0))?.unwrap_or_else(|| 2.0 * adapter.r as f64);
        adapter.dropout =
            reader.number("dropout", closed(0.0, 0.9))?.unwrap_or_else(|| adapter.dropout);
        adapter.use_rslora = reader.boolean("use_rslora")?.unwrap_or_else(|| adapter.use_rslora);
        adapter.use_dora = reader.boolean("use_dora")?.unwrap_or_else(|| adapter.use_dora);
        if let Some(value) = reader.given("init_lora_weights") {
            adapter.init_lora_weights = InitLoraWeights::deserialize(value).map_err(|_| {
                reader.invalid("init_lora_weights", value, "\"default\" or \"pissa\"")
            })?;
        }
        if let Some(value) = reader.given("target_modules") {
            adapter.target_modules = target_modules(value).ok_or_else(|| {
                let all = TARGET_MODULES.join(", ");
                reader.invalid(
                    "target_modules",
                    value,
                    format_args!("\"all-linear\" or a list with at least one of {all}"),
                )
            })?;
        }
        adapter.loraplus_lr_ratio = reader
            .number("loraplus_lr_ratio", closed(1.0, 1024.0))?
            .unwrap_or_else(|| adapter.loraplus_lr_ratio);
        let trainable_layers = reader.integer("trainable_layers", closed(0.0, 4096.0))?;
        adapter.trainable_layers =
            trainable_layers.unwrap_or_else(|| adapter.trainable_layers as u64) as usize;
        if let Some(value) = reader.given("quantization") {
            adapter.quantization = Quantization::deserialize(value).map_err(|_| {
                reader.invalid("quantization", value, "\"none\", \"int8\" or \"nf4\"")
            })?;
        }
        if let Some((name, rule)) = adapter.misplaced() {
            return Err(reader.invalid(name, &fields[name], rule));
        }
        Ok(adapter)
    }
}

/// `"auto", "a", "b" or "c"`.
fn one_of(words: &[&str]) -> String {
    let mut text = "\"auto\"".to_owned();
    let words: Vec<&str> = words.iter().copied().filter(|&word| word != "auto").collect();
    for (index, word) in words.iter().enumerate() {
        let before = if index + 1 == words.len() { " or " } else { ", " };
        text.push_str(&format!("{before}\"{word}\""));
    }
    text
}

/// The words that an enum of words is read from, asked of its own reading.
fn words<T: DeserializeOwned>() -> &'static [&'static str] {
    struct Asks<'a>(&'a mut &'static [&'static str]);

    impl<'de> Deserializer<'de> for Asks<'_> {
        type Error = Refused;

        fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Refused> {
            Err(serde::de::Error::custom("only enums have words"))
        }

        fn deserialize_enum<V: Visitor<'de>>(
            self,
            _name: &'static str,
            variants: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, Refused> {
            *self.0 = variants;
            self.deserialize_any(visitor)
        }

        forward_to_deserialize_any! {
            bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit
            unit_struct newtype_struct seq tuple tuple_struct map struct identifier ignored_any
        }
    }

    let mut words: &'static [&'static str] = &[];
    // It always refuses, once it has heard the words.
    let _ = T::deserialize(Asks(&mut words));
    words
}

/// The modules that `value` names, in the order of [`TARGET_MODULES`]; `None` if it names none or
/// one that is not there.
fn target_modules(value: &Value) -> Option<Vec<String>> {
    if value == "all-linear" {
        return Some(TARGET_MODULES.map(str::to_owned).to_vec());
    }
    let named: Vec<&str> = value.as_array()?.iter().map(Value::as_str).collect::<Option<_>>()?;
    if named.is_empty() || named.iter().any(|name| !TARGET_MODULES.contains(name)) {
        return None;
    }
    Some(TARGET_MODULES.into_iter().filter(|m| named.contains(m)).map(str::to_owned).collect())
}
