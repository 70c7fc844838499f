//! The part of a request that says how to sample; the same for conversations and plain prompts.

use super::Served;
use crate::failure::invalid_value;
use crate::fields::{given, integer, whole};
use rand::RngExt as _;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::sampling::Sampling;

/// OpenAI's limits.
pub(crate) const MAX_N: u64 = 128;
pub(crate) const MAX_STOPS: usize = 4;
const MAX_BIAS: f64 = 100.0;

/// The fields that are read here.
pub(super) const FIELDS: [&str; 11] = [
    "model",
    "temperature",
    "top_p",
    "seed",
    "n",
    "stop",
    "stream",
    "stream_options",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
];
/// Fields that say nothing to this server and that clients send as a matter of course.
pub(super) const TAKEN_WITHOUT_EFFECT: [&str; 6] = [
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "service_tier",
];

/// How to sample, as it was asked.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Asked {
    pub(super) n: u32,
    pub(super) stops: Vec<String>,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    /// The most tokens of an answer, and the name of the field that says so.
    max_tokens: Option<u64>,
    temperature: f64,
    top_p: f64,
    seed: Option<i64>,
    frequency_penalty: f64,
    presence_penalty: f64,
    logit_bias: Vec<(u32, f32)>,
}

impl Asked {
    /// Reads the fields. The first of `max_tokens_names` that is given counts.
    pub(super) fn parse(
        fields: &Map<String, Value>,
        max_tokens_names: &[&str],
    ) -> Result<Self, ApiError> {
        let mut max_tokens = None;
        for name in max_tokens_names {
            let asked = integer(fields, name, 1..=u64::from(u32::MAX))?;
            max_tokens = max_tokens.or(asked);
        }
        let stream = flag(fields, "stream")?;
        Ok(Self {
            n: integer(fields, "n", 1..=MAX_N)?.unwrap_or(1) as u32,
            stops: stops(fields)?,
            stream,
            include_usage: include_usage(fields, stream)?,
            max_tokens,
            temperature: number(fields, "temperature", 0.0..=2.0)?.unwrap_or(1.0),
            top_p: number(fields, "top_p", 0.0..=1.0)?.unwrap_or(1.0),
            seed: seed(fields)?,
            frequency_penalty: number(fields, "frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            presence_penalty: number(fields, "presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            logit_bias: logit_bias(fields)?,
        })
    }

    /// The same for the model that answers, after a prompt of so many tokens. `default` is the most
    /// tokens where the request does not say; without one an answer may fill the context. `part`
    /// is the field that the prompt is made of.
    pub(super) fn sampling(
        &self,
        served: &Served,
        prompt_tokens: usize,
        default: Option<u64>,
        part: &str,
        stop_ids: Vec<u32>,
    ) -> Result<Sampling, ApiError> {
        let (context, prompt) = (served.base.context_length, prompt_tokens as u64);
        let asked = self.max_tokens;
        let most = match asked {
            Some(asked) if prompt + asked > context => {
                return Err(too_long(
                    part,
                    format!(
                        "This model's maximum context length is {context} tokens. However, you \
                         requested {} tokens ({prompt} in the {part}, {asked} in the completion). \
                         Please reduce the length of the {part} or of the completion.",
                        prompt + asked
                    ),
                ));
            }
            Some(asked) => asked,
            None if prompt >= context => {
                return Err(too_long(
                    part,
                    format!(
                        "This model's maximum context length is {context} tokens. However, your \
                         {part} resulted in {prompt} tokens, which leaves none for an answer. \
                         Please reduce the length of the {part}."
                    ),
                ));
            }
            None => default.unwrap_or(u64::MAX).min(context - prompt),
        };
        let size = served.tokenizer.vocabulary_size();
        if let Some((id, _)) = self.logit_bias.iter().find(|(id, _)| *id as usize >= size) {
            let rule = format!("a token of the model, from 0 to {}", size.saturating_sub(1));
            return Err(invalid_value("logit_bias", id, &rule));
        }
        Ok(Sampling {
            max_tokens: u32::try_from(most).unwrap_or(u32::MAX),
            temperature: self.temperature as f32,
            // The fewest tokens of any probability at all: the most likely one.
            top_p: (self.top_p as f32).max(f32::MIN_POSITIVE),
            seed: self.seed.map_or_else(|| rand::rng().random(), i64::cast_unsigned),
            frequency_penalty: self.frequency_penalty as f32,
            presence_penalty: self.presence_penalty as f32,
            logit_bias: self.logit_bias.clone(),
            top_logprobs: 0,
            stop_ids,
            json_schema: None,
        })
    }
}

fn too_long(part: &str, message: String) -> ApiError {
    ApiError::new(ErrorCode::ContextLengthExceeded, message).with_param(part)
}

/// A flag; false if it is absent or null.
pub(super) fn flag(fields: &Map<String, Value>, name: &str) -> Result<bool, ApiError> {
    match given(fields, name) {
        None => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(other) => Err(invalid_value(name, other, "true or false")),
    }
}

fn number(
    fields: &Map<String, Value>,
    name: &str,
    range: RangeInclusive<f64>,
) -> Result<Option<f64>, ApiError> {
    let Some(value) = given(fields, name) else { return Ok(None) };
    value.as_f64().filter(|number| range.contains(number)).map(Some).ok_or_else(|| {
        let (low, high) = range.into_inner();
        invalid_value(name, value, &format!("a number between {low} and {high}"))
    })
}

fn seed(fields: &Map<String, Value>) -> Result<Option<i64>, ApiError> {
    let Some(value) = given(fields, "seed") else { return Ok(None) };
    whole(value).map(Some).ok_or_else(|| invalid_value("seed", value, "a whole number of 64 bits"))
}

fn stops(fields: &Map<String, Value>) -> Result<Vec<String>, ApiError> {
    let stops = match given(fields, "stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(stop)) => vec![stop.clone()],
        Some(Value::Array(list)) if list.len() <= MAX_STOPS => {
            list.iter().filter_map(|stop| stop.as_str().map(str::to_owned)).collect()
        }
        Some(_) => Vec::new(),
    };
    let asked = fields["stop"].as_array().map_or(1, Vec::len);
    if stops.len() != asked || stops.iter().any(String::is_empty) {
        let rule = format!("a string that is not empty, or a list of up to {MAX_STOPS} of them");
        return Err(invalid_value("stop", &fields["stop"], &rule));
    }
    Ok(stops)
}

fn include_usage(fields: &Map<String, Value>, stream: bool) -> Result<bool, ApiError> {
    let Some(options) = given(fields, "stream_options") else { return Ok(false) };
    if !stream {
        let rule = "left out unless 'stream' is true";
        return Err(invalid_value("stream_options", options, rule));
    }
    let Some(options) = options.as_object() else {
        return Err(invalid_value("stream_options", options, "an object"));
    };
    flag(options, "include_usage").map_err(|error| error.with_param("stream_options.include_usage"))
}

fn logit_bias(fields: &Map<String, Value>) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(value) = given(fields, "logit_bias") else { return Ok(Vec::new()) };
    let pair = |(id, bias): (&String, &Value)| {
        let bias = bias.as_f64().filter(|bias| (-MAX_BIAS..=MAX_BIAS).contains(bias))?;
        Some((id.parse().ok()?, bias as f32))
    };
    let pairs = value.as_object().and_then(|pairs| pairs.iter().map(pair).collect());
    pairs.ok_or_else(|| {
        let rule = "an object from token ids to numbers between -100 and 100";
        invalid_value("logit_bias", value, rule)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(fields: &Value) -> Result<Asked, ApiError> {
        Asked::parse(fields.as_object().expect("object"), &["max_completion_tokens", "max_tokens"])
    }

    #[test]
    fn what_is_left_out_is_openais_default() {
        let asked = parse(&json!({"temperature": null})).expect("in order");
        assert_eq!((asked.n, asked.temperature, asked.top_p), (1, 1.0, 1.0));
        assert_eq!((asked.max_tokens, asked.stream, asked.seed), (None, false, None));
    }

    #[test]
    fn the_newer_name_of_the_limit_comes_first() {
        let asked = parse(&json!({"max_tokens": 7, "max_completion_tokens": 5}));
        assert_eq!(asked.expect("in order").max_tokens, Some(5));
        assert_eq!(parse(&json!({"max_tokens": 7})).expect("in order").max_tokens, Some(7));
    }

    #[test]
    fn a_value_out_of_range_is_refused_by_name() {
        for (field, values) in [
            ("temperature", vec![json!(-0.1), json!(2.1), json!("hot")]),
            ("top_p", vec![json!(1.01), json!(-1)]),
            ("n", vec![json!(0), json!(129), json!(1.5)]),
            ("seed", vec![json!(1.5), json!("a")]),
            ("max_tokens", vec![json!(0), json!(-1)]),
            ("stop", vec![json!(""), json!(["a", 7]), json!(["a", "b", "c", "d", "e"]), json!({})]),
            ("stream", vec![json!("yes")]),
            ("stream_options", vec![json!({"include_usage": true})]),
            ("frequency_penalty", vec![json!(2.5)]),
            ("presence_penalty", vec![json!(-2.5)]),
            ("logit_bias", vec![json!({"a": 1}), json!({"5": 101}), json!([1])]),
        ] {
            for value in values {
                let error = parse(&json!({ field: value })).expect_err(field);
                assert_eq!(error.param.as_deref(), Some(field), "{value}");
            }
        }
        let wrong = json!({"stream": true, "stream_options": {"include_usage": 1}});
        let error = parse(&wrong).expect_err("no flag");
        assert_eq!(error.param.as_deref(), Some("stream_options.include_usage"));
    }

    #[test]
    fn one_stop_string_or_a_list_of_them_is_read() {
        assert_eq!(parse(&json!({"stop": "a"})).expect("in order").stops, ["a"]);
        assert_eq!(parse(&json!({"stop": ["a", "b"]})).expect("in order").stops, ["a", "b"]);
        assert!(parse(&json!({"stop": []})).expect("in order").stops.is_empty());
    }
}
