//! Fields of a JSON object, read with errors that name them.

use crate::failure::{invalid_value, missing};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use tunesmith_core::errors::{ApiError, ErrorCode};

/// OpenAI's limits of the client's own notes.
pub(crate) const MAX_METADATA_PAIRS: usize = 16;
pub(crate) const MAX_METADATA_KEY: usize = 64;
pub(crate) const MAX_METADATA_VALUE: usize = 512;

/// The field, unless it is absent or null.
pub(crate) fn given<'a>(fields: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    fields.get(name).filter(|value| !value.is_null())
}

/// A string that is not empty; none if the field is absent or null.
///
/// # Errors
/// `invalid_value`.
pub(crate) fn text(fields: &Map<String, Value>, name: &str) -> Result<Option<String>, ApiError> {
    match given(fields, name) {
        None => Ok(None),
        Some(Value::String(text)) if !text.is_empty() => Ok(Some(text.clone())),
        Some(other) => Err(invalid_value(name, other, "a string that is not empty")),
    }
}

/// The same for a field that must be there.
///
/// # Errors
/// `missing_required_parameter` or `invalid_value`.
pub(crate) fn required(fields: &Map<String, Value>, name: &str) -> Result<String, ApiError> {
    text(fields, name)?.ok_or_else(|| missing(name))
}

/// A whole number, however it is written: to JSON 3 and 3.0 are the same.
pub(crate) fn whole(value: &Value) -> Option<i64> {
    /// Up to here every whole number is exact as a float.
    const EXACT: f64 = (1_u64 << 53) as f64;
    value.as_i64().or_else(|| {
        let number = value.as_f64()?;
        (number.fract() == 0.0 && number.abs() <= EXACT).then_some(number as i64)
    })
}

/// The same for one that is not negative.
pub(crate) fn count(value: &Value) -> Option<u64> {
    whole(value)?.try_into().ok()
}

/// A whole number within `range`; none if the field is absent or null.
///
/// # Errors
/// `invalid_value`.
pub(crate) fn integer(
    fields: &Map<String, Value>,
    name: &str,
    range: RangeInclusive<u64>,
) -> Result<Option<u64>, ApiError> {
    let Some(value) = given(fields, name) else { return Ok(None) };
    count(value).filter(|number| range.contains(number)).map(Some).ok_or_else(|| {
        let (low, high) = range.into_inner();
        invalid_value(name, value, &format!("a whole number between {low} and {high}"))
    })
}

/// A list of strings; none if the field is absent or null.
///
/// # Errors
/// `invalid_value`.
pub(crate) fn texts(
    fields: &Map<String, Value>,
    name: &str,
) -> Result<Option<Vec<String>>, ApiError> {
    let Some(value) = given(fields, name) else { return Ok(None) };
    let texts = value.as_array().and_then(|items| {
        items.iter().map(|item| item.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>()
    });
    texts.map(Some).ok_or_else(|| invalid_value(name, "given", "a list of strings"))
}

/// The fields that are not among `known`.
pub(crate) fn unknown(fields: &Map<String, Value>, known: &[&str]) -> Vec<String> {
    fields.keys().filter(|key| !known.contains(&key.as_str())).cloned().collect()
}

/// The client's own notes: OpenAI's `metadata`.
///
/// # Errors
/// `invalid_value`.
pub(crate) fn metadata(fields: &Map<String, Value>) -> Result<BTreeMap<String, String>, ApiError> {
    let Some(value) = given(fields, "metadata") else { return Ok(BTreeMap::new()) };
    pairs(value).ok_or_else(|| {
        // What is wrong may be long: the message says the rule and not the whole value.
        ApiError::new(
            ErrorCode::InvalidValue,
            format!(
                "Invalid value for 'metadata'. It must be an object of at most \
                 {MAX_METADATA_PAIRS} pairs: keys of at most {MAX_METADATA_KEY} characters, \
                 values strings of at most {MAX_METADATA_VALUE}."
            ),
        )
        .with_param("metadata")
    })
}

fn pairs(value: &Value) -> Option<BTreeMap<String, String>> {
    let pairs = value.as_object().filter(|pairs| pairs.len() <= MAX_METADATA_PAIRS)?;
    let pair = |(key, value): (&String, &Value)| {
        let value = value.as_str()?;
        let fits =
            key.chars().count() <= MAX_METADATA_KEY && value.chars().count() <= MAX_METADATA_VALUE;
        fits.then(|| (key.clone(), value.to_owned()))
    };
    pairs.iter().map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_whole_number_may_be_written_with_a_point() {
        let read = |value: Value| whole(&value);
        assert_eq!(
            (read(json!(3)), read(json!(3.0)), read(json!(-2.0))),
            (Some(3), Some(3), Some(-2))
        );
        assert_eq!(read(json!(i64::MIN)), Some(i64::MIN));
        for other in
            [json!(0.5), json!(1e300), json!("3"), json!(true), json!(u64::MAX), json!([3])]
        {
            assert_eq!(read(other.clone()), None, "{other}");
        }
        assert_eq!((count(&json!(7.0)), count(&json!(-1))), (Some(7), None));
    }
}
