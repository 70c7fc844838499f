//! The body of `POST /v1/fine_tuning/jobs`, field by field.

use crate::failure::{invalid_value, missing};
use crate::fields::{given, integer, metadata, required, text};
use crate::warnings;
use rand::RngExt as _;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::hyperparameters::{AdapterConfig, AdapterType, Auto, Hyperparameters, Method};

/// OpenAI's method that is not offered: a known word, so that its sub-object draws no warning.
const OTHER_METHODS: [&str; 1] = ["reinforcement"];
/// What OpenAI's clients may send.
const FIELDS: [&str; 9] = [
    "model",
    "training_file",
    "validation_file",
    "suffix",
    "seed",
    "metadata",
    "integrations",
    "hyperparameters",
    "method",
];
pub(crate) const MAX_SUFFIX: usize = 64;
pub(crate) const MAX_SEED: u64 = (1 << 31) - 1;

/// A job that a client asks for, checked as far as the request alone allows.
#[derive(Debug, PartialEq)]
pub(crate) struct JobRequest {
    pub(crate) model: String,
    pub(crate) training_file: String,
    pub(crate) validation_file: Option<String>,
    pub(crate) suffix: Option<String>,
    pub(crate) seed: u64,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) method: Method,
    /// As the client wrote them, and found in order.
    pub(crate) hyperparameters: Map<String, Value>,
    /// Where they stand in the request.
    pub(crate) hyperparameters_path: &'static str,
    /// About the learning rate: also an event of the job.
    pub(crate) hyperparameter_warnings: Vec<String>,
    /// About fields that nothing reads.
    pub(crate) field_warnings: Vec<String>,
}

impl JobRequest {
    /// Reads the request's fields.
    ///
    /// # Errors
    /// `missing_required_parameter` or `invalid_value`, naming the parameter by its path.
    pub(crate) fn parse(fields: &Map<String, Value>) -> Result<Self, ApiError> {
        let method = method(fields)?;
        let (hyperparameters, path) = hyperparameters(method, fields)?;
        let (parsed, unknown) = Hyperparameters::parse_for(method, &hyperparameters, path)?;
        let validation_file = text(fields, "validation_file")?;
        if let (Some(_), Auto::Value(split)) = (&validation_file, parsed.validation_split)
            && split > 0.0
        {
            return Err(ApiError::new(
                ErrorCode::InvalidValue,
                "Invalid value for 'validation_split': it stands beside 'validation_file'. Give \
                 one of the two.",
            )
            .with_param(format!("{path}.validation_split")));
        }
        parsed.check_validation_rows(validation_file.is_some(), path)?;
        let unknown: Vec<String> = fields
            .keys()
            .filter(|key| !FIELDS.contains(&key.as_str()))
            .cloned()
            .chain(unknown_in_method(method, fields.get("method")))
            .chain(unknown.into_iter().map(|name| format!("{path}.{name}")))
            .collect();
        Ok(Self {
            model: required(fields, "model")?,
            training_file: required(fields, "training_file")?,
            validation_file,
            suffix: suffix(fields)?,
            seed: seed(fields)?,
            metadata: metadata(fields)?,
            hyperparameter_warnings: parsed.warnings(),
            method,
            hyperparameters,
            hyperparameters_path: path,
            field_warnings: integrations(fields)
                .into_iter()
                .chain(warnings::unknown_fields(&unknown))
                .collect(),
        })
    }

    /// Makes it a job that goes on with the weights of a tuned model, which `adapter` describes; says
    /// what it trains.
    ///
    /// # Errors
    /// `invalid_value` for an adapter of another shape.
    pub(crate) fn start_from(&mut self, adapter: &AdapterConfig) -> Result<AdapterType, ApiError> {
        let (method, path) = (self.method, self.hyperparameters_path);
        let (asked, _) = Hyperparameters::parse_for(method, &self.hyperparameters, path)?;
        asked.start_from(adapter, &mut self.hyperparameters, path)?;
        let (started, _) = Hyperparameters::parse_for(method, &self.hyperparameters, path)?;
        self.hyperparameter_warnings = started.warnings();
        Ok(started.adapter.kind)
    }

    /// Every warning, for the reply's header.
    pub(crate) fn warnings(&self) -> Vec<String> {
        self.hyperparameter_warnings.iter().chain(&self.field_warnings).cloned().collect()
    }
}

/// OpenAI's word for reports to other services, of which there are none here.
fn integrations(fields: &Map<String, Value>) -> Option<String> {
    let asked = given(fields, "integrations").filter(|value| **value != Value::Array(Vec::new()));
    asked.map(|_| "Integrations are not offered by this server and were ignored.".to_owned())
}

/// The suffix becomes a part of the model's name, whose parts colons separate and which stands in
/// paths.
fn suffix(fields: &Map<String, Value>) -> Result<Option<String>, ApiError> {
    let Some(value) = given(fields, "suffix") else { return Ok(None) };
    match value.as_str() {
        Some(suffix) => check_suffix(suffix).map(Some),
        None => Err(invalid_value("suffix", value, SUFFIX_RULE)),
    }
}

const SUFFIX_RULE: &str =
    "a string of 1 to 64 letters, digits, hyphens, underscores and full stops";

/// The suffix of a model's name.
///
/// # Errors
/// `invalid_value` for one that a name cannot hold.
pub(crate) fn check_suffix(suffix: &str) -> Result<String, ApiError> {
    let is_one = (1..=MAX_SUFFIX).contains(&suffix.chars().count())
        && suffix.chars().all(|c| c.is_alphanumeric() || "-_.".contains(c));
    let wrong = || invalid_value("suffix", Value::from(suffix), SUFFIX_RULE);
    is_one.then(|| suffix.to_owned()).ok_or_else(wrong)
}

fn seed(fields: &Map<String, Value>) -> Result<u64, ApiError> {
    let seed = integer(fields, "seed", 0..=MAX_SEED)?;
    Ok(seed.unwrap_or_else(|| rand::rng().random_range(0..=MAX_SEED)))
}

/// The method that the request names; supervised where it names none.
fn method(fields: &Map<String, Value>) -> Result<Method, ApiError> {
    let Some(method) = given(fields, "method") else { return Ok(Method::Supervised) };
    let Value::Object(method) = method else {
        return Err(invalid_value(
            "method",
            method,
            "an object such as {\"type\": \"supervised\"}",
        ));
    };
    match method.get("type") {
        Some(Value::String(kind)) if Method::parse(kind).is_some() => {
            Ok(Method::parse(kind).unwrap_or_default())
        }
        Some(Value::String(kind)) if OTHER_METHODS.contains(&kind.as_str()) => Err(ApiError::new(
            ErrorCode::InvalidValue,
            format!(
                "The method '{kind}' is not offered by this server. Use 'supervised', which \
                     trains on chat rows or prompt/completion rows, or 'dpo', which trains on \
                     preference pairs."
            ),
        )
        .with_param("method.type")),
        None | Some(Value::Null) => Err(missing("method.type")),
        Some(other) => Err(invalid_value("method.type", other, "\"supervised\" or \"dpo\"")),
    }
}

/// The hyperparameters in their new place or, with no method given, in their old one, beside the
/// path of that place.
fn hyperparameters(
    method: Method,
    fields: &Map<String, Value>,
) -> Result<(Map<String, Value>, &'static str), ApiError> {
    const NEW: [(Method, &str, &str); 2] = [
        (Method::Supervised, "method.supervised", "method.supervised.hyperparameters"),
        (Method::Dpo, "method.dpo", "method.dpo.hyperparameters"),
    ];
    const OLD: &str = "hyperparameters";
    const OBJECT: &str = "an object";
    fn object(value: Option<&Value>, path: &str) -> Result<Map<String, Value>, ApiError> {
        match value {
            None | Some(Value::Null) => Ok(Map::new()),
            Some(Value::Object(map)) => Ok(map.clone()),
            Some(other) => Err(invalid_value(path, other, OBJECT)),
        }
    }

    let place = NEW.into_iter().find(|(known, _, _)| *known == method);
    let (Some(Value::Object(given)), Some((_, own_path, new_path))) =
        (given(fields, "method"), place)
    else {
        return Ok((object(fields.get(OLD), OLD)?, OLD));
    };
    let own = object(given.get(method.as_str()), own_path)?;
    let new = object(own.get("hyperparameters"), new_path)?;
    if new.is_empty() {
        // Older clients name the method and leave the hyperparameters where they were.
        let old = object(fields.get(OLD), OLD)?;
        return Ok(if old.is_empty() { (new, new_path) } else { (old, OLD) });
    }
    Ok((new, new_path))
}

/// Names beside those that a method may have. Sub-objects of the methods that the job does not
/// have are ignored.
fn unknown_in_method(method: Method, given: Option<&Value>) -> Vec<String> {
    let Some(Value::Object(given)) = given else { return Vec::new() };
    let known =
        |key: &str| key == "type" || Method::parse(key).is_some() || OTHER_METHODS.contains(&key);
    let beside = given.keys().filter(|key| !known(key)).map(|key| format!("method.{key}"));
    let own = given.get(method.as_str()).and_then(Value::as_object);
    let inside = own.into_iter().flat_map(|own| {
        let unknown = own.keys().filter(|key| *key != "hyperparameters");
        unknown.map(move |key| format!("method.{method}.{key}"))
    });
    beside.chain(inside).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(extra: Value) -> Result<JobRequest, ApiError> {
        let mut body = json!({"model": "smol", "training_file": "file-a"});
        let fields = body.as_object_mut().expect("object");
        fields.extend(extra.as_object().expect("object").clone());
        JobRequest::parse(fields)
    }

    #[test]
    fn model_and_training_file_are_all_that_is_required() {
        let request = parse(json!({})).expect("valid");
        assert_eq!((request.model.as_str(), request.training_file.as_str()), ("smol", "file-a"));
        assert!(request.seed <= MAX_SEED);
        assert_eq!(request.warnings(), Vec::<String>::new());
        for absent in ["model", "training_file"] {
            let error = parse(json!({ absent: null })).expect_err(absent);
            assert_eq!(error.code, ErrorCode::MissingRequiredParameter);
            assert_eq!(error.message, format!("Missing required parameter: '{absent}'."));
            assert_eq!(error.param.as_deref(), Some(absent));
        }
    }

    #[test]
    fn each_field_out_of_its_range_is_refused_by_name() {
        let long = "x".repeat(65);
        let pairs: Map<String, Value> = (0..17).map(|i| (i.to_string(), json!("v"))).collect();
        for (name, value) in [
            ("model", json!(7)),
            ("training_file", json!("")),
            ("validation_file", json!([])),
            ("suffix", json!("")),
            ("suffix", json!(long)),
            ("suffix", json!("a:b")),
            ("seed", json!(-1)),
            ("seed", json!(1u64 << 31)),
            ("seed", json!(0.5)),
            ("metadata", json!([])),
            ("metadata", json!(pairs)),
            ("metadata", json!({ long.as_str(): "v" })),
            ("metadata", json!({"k": "x".repeat(513)})),
            ("metadata", json!({"k": 1})),
            ("method", json!("supervised")),
        ] {
            let error = parse(json!({ name: value })).expect_err(name);
            assert_eq!(error.code, ErrorCode::InvalidValue, "{value}");
            assert_eq!(error.param.as_deref(), Some(name), "{value}");
        }
        for (name, value) in [
            ("suffix", json!("x".repeat(64))),
            ("seed", json!(MAX_SEED)),
            ("metadata", json!({"k": "x".repeat(512)})),
        ] {
            parse(json!({ name: value })).expect(name);
        }
    }

    #[test]
    fn early_stopping_without_validation_rows_is_refused_and_says_the_way_out() {
        let stopping = json!({"early_stopping_patience": 2});
        let error = parse(json!({"hyperparameters": stopping})).expect_err("no validation rows");
        assert_eq!(error.param.as_deref(), Some("hyperparameters.early_stopping_patience"));
        assert!(error.message.contains("Give a validation_file"), "{}", error.message);
        parse(json!({"hyperparameters": stopping, "validation_file": "file-b"})).expect("valid");
    }

    #[test]
    fn hyperparameters_are_read_in_either_place() {
        for body in [
            json!({"hyperparameters": {"n_epochs": 4}}),
            json!({"method": {"type": "supervised",
                              "supervised": {"hyperparameters": {"n_epochs": 4}}}}),
            json!({"method": {"type": "supervised"}, "hyperparameters": {"n_epochs": 4}}),
            json!({"method": {"type": "supervised", "dpo": {"hyperparameters": {"beta": 7}},
                              "supervised": {"hyperparameters": {"n_epochs": 4}}}}),
        ] {
            let request = parse(body.clone()).expect("valid");
            assert_eq!(request.hyperparameters["n_epochs"], 4, "{body}");
            assert_eq!(request.warnings(), Vec::<String>::new(), "{body}");
        }
    }

    #[test]
    fn a_wrong_hyperparameter_is_named_by_the_place_it_came_from() {
        let old = parse(json!({"hyperparameters": {"n_epochs": 0}})).expect_err("range");
        assert_eq!(old.param.as_deref(), Some("hyperparameters.n_epochs"));
        let new = json!({"method": {"type": "supervised",
                                    "supervised": {"hyperparameters": {"n_epochs": 0}}}});
        assert_eq!(
            parse(new).expect_err("range").param.as_deref(),
            Some("method.supervised.hyperparameters.n_epochs")
        );
    }

    #[test]
    fn dpo_is_read_with_its_own_hyperparameters() {
        let request = parse(json!({"method": {"type": "dpo",
            "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": "auto"}},
            "supervised": {"hyperparameters": {"n_epochs": 99}}}}))
        .expect("valid");
        assert_eq!((request.method, &request.hyperparameters["beta"]), (Method::Dpo, &json!(0.2)));
        assert_eq!(request.warnings(), Vec::<String>::new());
        let error = parse(json!({"method": {"type": "dpo",
            "dpo": {"hyperparameters": {"beta": 3}}}}))
        .expect_err("over the range");
        assert_eq!(error.param.as_deref(), Some("method.dpo.hyperparameters.beta"));
        // In a supervised job a beta means nothing, and that is said.
        let request = parse(json!({"hyperparameters": {"beta": 0.2}})).expect("valid");
        assert_eq!(request.method, Method::Supervised);
        assert_eq!(request.warnings(), ["Unknown fields were ignored: hyperparameters.beta."]);
    }

    #[test]
    fn a_method_that_is_not_offered_is_refused_clearly() {
        for kind in OTHER_METHODS {
            let error = parse(json!({"method": {"type": kind, kind: {}}})).expect_err(kind);
            assert_eq!(error.param.as_deref(), Some("method.type"));
            assert!(error.message.starts_with(&format!("The method '{kind}' is not offered")));
        }
        assert!(parse(json!({"method": {"type": "magic"}})).is_err());
        assert!(parse(json!({"method": {}})).is_err());
    }

    #[test]
    fn fields_that_are_not_openais_are_named_in_a_warning() {
        let request = parse(json!({
            "integrations": [], "epochs": 3,
            "method": {"type": "supervised", "speed": 1,
                       "supervised": {"hyperparameters": {"n_epoch": 3}, "x": 1}},
        }))
        .expect("valid");
        assert_eq!(
            request.warnings(),
            ["Unknown fields were ignored: epochs, method.speed, method.supervised.x, \
              method.supervised.hyperparameters.n_epoch."]
        );
    }

    #[test]
    fn integrations_are_ignored_and_that_is_said() {
        let request =
            parse(json!({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}));
        assert_eq!(
            request.expect("valid").warnings(),
            ["Integrations are not offered by this server and were ignored."]
        );
    }

    #[test]
    fn a_learning_rate_that_is_rarely_meant_warns() {
        let request = parse(json!({"hyperparameters": {"learning_rate": 0.5}})).expect("valid");
        assert_eq!(request.hyperparameter_warnings.len(), 1);
        assert_eq!(request.warnings(), request.hyperparameter_warnings);
    }
}
