//! `POST /v1/files`: a multipart form whose fields come in any order; the content streams into
//! the object store as it comes.

use crate::auth::Authenticated;
use crate::failure::{Failure, invalid_value, missing};
use crate::form::{Form, announced_bytes, content_of, text_of};
use crate::idempotency::idempotency;
use crate::routes::files::FileObject;
use crate::server::AppState;
use crate::warnings;
use actix_multipart::Field;
use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::{Value, json};
use std::time::Duration;
use tunesmith_core::errors::ApiError;
use tunesmith_core::ids::FileId;
use tunesmith_store::files::{FileFacts, Purpose};
use tunesmith_store::objects::{ObjectKey, Stored};

/// The name that the SDKs send for raw bytes; also that of a part without one.
const UNNAMED: &str = "upload";
pub(crate) const MAX_FILENAME: usize = 255;
/// OpenAI's limits: an hour to thirty days.
pub(crate) const EXPIRES_AFTER_SECONDS: std::ops::RangeInclusive<u64> = 3600..=2_592_000;

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
    let mut form = Form::of(&request, payload, "the fields 'file' and 'purpose'")?;
    // What the file is to be is known at its end; whether the header is in order, now.
    let asked = idempotency(&request, [0; 32])?;
    state.require_storage(&caller.project_id, announced_bytes(&request)).await?;
    let mut upload = Upload { id: state.store.begin_file(&caller.project_id).await?, stored: None };
    match upload.receive(&state, &mut form).await {
        Ok((facts, stored, unknown)) => {
            let asked = asked.of(&wish(&facts, &stored));
            let id = &upload.id;
            let file = state.store.finish_file(&caller, id, &facts, &stored, &asked).await?;
            let mut reply = HttpResponse::Ok();
            warnings::add(&mut reply, unknown.as_slice());
            Ok(reply.json(FileObject::from(&file)))
        }
        Err(failure) => {
            // What the client did wrong is its reply; that litter stays is for the log.
            if let Err(error) = state.store.abandon_file(&upload.id).await {
                tracing::warn!(%error, file = %upload.id, "a refused upload could not be removed");
            }
            form.drain().await;
            Err(failure)
        }
    }
}

/// Tells one wish for a file from another. A form's bytes do not: what parts it is another each time.
fn wish(facts: &FileFacts, stored: &Stored) -> Value {
    let FileFacts { filename, purpose, expires_after } = facts;
    let seconds = expires_after.map(|duration| duration.as_secs());
    json!([stored.sha256, filename, purpose.as_str(), seconds])
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
        form: &mut Form,
    ) -> Result<(FileFacts, Stored, Option<String>), Failure> {
        let mut fields = Fields::default();
        while let Some((name, part)) = form.field().await? {
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
        let content = content_of(part);
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
