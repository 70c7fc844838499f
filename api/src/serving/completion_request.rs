//! A request for a completion of plain prompts, checked.

use super::completion::CompletionAnswer;
use super::reply::AnswerRequest;
use super::sampling_request::{Asked, FIELDS, MAX_N, TAKEN_WITHOUT_EFFECT, flag};
use super::{Serving, unsupported};
use crate::failure::{Failure, invalid_value, missing};
use crate::fields::{self, given, integer, required, whole};
use crate::warnings::unknown_fields;
use serde_json::{Map, Value};
use std::future::Future;
use tunesmith_core::errors::ApiError;
use tunesmith_core::ids::ProjectId;

/// OpenAI's limit of alternatives here.
pub(crate) const MAX_LOGPROBS: u64 = 5;
/// The fields that are read beside those of sampling.
const OF_COMPLETIONS: [&str; 6] = ["prompt", "max_tokens", "echo", "logprobs", "suffix", "best_of"];

/// One prompt.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum PromptText {
    /// Text, in which special tokens may be spelled.
    Text(String),
    /// Token ids.
    Ids(Vec<u32>),
}

/// A request in order.
#[derive(Debug, Clone)]
pub(crate) struct CompletionRequest {
    pub(super) model: String,
    pub(super) asked: Asked,
    /// At least one.
    pub(super) prompts: Vec<PromptText>,
    /// Whether an answer begins with its prompt.
    pub(super) echo: bool,
    /// Alternatives to show with each token; none to show no probabilities.
    pub(super) logprobs: Option<u8>,
    warnings: Vec<String>,
}

impl AnswerRequest for CompletionRequest {
    type Reply = CompletionAnswer;

    fn parse(body: &Map<String, Value>) -> Result<Self, ApiError> {
        let model = required(body, "model")?;
        let prompts = prompts(given(body, "prompt").ok_or_else(|| missing("prompt"))?)?;
        let asked = Asked::parse(body, &["max_tokens"])?;
        if given(body, "suffix").is_some_and(|suffix| suffix != "") {
            let why = "Models go on from a prompt here and do not fill in before a suffix.";
            return Err(unsupported("suffix", why));
        }
        let best_of = integer(body, "best_of", 1..=MAX_N)?;
        if best_of.is_some_and(|best_of| best_of != u64::from(asked.n)) {
            let why = "Every answer is given: leave it out, or let it be 'n'.";
            return Err(unsupported("best_of", why));
        }
        if prompts.len() as u64 * u64::from(asked.n) > MAX_N {
            let rule = format!("so many that there are at most {MAX_N} answers");
            let given = format!("{} prompts", prompts.len());
            return Err(invalid_value("prompt", given, &rule));
        }
        let echo = flag(body, "echo")?;
        let logprobs = integer(body, "logprobs", 0..=MAX_LOGPROBS)?;
        if echo && logprobs.is_some() {
            let why = "The probabilities of a prompt's tokens are not computed: leave out 'echo' \
                       or 'logprobs'.";
            return Err(unsupported("logprobs", why));
        }
        let known = [&FIELDS[..], &OF_COMPLETIONS[..], &TAKEN_WITHOUT_EFFECT[..]].concat();
        Ok(Self {
            model,
            asked,
            prompts,
            echo,
            logprobs: logprobs.map(|count| count as u8),
            warnings: unknown_fields(&fields::unknown(body, &known)).into_iter().collect(),
        })
    }

    fn streams(&self) -> bool {
        self.asked.stream
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn begin(
        &self,
        serving: &Serving,
        project: &ProjectId,
        low_priority: bool,
    ) -> impl Future<Output = Result<Self::Reply, Failure>> + Send {
        CompletionAnswer::begin(serving, project, self, low_priority)
    }
}

/// A string, a list of strings, a list of token ids, or a list of such lists.
fn prompts(value: &Value) -> Result<Vec<PromptText>, ApiError> {
    let wrong = || {
        let rule = "a string, a list of strings, a list of token ids, or a list of such lists, \
                    and not empty";
        invalid_value("prompt", "given", rule)
    };
    let prompts: Option<Vec<PromptText>> = match value {
        Value::String(text) => Some(vec![PromptText::Text(text.clone())]),
        Value::Array(list) if list.iter().all(Value::is_string) => {
            let text = |item: &Value| Some(PromptText::Text(item.as_str()?.to_owned()));
            list.iter().map(text).collect()
        }
        Value::Array(list) if list.iter().all(Value::is_array) => {
            list.iter().map(|ids| Some(PromptText::Ids(ids_of(ids)?))).collect()
        }
        ids => ids_of(ids).map(|ids| vec![PromptText::Ids(ids)]),
    };
    prompts.filter(|prompts| !prompts.is_empty()).ok_or_else(wrong)
}

fn ids_of(value: &Value) -> Option<Vec<u32>> {
    let id = |value: &Value| u32::try_from(whole(value)?).ok();
    value.as_array().filter(|list| !list.is_empty())?.iter().map(id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(change: &Value) -> Result<CompletionRequest, ApiError> {
        let mut body = json!({"model": "m", "prompt": "hi"});
        for (name, value) in change.as_object().expect("object") {
            body[name] = value.clone();
        }
        CompletionRequest::parse(body.as_object().expect("object"))
    }

    #[test]
    fn a_prompt_is_text_or_tokens_one_or_many() {
        let text = |text: &str| PromptText::Text(text.to_owned());
        for (given, read) in [
            (json!("a"), vec![text("a")]),
            (json!(["a", "b"]), vec![text("a"), text("b")]),
            (json!([1, 2]), vec![PromptText::Ids(vec![1, 2])]),
            (json!([[1], [2, 3]]), vec![PromptText::Ids(vec![1]), PromptText::Ids(vec![2, 3])]),
        ] {
            assert_eq!(parse(&json!({"prompt": given})).expect("in order").prompts, read);
        }
        for wrong in [json!([]), json!([[]]), json!([1, "a"]), json!({}), json!([-1]), json!(7)] {
            let error = parse(&json!({"prompt": wrong})).expect_err("refused");
            assert_eq!(error.param.as_deref(), Some("prompt"), "{wrong}");
        }
    }

    #[test]
    fn what_is_not_done_here_is_refused_by_name() {
        for (change, param) in [
            (json!({"suffix": "x"}), "suffix"),
            (json!({"best_of": 3}), "best_of"),
            (json!({"echo": true, "logprobs": 0}), "logprobs"),
        ] {
            let error = parse(&change).expect_err(param);
            assert_eq!(error.code.as_str(), "unsupported_parameter");
            assert_eq!(error.param.as_deref(), Some(param));
        }
        assert!(parse(&json!({"suffix": "", "best_of": 1, "echo": true})).is_ok());
        let many = vec!["a"; 65];
        let error = parse(&json!({"prompt": many, "n": 2})).expect_err("too many");
        assert_eq!(error.param.as_deref(), Some("prompt"));
    }
}
