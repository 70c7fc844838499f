//! `POST /v1/files`: a multipart form whose fields come in any order; the content streams into
//! the object store as it comes.

use crate::auth::Authenticated;
use crate::failure::{Failure, broken_body, invalid_value, missing};
use crate::routes::files::FileObject;
use crate::server::AppState;
use crate::warnings;
use actix_multipart::{Field, Multipart};
use actix_web::http::header::CONTENT_LENGTH;
use actix_web::{HttpMessage as _, HttpRequest, HttpResponse, web};
use futures::{StreamExt as _, TryStreamExt as _};
use std::time::Duration;
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::ids::FileId;
use tunesmith_store::files::{FileFacts, Purpose};
use tunesmith_store::objects::{ObjectKey, Stored};

/// The name that the SDKs send for raw bytes; also that of a part without one.
const UNNAMED: &str = "upload";
pub(crate) const MAX_FILENAME: usize = 255;
/// The largest field beside the file.
const MAX_FIELD_BYTES: usize = 64 << 10;
pub(super) const MAX_FIELDS: usize = 64;
/// OpenAI's limits: an hour to thirty days.
pub(crate) const EXPIRES_AFTER_SECONDS: std::ops::RangeInclusive<u64> = 3600..=2_592_000;
/// A refused upload is read on to this many bytes past the cap: a client that is still sending
/// would not see the reply if the connection were closed at once.
const MAX_DRAIN_BYTES: usize = 64 << 20;

/// What a client may upload a file for; other purposes are for files that the service makes.
pub(super) const UPLOAD_PURPOSES: [Purpose; 6] = [
    Purpose::FineTune,
    Purpose::Batch,
    Purpose::Assistants,
    Purpose::Vision,
    Purpose::UserData,
    Purpose::Evals,
];

/// Stores a file.
pub(crate) async fn create(
    request: HttpRequest,
    state: web::Data<AppState>,
    caller: Authenticated,
    payload: web::Payload,
) -> Result<HttpResponse, Failure> {
    if !is_form(&request) {
        return Err(not_a_form("the fields 'file' and 'purpose'"));
    }
    let announced =
        request.headers().get(CONTENT_LENGTH).and_then(|it| it.to_str().ok()?.parse().ok());
    state.require_storage(&caller.project_id, announced.unwrap_or(0)).await?;
    let mut upload = Upload { id: state.store.begin_file(&caller.project_id).await?, stored: None };
    let mut form = Multipart::new(request.headers(), payload.into_inner());
    match upload.receive(&state, &mut form).await {
        Ok((facts, stored, unknown)) => {
            let file = state.store.finish_file(&upload.id, &facts, &stored).await?;
            let mut reply = HttpResponse::Ok();
            warnings::add(&mut reply, unknown.as_slice());
            Ok(reply.json(FileObject::from(&file)))
        }
        Err(failure) => {
            // What the client did wrong is its reply; that litter stays is for the log.
            if let Err(error) = state.store.abandon_file(&upload.id).await {
                tracing::warn!(%error, file = %upload.id, "a refused upload could not be removed");
            }
            drain(&mut form).await;
            Err(failure)
        }
    }
}

/// A file that is on its way.
struct Upload {
    id: FileId,
    /// The content and the name it came with, once it is here.
    stored: Option<(Stored, String)>,
}

/// The fields beside the content.
#[derive(Default)]
struct Fields {
    purpose: Option<Purpose>,
    expires_after: Option<Duration>,
    unknown: Vec<String>,
}

impl Upload {
    async fn receive(
        &mut self,
        state: &AppState,
        form: &mut Multipart,
    ) -> Result<(FileFacts, Stored, Option<String>), Failure> {
        let mut fields = Fields::default();
        let mut count = 0;
        while let Some(part) = form.next().await {
            let part = part.map_err(broken_body)?;
            count += 1;
            if count > MAX_FIELDS {
                return Err(broken_body(format!("more than {MAX_FIELDS} fields")).into());
            }
            let name = part.name().unwrap_or_default().to_owned();
            if name == "file" {
                self.store_content(state, part).await?;
            } else {
                fields.read(&name, &text_of(part, &name).await?)?;
            }
        }
        let (stored, filename) = self.stored.take().ok_or_else(|| missing("file"))?;
        let facts = FileFacts {
            filename,
            purpose: fields.purpose.ok_or_else(|| missing("purpose"))?,
            expires_after: fields.expires_after,
        };
        Ok((facts, stored, warnings::unknown_fields(&fields.unknown)))
    }

    async fn store_content(&mut self, state: &AppState, part: Field) -> Result<(), Failure> {
        if self.stored.is_some() {
            return Err(invalid_value("file", "given twice", "one file").into());
        }
        let filename = filename_of(&part);
        // The form's own error cannot cross threads; its words can.
        let content = part.map_err(|error| error.to_string());
        let key = ObjectKey::File(self.id.clone());
        let stored = state.store.objects().put_stream(&key, content, state.max_file_bytes).await?;
        self.stored = Some((stored, filename));
        Ok(())
    }
}

impl Fields {
    fn read(&mut self, name: &str, value: &str) -> Result<(), ApiError> {
        match name {
            "purpose" => self.purpose = Some(purpose(value)?),
            "expires_after[anchor]" if value != "created_at" => {
                return Err(invalid_value(name, value, "\"created_at\""));
            }
            "expires_after[anchor]" => {}
            "expires_after[seconds]" => {
                let seconds = value.trim().parse().ok();
                let seconds = seconds.filter(|seconds| EXPIRES_AFTER_SECONDS.contains(seconds));
                let seconds = seconds.ok_or_else(|| {
                    let (low, high) = EXPIRES_AFTER_SECONDS.into_inner();
                    invalid_value(name, value, &format!("a whole number between {low} and {high}"))
                })?;
                self.expires_after = Some(Duration::from_secs(seconds));
            }
            other => self.unknown.push(other.to_owned()),
        }
        Ok(())
    }
}

/// What a client may upload a file for.
///
/// # Errors
/// `invalid_value` with the words there are.
pub(crate) fn purpose(word: &str) -> Result<Purpose, ApiError> {
    Purpose::parse(word.trim()).filter(|purpose| UPLOAD_PURPOSES.contains(purpose)).ok_or_else(
        || {
            let words = UPLOAD_PURPOSES.map(Purpose::as_str).join(", ");
            invalid_value("purpose", word, &format!("one of {words}"))
        },
    )
}

pub(super) async fn text_of(mut part: Field, name: &str) -> Result<String, Failure> {
    let bytes = match part.bytes(MAX_FIELD_BYTES).await {
        Ok(bytes) => bytes.map_err(broken_body)?,
        Err(_) => {
            let rule = format!("at most {MAX_FIELD_BYTES} bytes");
            return Err(invalid_value(name, "too long", &rule).into());
        }
    };
    String::from_utf8(bytes.into())
        .map_err(|_| invalid_value(name, "not UTF-8", "text in UTF-8").into())
}

fn filename_of(part: &Field) -> String {
    let given = part.content_disposition().and_then(|disposition| disposition.get_filename());
    filename(given.unwrap_or_default())
}

/// The last part of the name that the client gave: some send a whole path.
pub(crate) fn filename(given: &str) -> String {
    let name = given.rsplit(['/', '\\']).next().unwrap_or_default();
    let name: String = name.chars().filter(|c| !c.is_control()).take(MAX_FILENAME).collect();
    if name.is_empty() { UNNAMED.to_owned() } else { name }
}

/// Whether the body is what [`Multipart`] can read; it cannot be asked for more once it has said no.
pub(crate) fn is_form(request: &HttpRequest) -> bool {
    let mime = request.mime_type().ok().flatten();
    mime.is_some_and(|m| m.type_() == "multipart" && m.get_param("boundary").is_some())
}

/// The reply to a body that is no form with `fields`.
pub(crate) fn not_a_form(fields: &str) -> Failure {
    let message = format!("The request is not a form. Send multipart/form-data with {fields}.");
    ApiError::new(ErrorCode::InvalidBody, message).into()
}

/// Reads on, so that the client comes to the end of what it sends and to the reply.
pub(crate) async fn drain(form: &mut Multipart) {
    let mut read = 0;
    while let Some(Ok(mut part)) = form.next().await {
        while let Ok(Some(piece)) = part.try_next().await {
            read += piece.len();
            if read > MAX_DRAIN_BYTES {
                return;
            }
        }
    }
}
