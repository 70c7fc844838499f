//! `GET /v1/models/{name}/weights?format=adapter|merged|gguf`: a tuned model's or a checkpoint's
//! weights as a tar archive, written while it is sent, whole or one range of it.

use crate::archive::archive;
use crate::auth::Authenticated;
use crate::failure::{Failure, invalid_value};
use crate::query::Query;
use crate::routes::models::base_model;
use crate::server::AppState;
use crate::{gguf, merged, range, stored, streaming, warnings};
use actix_web::http::header::{CONTENT_ENCODING, CONTENT_TYPE, ContentDisposition};
use actix_web::{HttpRequest, HttpResponse, web};
use sha2::{Digest as _, Sha256};
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::gguf::StorageType;
use tunesmith_core::hyperparameters::AdapterType;
use tunesmith_store::StoreError;

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
    let model = match state.store.model(&caller.project_id, &name).await {
        Err(StoreError::NotFound { .. }) => {
            let base = base_model(&state, &name).await?;
            return Err(only_tuned(&base.name).into());
        }
        found => found?,
    };
    let mut warning = Vec::new();
    let entries = match (model.adapter.kind, format) {
        (_, GGUF) => gguf::entries(&state.store, &model, storage).await?,
        (AdapterType::Lora, MERGED) => merged::entries(&state.store, &model).await?,
        (AdapterType::Lora, _) => stored::entries(&state.store, &model).await?,
        (AdapterType::Full, format) => {
            if format == ADAPTER && query.text("format").is_some() {
                warning.push(
                    "The model was trained in full and has no adapter: these are all its weights."
                        .to_owned(),
                );
            }
            stored::entries(&state.store, &model).await?
        }
    };
    let modified = u64::try_from(model.created_at.unix_timestamp()).unwrap_or(0);
    let archive = archive(entries, modified).map_err(Failure::internal)?;
    let filename = format!("{}.tar", model.name.replace([':', '/'], "-"));
    // The same weights make the same archive, byte by byte.
    let tag = format!("{} {format} {} {modified}", model.place, storage.name());
    let tag = hex::encode(Sha256::digest(tag));
    let (mut reply, range) = range::reply(request.headers(), &tag, archive.bytes, "the archive")?;
    warnings::add(&mut reply, &warning);
    let (bytes, content) = match range {
        None => (archive.bytes, archive.content),
        Some(range) => (range.end - range.start, range::part(archive.content, range)),
    };
    Ok(reply
        .insert_header((CONTENT_TYPE, "application/x-tar"))
        .insert_header((CONTENT_ENCODING, "identity"))
        .insert_header(ContentDisposition::attachment(filename))
        .body(streaming::body(format!("the weights of {}", model.name), bytes, content)))
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
