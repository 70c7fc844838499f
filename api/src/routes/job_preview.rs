//! `POST /v1/fine_tuning/jobs/preview`: what a job would be, without making it. Ours.
//!
//! The body is that of a create request. Where a create request or its job would end at the first
//! mistake, a preview goes on and names them all.

use crate::auth::Authenticated;
use crate::body::read_json;
use crate::estimate::{self, Estimates};
use crate::failure::Failure;
use crate::file_reports::{Unread, read_file};
use crate::job_request::JobRequest;
use crate::routes::job_create::{job_file, start_model};
use crate::server::AppState;
use crate::warnings;
use actix_web::{HttpResponse, web};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tunesmith_core::dataset::{
    FileReport, ReadOptions, ShownRow, TokenizeOptions, check_training_examples, is_text_name,
};
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::hyperparameters::{DataFacts, Hyperparameters, ResolvedHyperparameters};
use tunesmith_core::ids::FileId;
use tunesmith_store::base_models::BaseModel;
use tunesmith_store::tenants::Caller;

/// Rows that are shown token by token.
const SHOWN_ROWS: usize = 3;
/// Mistakes of a request that are looked for; each is taken out to find the next.
const MAX_MISTAKES: usize = 50;

/// A job that is not made.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Preview {
    object: &'static str,
    /// Whether a job of this body would come to train.
    would_run: bool,
    /// Why it would not, each as a create request or the job would say it.
    refusals: Vec<Refusal>,
    warnings: Vec<String>,
    model: Option<String>,
    method: Option<&'static str>,
    /// With nothing left to choose.
    #[schemars(with = "Option<Map<String, Value>>")]
    hyperparameters: Option<Value>,
    training_file: Option<FileReport>,
    validation_file: Option<FileReport>,
    /// Token by token, with text, id and weight.
    first_rows: Vec<ShownRow>,
    #[serde(flatten)]
    estimates: Option<Estimates>,
}

/// A mistake.
#[derive(Debug, Serialize, JsonSchema)]
struct Refusal {
    code: &'static str,
    message: String,
    param: Option<String>,
}

impl From<ApiError> for Refusal {
    fn from(error: ApiError) -> Self {
        Self { code: error.code.as_str(), message: error.message, param: error.param }
    }
}

/// Answers with everything that is known of the job.
pub(crate) async fn preview(
    state: web::Data<AppState>,
    caller: Authenticated,
    payload: web::Payload,
) -> Result<HttpResponse, Failure> {
    let mut fields = read_json(payload).await?.fields;
    let mut preview = Preview {
        object: "fine_tuning.job.preview",
        would_run: false,
        refusals: mistakes(&mut fields),
        warnings: Vec::new(),
        model: None,
        method: None,
        hyperparameters: None,
        training_file: None,
        validation_file: None,
        first_rows: Vec::new(),
        estimates: None,
    };
    // What is left after its mistakes are taken out; without that there is no more to say.
    if let Ok(asked) = JobRequest::parse(&fields) {
        preview.look(&state, &caller, asked).await?;
    }
    preview.would_run = preview.refusals.is_empty();
    let mut reply = HttpResponse::Ok();
    warnings::add(&mut reply, &preview.warnings);
    Ok(reply.json(preview))
}

/// Every mistake of the request alone. Each is taken out of `fields`, so that what is left may be
/// looked at.
fn mistakes(fields: &mut Map<String, Value>) -> Vec<Refusal> {
    let mut found = Vec::new();
    while found.len() < MAX_MISTAKES {
        let Err(error) = JobRequest::parse(fields) else { break };
        let (missing, param) =
            (error.code == ErrorCode::MissingRequiredParameter, error.param.clone());
        found.push(error.into());
        let Some(param) = param else { break };
        if missing {
            // A name that nothing has; what it would name is told as missing already.
            fields.insert(param, json!(NOT_GIVEN));
        } else if !remove(fields, &param) {
            break;
        }
    }
    found
}

/// Stands for a required name that the request lacks.
const NOT_GIVEN: &str = "(not given)";

/// Takes what stands at a dotted path out, or what holds it; says whether there was anything.
fn remove(fields: &mut Map<String, Value>, path: &str) -> bool {
    let Some((first, rest)) = path.split_once('.') else {
        let name = path.split('[').next().unwrap_or(path);
        return fields.remove(name).is_some();
    };
    match fields.get_mut(first) {
        Some(Value::Object(inner)) => remove(inner, rest),
        Some(_) => fields.remove(first).is_some(),
        None => false,
    }
}

impl Preview {
    fn refuse(&mut self, error: ApiError) {
        // A name that is not given is one mistake and not two.
        if !error.message.contains(NOT_GIVEN) {
            self.refusals.push(error.into());
        }
    }

    async fn look(
        &mut self,
        state: &AppState,
        caller: &Caller,
        mut asked: JobRequest,
    ) -> Result<(), Failure> {
        self.model = Some(asked.model.clone()).filter(|name| name != NOT_GIVEN);
        self.method = Some(asked.method.as_str());
        let base = match start_model(state, caller, &asked.model).await {
            Ok((base, tuned)) => {
                if let Some(tuned) = tuned {
                    // The base model of an adapter on a model that was tuned in full has the same
                    // sizes and the same tokenizer as that one's own.
                    if let Err(error) = asked.start_from(&tuned.adapter) {
                        self.refuse(error);
                    }
                }
                Some(base)
            }
            Err(failure) => {
                self.refuse(failure.client_error()?);
                None
            }
        };
        self.warnings = asked.warnings();
        let files = [
            ("training_file", Some(&asked.training_file)),
            ("validation_file", asked.validation_file.as_ref()),
        ];
        let mut found = Vec::new();
        for (param, id) in files {
            let Some(id) = id else { continue };
            match job_file(state, caller, param, id).await {
                Ok(id) => found.push((param, id)),
                Err(failure) => self.refuse(failure.client_error()?),
            }
        }
        let (asked_for, _) =
            Hyperparameters::parse_for(asked.method, &asked.hyperparameters, "hyperparameters")?;
        let Some(base) = base else { return Ok(()) };
        if let Some(layers) = base.num_hidden_layers() {
            asked_for
                .check_layers(layers, "hyperparameters")
                .unwrap_or_else(|error| self.refuse(error));
        }
        for (param, file) in found {
            self.read(state, &base, &asked_for, param, &file).await?;
        }
        let Some(training) = &self.training_file else { return Ok(()) };
        if let Err(error) = check_training_examples(training.examples) {
            self.refusals.push(error.into());
        }
        let facts = DataFacts { examples: training.examples, context_length: base.context_length };
        let resolved = asked_for.resolve(&facts);
        self.hyperparameters = Some(resolved.to_wire());
        let speed = state.store.training_speed(&base.id, &resolved).await?;
        self.estimates = Some(estimate::estimates(
            &base,
            &resolved,
            training,
            self.validation_file.as_ref(),
            speed,
            &state.prices,
        ));
        Ok(())
    }

    /// Reads one of the files as the job would.
    async fn read(
        &mut self,
        state: &AppState,
        base: &BaseModel,
        asked: &Hyperparameters,
        param: &'static str,
        file: &FileId,
    ) -> Result<(), Failure> {
        let tokenizer = match state.tokenizers.of(base).await? {
            Ok(tokenizer) => tokenizer,
            Err(error) => {
                self.refuse(error);
                return Ok(());
            }
        };
        let name = state.store.filename(file).await?.unwrap_or_default();
        let read = ReadOptions { method: Some(asked.method), is_text: is_text_name(&name), param };
        // The length at which rows are cut does not depend on the rows.
        let facts = DataFacts { examples: 1, context_length: base.context_length };
        let resolved: ResolvedHyperparameters = asked.resolve(&facts);
        let shown_rows = if param == "training_file" { SHOWN_ROWS } else { 0 };
        let options = TokenizeOptions::from(&resolved);
        // Few at a time: each keeps a core busy.
        let _turn = state.previews.acquire().await.map_err(Failure::internal)?;
        let counter = Some((tokenizer, options));
        let mut report = match read_file(&state.store, file, read, counter, shown_rows).await? {
            Ok(report) => report,
            Err(Unread::Gone) => {
                let message = format!("The content of file {file} is gone. Upload it again.");
                let error = ApiError::new(ErrorCode::InvalidTrainingFile, message);
                self.refuse(error.with_param(param));
                return Ok(());
            }
            Err(Unread::Crashed) => return Err(Failure::internal("reading a file failed")),
        };
        for problem in &report.problems {
            let message = format!("Line {}: {} {}", problem.line, problem.rule, problem.hint);
            let error = ApiError::new(ErrorCode::InvalidFileFormat, message).with_param(param);
            self.refusals.push(error.into());
        }
        let first_rows = std::mem::take(&mut report.first_rows);
        if param == "training_file" {
            self.first_rows = first_rows;
            self.training_file = Some(report);
        } else {
            self.validation_file = Some(report);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
