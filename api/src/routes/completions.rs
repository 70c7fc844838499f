//! `/v1/chat/completions` and `/v1/completions`: models answer.

use crate::auth::Authenticated;
use crate::body::read_long_json;
use crate::failure::Failure;
use crate::routes::path;
use crate::server::AppState;
use crate::serving::{AnswerReply as _, AnswerRequest, ChatRequest, CompletionRequest};
use crate::warnings;
use actix_web::http::header::{CACHE_CONTROL, CONTENT_ENCODING, HeaderValue};
use actix_web::web::{self, ServiceConfig};
use actix_web::{HttpResponse, HttpResponseBuilder};

/// The paths of this group.
pub(crate) fn configure(config: &mut ServiceConfig) {
    config
        .service(path("/v1/chat/completions").post(answer::<ChatRequest>))
        .service(path("/v1/completions").post(answer::<CompletionRequest>));
}

/// `POST /v1/chat/completions` and `POST /v1/completions`
async fn answer<R: AnswerRequest>(
    state: web::Data<AppState>,
    caller: Authenticated,
    payload: web::Payload,
) -> Result<HttpResponse, Failure> {
    let request = R::parse(&read_long_json(payload).await?.fields)?;
    let mut answers = request.begin(&state.serving, &caller.project_id, false).await?;
    let mut reply = HttpResponse::Ok();
    warnings::add(&mut reply, request.warnings());
    if !request.streams() {
        return Ok(reply.json(answers.whole().await?));
    }
    answers.wait_for_first().await?;
    Ok(event_stream(&mut reply).streaming(answers.stream()))
}

fn event_stream(reply: &mut HttpResponseBuilder) -> &mut HttpResponseBuilder {
    reply
        .content_type("text/event-stream")
        .insert_header((CACHE_CONTROL, HeaderValue::from_static("no-cache")))
        // A compressor would hold events back.
        .insert_header((CONTENT_ENCODING, HeaderValue::from_static("identity")))
}

#[cfg(test)]
mod tests;
