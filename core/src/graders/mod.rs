//! Graders: what scores an answer, as OpenAI's fine-tuning API describes them.
//!
//! Those that can be computed exactly from a published formula are. The others (a client's Python,
//! another model's opinion, embeddings, a dictionary of synonyms) are refused by name.

mod formula;
mod schema;
mod similarity;
mod template;

pub use schema::schema;

use crate::errors::{ApiError, ErrorCode};
use formula::Formula;
use serde_json::{Map, Value};
use similarity::Metric;
use std::collections::BTreeMap;
use template::{RenderError, Template};

/// The most graders in one.
const MAX_GRADERS: usize = 32;

/// A grader, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Grader {
    /// Its name.
    pub name: String,
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq)]
enum Kind {
    StringCheck { input: Template, reference: Template, operation: Operation },
    TextSimilarity { input: Template, reference: Template, metric: Metric },
    Multi { graders: Vec<(String, Grader)>, output: Formula },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Eq,
    Ne,
    Like,
    Ilike,
}

const OPERATIONS: [(&str, Operation); 4] = [
    ("eq", Operation::Eq),
    ("ne", Operation::Ne),
    ("like", Operation::Like),
    ("ilike", Operation::Ilike),
];

/// What a grader says of an answer. An error makes the reward 0.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Grade {
    /// The score.
    pub reward: f64,
    /// The scores of the graders in a `multi`, by their keys.
    pub sub_rewards: BTreeMap<String, f64>,
    /// Why there is no score.
    pub error: Option<GradeError>,
}

/// Why an answer has no score.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GradeError {
    /// A template asks for `sample.output_json`, and the answer is no JSON.
    SampleIsNotJson,
    /// A template names what is not there.
    UnknownVariable,
    /// The formula gives no finite number.
    NotFinite,
    /// The texts are longer than a similarity is computed for.
    TooLong,
}

impl Grader {
    /// Reads a grader; `path` is where it stands in the request.
    ///
    /// # Errors
    /// `grader_not_available` for one that cannot be computed here, with the reason,
    /// `missing_required_parameter` or `invalid_value` with the path of what is wrong.
    pub fn parse(value: &Value, path: &str) -> Result<Self, ApiError> {
        parse(value, path, true)
    }

    /// The grader's `type` on the wire.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self.kind {
            Kind::StringCheck { .. } => "string_check",
            Kind::TextSimilarity { .. } => "text_similarity",
            Kind::Multi { .. } => "multi",
        }
    }

    /// Scores the answer `sample` to `item`.
    #[must_use]
    pub fn grade(&self, sample: &str, item: &Value) -> Grade {
        match self.try_grade(sample, item) {
            Ok((reward, sub_rewards)) => Grade { reward, sub_rewards, error: None },
            Err(error) => Grade { error: Some(error), ..Grade::default() },
        }
    }

    fn try_grade(
        &self,
        sample: &str,
        item: &Value,
    ) -> Result<(f64, BTreeMap<String, f64>), GradeError> {
        let render = |template: &Template| template.render(sample, item).map_err(GradeError::from);
        match &self.kind {
            Kind::StringCheck { input, reference, operation } => {
                let holds = operation.holds(&render(input)?, &render(reference)?);
                Ok((f64::from(u8::from(holds)), BTreeMap::new()))
            }
            Kind::TextSimilarity { input, reference, metric } => {
                let score = metric.score(&render(input)?, &render(reference)?);
                Ok((score.ok_or(GradeError::TooLong)?, BTreeMap::new()))
            }
            Kind::Multi { graders, output } => {
                let mut scores = BTreeMap::new();
                for (key, grader) in graders {
                    scores.insert(key.clone(), grader.try_grade(sample, item)?.0);
                }
                let reward = output.value(&scores);
                let reward = reward.is_finite().then_some(reward).ok_or(GradeError::NotFinite)?;
                Ok((reward, scores))
            }
        }
    }
}

impl From<RenderError> for GradeError {
    fn from(error: RenderError) -> Self {
        match error {
            RenderError::SampleIsNotJson => Self::SampleIsNotJson,
            RenderError::UnknownVariable => Self::UnknownVariable,
        }
    }
}

impl Operation {
    fn holds(self, input: &str, reference: &str) -> bool {
        match self {
            Self::Eq => input == reference,
            Self::Ne => input != reference,
            Self::Like => input.contains(reference),
            Self::Ilike => input.to_lowercase().contains(&reference.to_lowercase()),
        }
    }
}

fn parse(value: &Value, path: &str, may_be_multi: bool) -> Result<Grader, ApiError> {
    let Some(fields) = value.as_object() else {
        return Err(invalid(path, value, "an object such as {\"type\": \"string_check\", …}"));
    };
    let kind = text(fields, path, "type")?;
    let kind = match kind {
        "string_check" => {
            let operation = text(fields, path, "operation")?;
            Kind::StringCheck {
                input: template(fields, path, "input")?,
                reference: template(fields, path, "reference")?,
                operation: one_of(&OPERATIONS, operation, &format!("{path}.operation"))?,
            }
        }
        "text_similarity" => {
            let metric = text(fields, path, "evaluation_metric")?;
            let place = format!("{path}.evaluation_metric");
            if let Some((_, reason)) = similarity::REFUSED.iter().find(|(name, _)| *name == metric)
            {
                return Err(refused(&place, &format!("The metric '{metric}' {reason}")));
            }
            Kind::TextSimilarity {
                input: template(fields, path, "input")?,
                reference: template(fields, path, "reference")?,
                metric: one_of(&similarity::METRICS, metric, &place)?,
            }
        }
        "multi" if may_be_multi => multi(fields, path)?,
        "python" => {
            let reason = "A python grader would run a client's program on this server";
            return Err(refused(&format!("{path}.type"), reason));
        }
        "score_model" | "label_model" => {
            let reason =
                format!("A {kind} grader asks another model, and this server has none to ask");
            return Err(refused(&format!("{path}.type"), &reason));
        }
        other => {
            let words = if may_be_multi {
                "\"string_check\", \"text_similarity\" or \"multi\""
            } else {
                "\"string_check\" or \"text_similarity\""
            };
            return Err(invalid(&format!("{path}.type"), &Value::from(other), words));
        }
    };
    Ok(Grader { name: text(fields, path, "name")?.to_owned(), kind })
}

/// `graders` maps keys, which the formula names, to graders; one alone goes by its own name.
fn multi(fields: &Map<String, Value>, path: &str) -> Result<Kind, ApiError> {
    let place = format!("{path}.graders");
    let given = fields.get("graders").filter(|value| !value.is_null());
    let Some(given) = given.ok_or_else(|| missing(&place))?.as_object() else {
        return Err(invalid(&place, &fields["graders"], "an object of graders"));
    };
    let mut graders = Vec::new();
    if given.get("type").is_some_and(Value::is_string) {
        let grader = parse(&Value::Object(given.clone()), &place, false)?;
        graders.push((grader.name.clone(), grader));
    } else {
        for (key, value) in given {
            graders.push((key.clone(), parse(value, &format!("{place}.{key}"), false)?));
        }
    }
    if !(1..=MAX_GRADERS).contains(&graders.len()) {
        let count = Value::from(graders.len());
        return Err(invalid(&place, &count, &format!("1 to {MAX_GRADERS} graders")));
    }
    let place = format!("{path}.calculate_output");
    let source = text(fields, path, "calculate_output")?;
    let output = Formula::parse(source).map_err(|reason| {
        let rule = format!(
            "a formula of the graders' keys, numbers, + - * / ^, parentheses and {}; {reason}",
            formula::FUNCTIONS.join(", ")
        );
        invalid(&place, &Value::from(source), &rule)
    })?;
    for name in output.names() {
        if !graders.iter().any(|(key, _)| *key == name) {
            let keys: Vec<&str> = graders.iter().map(|(key, _)| key.as_str()).collect();
            let rule = format!("a formula of the graders' keys ({}), not {name}", keys.join(", "));
            return Err(invalid(&place, &Value::from(source), &rule));
        }
    }
    Ok(Kind::Multi { graders, output })
}

fn text<'a>(fields: &'a Map<String, Value>, path: &str, name: &str) -> Result<&'a str, ApiError> {
    let place = format!("{path}.{name}");
    match fields.get(name) {
        None | Some(Value::Null) => Err(missing(&place)),
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(invalid(&place, other, "a string")),
    }
}

fn template(fields: &Map<String, Value>, path: &str, name: &str) -> Result<Template, ApiError> {
    let source = text(fields, path, name)?;
    Template::parse(source)
        .map_err(|rule| invalid(&format!("{path}.{name}"), &Value::from(source), &rule))
}

fn one_of<T: Copy>(words: &[(&str, T)], word: &str, place: &str) -> Result<T, ApiError> {
    words.iter().find(|(name, _)| *name == word).map(|(_, value)| *value).ok_or_else(|| {
        let words: Vec<&str> = words.iter().map(|(name, _)| *name).collect();
        invalid(place, &Value::from(word), &format!("one of {}", words.join(", ")))
    })
}

fn invalid(place: &str, value: &Value, rule: &str) -> ApiError {
    let message = format!("Invalid value for '{place}': {value}. It must be {rule}.");
    ApiError::new(ErrorCode::InvalidValue, message).with_param(place)
}

fn missing(place: &str) -> ApiError {
    let message = format!("Missing required parameter: '{place}'.");
    ApiError::new(ErrorCode::MissingRequiredParameter, message).with_param(place)
}

fn refused(place: &str, reason: &str) -> ApiError {
    let metrics: Vec<&str> = similarity::METRICS.iter().map(|(name, _)| *name).collect();
    let message = format!(
        "{reason}. Use string_check, text_similarity by {}, or multi, which combines them.",
        metrics.join(", ")
    );
    ApiError::new(ErrorCode::GraderNotAvailable, message).with_param(place)
}

#[cfg(test)]
mod tests;
