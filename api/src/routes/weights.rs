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
use crate::{range, redirect, streaming, warnings};
use actix_web::http::header::{CONTENT_ENCODING, CONTENT_TYPE, ContentDisposition};
use actix_web::{HttpRequest, HttpResponse, web};
use sha2::{Digest as _, Sha256};
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::export_check::ExportForm;
use tunesmith_core::gguf::StorageType;
use tunesmith_core::hyperparameters::AdapterType;
use tunesmith_store::StoreError;
use tunesmith_store::objects::ObjectKey;

pub(super) const ADAPTER: &str = "adapter";
pub(super) const MERGED: &str = "merged";
pub(super) const GGUF: &str = "gguf";

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
        (AdapterType::Lora, MERGED) => ExportForm::Model,
        (AdapterType::Lora, _) => ExportForm::Adapter,
        (AdapterType::Full, format) => {
            if format == ADAPTER && query.text("format").is_some() {
                warning.push(
                    "The model was trained in full and has no adapter: these are all its weights."
                        .to_owned(),
                );
            }
            ExportForm::Model
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
    let Export { model, .. } = &export;
    let modified = export.modified();
    let filename = format!("{}.tar", model.name.replace([':', '/'], "-"));
    // The same weights make the same archive, byte by byte, and so does the same check.
    let check_json = serde_json::to_string(&check).map_err(Failure::internal)?;
    let tag = format!("{} {format} {} {modified} {check_json}", model.place, storage.name());
    let tag = hex::encode(Sha256::digest(tag));
    let archive = archive(entries, modified, check).map_err(Failure::internal)?;
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

/// How the matrices of a GGUF are stored.
fn storage(query: &Query, format: &str) -> Result<StorageType, ApiError> {
    let name = query.word("type", &StorageType::ALL.map(StorageType::name))?;
    if format != GGUF && query.text("type").is_some() {
        return Err(invalid_value("type", name, "left out, as it belongs to format=gguf"));
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
