//! `/v1/uploads`: files that come in parts, for what is too large or too slow for one request.

use crate::auth::Authenticated;
use crate::body::read_json;
use crate::failure::{Failure, invalid_value, missing};
use crate::fields::{self, given, required, text};
use crate::form::{Form, content_of};
use crate::idempotency::idempotency;
use crate::routes::file_upload::{self, EXPIRES_AFTER_SECONDS};
use crate::routes::files::FileObject;
use crate::server::AppState;
use actix_web::{HttpRequest, HttpResponse, web};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value};
use std::time::Duration;
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::ids::UploadId;
use tunesmith_store::StoreError;
use tunesmith_store::files::FileFacts;
use tunesmith_store::idempotency::Idempotency;
use tunesmith_store::tenants::Caller;
use tunesmith_store::uploads::{NewUpload, Upload, UploadPart};

/// OpenAI's limit for a file in parts: 8 GB.
pub(super) const MAX_UPLOAD_BYTES: u64 = 8 << 30;
pub(super) const MAX_MIME_TYPE: usize = 255;
/// What a client may send to begin one.
const FIELDS: [&str; 5] = ["bytes", "filename", "mime_type", "purpose", "expires_after"];

/// An upload on the wire.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct UploadObject {
    id: String,
    object: &'static str,
    bytes: u64,
    created_at: i64,
    expires_at: i64,
    filename: String,
    purpose: &'static str,
    status: &'static str,
    file: Option<FileObject>,
}

/// A part on the wire.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct PartObject {
    id: String,
    object: &'static str,
    created_at: i64,
    upload_id: String,
}

impl From<UploadPart> for PartObject {
    fn from(part: UploadPart) -> Self {
        Self {
            id: part.id.to_string(),
            object: "upload.part",
            created_at: part.created_at.unix_timestamp(),
            upload_id: part.upload_id.to_string(),
        }
    }
}

/// The upload with the file that came of it.
async fn shown(state: &AppState, caller: &Caller, upload: Upload) -> Result<UploadObject, Failure> {
    let file = match &upload.file_id {
        None => None,
        Some(id) => match state.store.file(&caller.project_id, id).await {
            Ok(file) => Some(FileObject::from(&file)),
            // Deleted since.
            Err(StoreError::NotFound { .. }) => None,
            Err(other) => return Err(other.into()),
        },
    };
    Ok(UploadObject {
        id: upload.id.to_string(),
        object: "upload",
        bytes: upload.bytes,
        created_at: upload.created_at.unix_timestamp(),
        expires_at: upload.expires_at.unix_timestamp(),
        filename: upload.filename,
        purpose: upload.purpose.as_str(),
        status: upload.status.as_str(),
        file,
    })
}

/// `POST /v1/uploads`
pub(crate) async fn create(
    request: HttpRequest,
    state: web::Data<AppState>,
    caller: Authenticated,
    payload: web::Payload,
) -> Result<HttpResponse, Failure> {
    let body = read_json(payload).await?;
    let new = new_upload(&body.fields)?;
    let idempotency = idempotency(&request, body.sha256)?;
    state.require_storage(&caller.project_id, new.bytes).await?;
    let upload = state.store.create_upload(&caller, &new, &idempotency).await?;
    Ok(body.reply(&FIELDS).json(shown(&state, &caller, upload).await?))
}

fn new_upload(fields: &Map<String, Value>) -> Result<NewUpload, ApiError> {
    let bytes = fields::integer(fields, "bytes", 0..=MAX_UPLOAD_BYTES)?;
    let mime_type = required(fields, "mime_type")?;
    if mime_type.len() > MAX_MIME_TYPE {
        let rule = format!("at most {MAX_MIME_TYPE} bytes");
        return Err(invalid_value("mime_type", "too long", &rule));
    }
    Ok(NewUpload {
        file: FileFacts {
            filename: file_upload::filename(&required(fields, "filename")?),
            purpose: file_upload::purpose(&required(fields, "purpose")?)?,
            expires_after: expires_after(fields, "expires_after")?,
        },
        mime_type,
        bytes: bytes.ok_or_else(|| missing("bytes"))?,
    })
}

/// `expires_after` of a JSON body, or a field like it: how long a file is kept.
pub(crate) fn expires_after(
    fields: &Map<String, Value>,
    name: &str,
) -> Result<Option<Duration>, ApiError> {
    let Some(value) = given(fields, name) else { return Ok(None) };
    let (low, high) = EXPIRES_AFTER_SECONDS.into_inner();
    let seconds = fields::count(&value["seconds"]).filter(|seconds| (low..=high).contains(seconds));
    match (value["anchor"].as_str(), seconds) {
        (Some("created_at"), Some(seconds)) => Ok(Some(Duration::from_secs(seconds))),
        _ => {
            let rule = format!(
                "{{\"anchor\": \"created_at\", \"seconds\": …}} with a whole number of seconds \
                 between {low} and {high}"
            );
            Err(invalid_value(name, value, &rule))
        }
    }
}

/// `POST /v1/uploads/{id}/parts`: a form whose field `data` streams into the object store.
pub(crate) async fn add_part(
    request: HttpRequest,
    state: web::Data<AppState>,
    caller: Authenticated,
    id: web::Path<String>,
    payload: web::Payload,
) -> Result<web::Json<PartObject>, Failure> {
    let mut form = Form::of(&request, payload, "the field 'data'")?;
    let upload = UploadId::from(id.into_inner());
    // What is asked for is known when the content is here; whether the header is in order, now.
    let asked = idempotency(&request, [0; 32])?;
    let part = receive(&state, &caller, &upload, &mut form, &asked).await;
    // Also fields that nothing reads.
    form.drain().await;
    Ok(web::Json(part?.into()))
}

async fn receive(
    state: &AppState,
    caller: &Caller,
    upload: &UploadId,
    form: &mut Form,
    asked: &Idempotency,
) -> Result<UploadPart, Failure> {
    while let Some(part) = form.part().await? {
        if part.name() != Some("data") {
            continue;
        }
        let content = content_of(part);
        return match state.store.add_upload_part(caller, upload, content, asked).await {
            Err(StoreError::TooLarge { cap }) => Err(ApiError::new(
                ErrorCode::PayloadTooLarge,
                format!("The part is over the {cap} bytes that the whole upload was to have."),
            )
            .with_param("data")
            .into()),
            other => Ok(other?),
        };
    }
    Err(missing("data").into())
}

/// `POST /v1/uploads/{id}/complete`
pub(crate) async fn complete(
    state: web::Data<AppState>,
    caller: Authenticated,
    id: web::Path<String>,
    payload: web::Payload,
) -> Result<HttpResponse, Failure> {
    let body = read_json(payload).await?;
    let parts = fields::texts(&body.fields, "part_ids")?.ok_or_else(|| missing("part_ids"))?;
    let md5 = text(&body.fields, "md5")?;
    let md5 = md5.as_deref();
    if let Some(wrong) = md5.filter(|md5| hex::decode(md5).map_or(true, |sum| sum.len() != 16)) {
        return Err(invalid_value("md5", wrong, "32 hexadecimal digits").into());
    }
    let id = UploadId::from(id.into_inner());
    let upload = state.store.complete_upload(&caller.project_id, &id, &parts, md5).await?;
    Ok(body.reply(&["part_ids", "md5"]).json(shown(&state, &caller, upload).await?))
}

/// `POST /v1/uploads/{id}/cancel`
pub(crate) async fn cancel(
    state: web::Data<AppState>,
    caller: Authenticated,
    id: web::Path<String>,
) -> Result<web::Json<UploadObject>, Failure> {
    let id = UploadId::from(id.into_inner());
    let upload = state.store.cancel_upload(&caller.project_id, &id).await?;
    Ok(web::Json(shown(&state, &caller, upload).await?))
}

#[cfg(test)]
mod tests;
