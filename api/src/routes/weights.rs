//! `GET /v1/models/{name}/weights?format=adapter|merged|gguf`: a tuned model's or a checkpoint's
//! weights as a tar archive, written while it is sent, whole or one range of it. It was compared with
//! the served model before, where that could be done.

use crate::archive::{Entry, archive};
use crate::auth::Authenticated;
use crate::exports::{Export, Wanted};
use crate::failure::{Failure, invalid_value};
use crate::query::Query;
use crate::routes::models::base_model;
use crate::server::AppState;
use crate::{merged, range, redirect, stored, streaming, warnings};
use actix_web::http::header::{CONTENT_ENCODING, CONTENT_TYPE, ContentDisposition};
use actix_web::{HttpRequest, HttpResponse, web};
use sha2::{Digest as _, Sha256};
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::export_check::{ExportForm, ExportManifest, MergedForm};
use tunesmith_core::gguf::StorageType;
use tunesmith_core::hyperparameters::AdapterType;
use tunesmith_core::weights::{FloatType, MAX_SHARD_SIZE, parse_shard_size};
use tunesmith_store::models::Model;
use tunesmith_store::objects::ObjectKey;
use tunesmith_store::{Store, StoreError};

pub(super) const ADAPTER: &str = "adapter";
pub(super) const MERGED: &str = "merged";
pub(super) const GGUF: &str = "gguf";
/// The words for the numbers' type of a merged model, the default first.
pub(super) const DTYPES: [&str; 4] =
    ["auto", FloatType::F32.name(), FloatType::F16.name(), FloatType::Bf16.name()];

/// Sends the weights.
pub(crate) async fn download(
    request: HttpRequest,
    state: web::Data<AppState>,
    caller: Authenticated,
    name: web::Path<String>,
    query: Query,
) -> Result<HttpResponse, Failure> {
    let format = query.word("format", &[ADAPTER, MERGED, GGUF])?;
    let storage = storage(&query, format)?;
    let asked = merged_form(&query, format)?;
    let wanted = Wanted::parse(query.word("check", &Wanted::WORDS)?);
    let model = match state.store.model(&caller.project_id, &name).await {
        Err(StoreError::NotFound { .. }) => {
            let base = base_model(&state, &name).await?;
            return Err(only_tuned(&base.name).into());
        }
        found => found?,
    };
    let mut warning = Vec::new();
    let form = match (model.adapter.kind, format) {
        (_, GGUF) => ExportForm::Gguf(storage),
        (AdapterType::Lora, MERGED) => ExportForm::Merged(asked.unwrap_or_default()),
        (AdapterType::Lora, _) => ExportForm::Adapter,
        (AdapterType::Full, _) => {
            if format == ADAPTER && query.text("format").is_some() {
                warning.push(
                    "The model was trained in full and has no adapter: these are all its weights."
                        .to_owned(),
                );
            }
            whole_form(&state.store, &model, format, asked).await?
        }
    };
    let export = Export { model, form };
    let entries = export.entries(&state.store).await?;
    let file = query.text("redirect").map(|file| stored_file(&export, &entries, file));
    let file = file.transpose()?;
    if file.is_none() {
        redirect::refuse_expires_in(&query)?;
    }
    let verdict = state.export_checks.verdict(&export, &entries, wanted).await?;
    if let Some(file) = file {
        return redirect::redirect(state.store.objects(), &file, &query).await;
    }
    let (entries, check) = (verdict.hold(entries), verdict.check);
    let Export { model, form } = &export;
    let modified = export.modified();
    let filename = format!("{}.tar", model.name.replace([':', '/'], "-"));
    let base = state.store.base_model_by_id(&model.base_model_id).await?;
    let about = ExportManifest { files: Vec::new(), base_model: Some(base.name), check };
    // The same weights make the same archive, byte by byte, and so does the same check.
    let about_json = serde_json::to_string(&about).map_err(Failure::internal)?;
    let tag = format!("{} {format} {form} {modified} {about_json}", model.place);
    let tag = hex::encode(Sha256::digest(tag));
    let archive = archive(entries, modified, about).map_err(Failure::internal)?;
    let (mut reply, range) = range::reply(request.headers(), &tag, archive.bytes, "the archive")?;
    warnings::add(&mut reply, &warning);
    let content = state.export_checks.watched(archive.content, &export);
    let (bytes, content) = match range {
        None => (archive.bytes, content),
        Some(range) => (range.end - range.start, range::part(content, range)),
    };
    Ok(reply
        .insert_header((CONTENT_TYPE, "application/x-tar"))
        .insert_header((CONTENT_ENCODING, "identity"))
        .insert_header(ContentDisposition::attachment(filename))
        .body(streaming::body(format!("the weights of {}", model.name), bytes, content)))
}

/// The object that `file` of an export is.
///
/// # Errors
/// `weights_not_available` for an export that is made while it is sent, `invalid_value` for a name
/// that it does not have.
fn stored_file(export: &Export, entries: &[Entry], file: &str) -> Result<ObjectKey, ApiError> {
    if !export.is_stored() {
        let message = "A merged model or a GGUF is made while it is sent and lies in no object store. \
                       Leave out 'redirect', or ask for format=adapter.";
        return Err(ApiError::new(ErrorCode::WeightsNotAvailable, message).with_param("redirect"));
    }
    if !entries.iter().any(|entry| entry.name == file) {
        let names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
        return Err(invalid_value("redirect", file, &format!("one of {}", names.join(", "))));
    }
    Ok(export.model.weights().file(file))
}

/// What the query asks of the numbers and files of a merged model; `None` where it says nothing.
fn merged_form(query: &Query, format: &str) -> Result<Option<MergedForm>, ApiError> {
    let dtype = query.word("dtype", &DTYPES)?;
    let max_shard_size = match query.text("max_shard_size") {
        Some(text) => parse_shard_size(text).ok_or_else(|| {
            invalid_value("max_shard_size", text, "a whole number of bytes, or as in 500MB or 5GB")
        })?,
        None => MAX_SHARD_SIZE,
    };
    let Some(name) =
        ["dtype", "max_shard_size"].into_iter().find(|name| query.text(name).is_some())
    else {
        return Ok(None);
    };
    let rule = match format {
        MERGED => {
            let dtype = FloatType::ALL.into_iter().find(|float| float.name() == dtype);
            return Ok(Some(MergedForm { dtype, max_shard_size }));
        }
        GGUF => {
            "left out, as it belongs to format=merged, and how a GGUF is stored is said by 'type'"
        }
        _ => {
            "left out, as weights come as they were trained unless format=merged is asked for, \
             which it belongs to"
        }
    };
    Err(invalid_value(name, query.text(name).unwrap_or_default(), rule))
}

/// How a model that was trained in full comes: as it is stored, unless something else is asked of it
/// or a file of it is larger than one should be.
async fn whole_form(
    store: &Store,
    model: &Model,
    format: &str,
    asked: Option<MergedForm>,
) -> Result<ExportForm, Failure> {
    if let Some(form) = asked {
        return Ok(ExportForm::Merged(form));
    }
    let is_cut = format == MERGED && {
        let files = stored::manifest(store.objects(), &model.weights()).await?;
        merged::is_beyond(&files, MAX_SHARD_SIZE)
    };
    Ok(if is_cut { ExportForm::Merged(MergedForm::default()) } else { ExportForm::Model })
}

/// How the matrices of a GGUF are stored.
fn storage(query: &Query, format: &str) -> Result<StorageType, ApiError> {
    let name = query.word("type", &StorageType::ALL.map(StorageType::name))?;
    if format != GGUF && query.text("type").is_some() {
        let rule = "left out, as it belongs to format=gguf; the numbers of a merged model are chosen \
                    by 'dtype'";
        return Err(invalid_value("type", name, rule));
    }
    let storage = StorageType::ALL.into_iter().find(|storage| storage.name() == name);
    Ok(storage.unwrap_or(StorageType::F16))
}

fn only_tuned(name: &str) -> ApiError {
    ApiError::new(
        ErrorCode::WeightsNotAvailable,
        format!(
            "The model '{name}' is a base model; only the weights of tuned models and their \
             checkpoints can be downloaded."
        ),
    )
    .with_param("model")
}

#[cfg(test)]
mod tests;
