//! Multipart forms: their parts, in any order, as they come.

use crate::failure::{Failure, broken_body, invalid_value};
use actix_multipart::{Field, Multipart};
use actix_web::http::header::CONTENT_LENGTH;
use actix_web::{HttpMessage as _, HttpRequest, web};
use bytes::Bytes;
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use tunesmith_core::errors::{ApiError, ErrorCode};

/// The largest field of text.
const MAX_FIELD_BYTES: usize = 64 << 10;
const MAX_FIELDS: usize = 64;
/// A refused form is read on to this many bytes past the cap: a client that is still sending would
/// not see the reply if the connection were closed at once.
const MAX_DRAIN_BYTES: usize = 64 << 20;

/// A form on its way.
pub(crate) struct Form {
    parts: Multipart,
    /// Fields that came.
    count: usize,
}

impl Form {
    /// The request's form. `fields` says which fields it should have.
    ///
    /// # Errors
    /// `invalid_body` for a body that is none: [`Multipart`] cannot be asked for more once it has
    /// said no.
    pub(crate) fn of(
        request: &HttpRequest,
        payload: web::Payload,
        fields: &str,
    ) -> Result<Self, Failure> {
        let mime = request.mime_type().ok().flatten();
        if mime.is_some_and(|m| m.type_() == "multipart" && m.get_param("boundary").is_some()) {
            let parts = Multipart::new(request.headers(), payload.into_inner());
            return Ok(Self { parts, count: 0 });
        }
        let message = format!("The request is not a form. Send multipart/form-data with {fields}.");
        Err(ApiError::new(ErrorCode::InvalidBody, message).into())
    }

    /// The next part.
    ///
    /// # Errors
    /// `invalid_body` for a body that breaks off or is badly framed.
    pub(crate) async fn part(&mut self) -> Result<Option<Field>, Failure> {
        Ok(self.parts.next().await.transpose().map_err(broken_body)?)
    }

    /// The next part of a form of a few fields, with its name.
    ///
    /// # Errors
    /// As [`Form::part`], and for more fields than any form has.
    pub(crate) async fn field(&mut self) -> Result<Option<(String, Field)>, Failure> {
        let Some(part) = self.part().await? else { return Ok(None) };
        self.count += 1;
        if self.count > MAX_FIELDS {
            return Err(broken_body(format!("more than {MAX_FIELDS} fields")).into());
        }
        Ok(Some((part.name().unwrap_or_default().to_owned(), part)))
    }

    /// Reads on, so that the client comes to the end of what it sends and to the reply.
    pub(crate) async fn drain(&mut self) {
        let mut read = 0;
        while let Some(Ok(mut part)) = self.parts.next().await {
            while let Ok(Some(piece)) = part.try_next().await {
                read += piece.len();
                if read > MAX_DRAIN_BYTES {
                    return;
                }
            }
        }
    }
}

/// The size that the client says its form has; 0 where it does not say.
pub(crate) fn announced_bytes(request: &HttpRequest) -> u64 {
    let length = request.headers().get(CONTENT_LENGTH);
    length.and_then(|length| length.to_str().ok()?.parse().ok()).unwrap_or(0)
}

/// A field of text.
///
/// # Errors
/// `invalid_value` for one that is too long or no text.
pub(crate) async fn text_of(mut part: Field, name: &str) -> Result<String, Failure> {
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

/// The content of a file. The form's own error cannot cross threads; its words can.
pub(crate) fn content_of(part: Field) -> impl Stream<Item = Result<Bytes, String>> {
    part.map_err(|error| error.to_string())
}
