//! `/v1/chat/completions` and `/v1/completions`: models answer.

use crate::auth::Authenticated;
use crate::body::read_long_json;
use crate::failure::Failure;
use crate::routes::path;
use crate::server::AppState;
use crate::serving::{ChatAnswer, ChatRequest, CompletionAnswer, CompletionRequest};
use crate::warnings;
use actix_web::http::header::{CACHE_CONTROL, CONTENT_ENCODING, HeaderValue};
use actix_web::web::{self, ServiceConfig};
use actix_web::{HttpResponse, HttpResponseBuilder};

/// The paths of this group.
pub(crate) fn configure(config: &mut ServiceConfig) {
    config
        .service(path("/v1/chat/completions").post(chat))
        .service(path("/v1/completions").post(complete));
}

/// `POST /v1/chat/completions`
async fn chat(
    state: web::Data<AppState>,
    caller: Authenticated,
    payload: web::Payload,
) -> Result<HttpResponse, Failure> {
    let request = ChatRequest::parse(&read_long_json(payload).await?.fields)?;
    let project = &caller.project_id;
    let mut answer = ChatAnswer::begin(&state.serving, project, &request, false).await?;
    let mut reply = HttpResponse::Ok();
    warnings::add(&mut reply, request.warnings());
    if !request.streams() {
        return Ok(reply.json(answer.whole().await?));
    }
    answer.wait_for_first().await?;
    Ok(event_stream(&mut reply).streaming(answer.stream()))
}

/// `POST /v1/completions`
async fn complete(
    state: web::Data<AppState>,
    caller: Authenticated,
    payload: web::Payload,
) -> Result<HttpResponse, Failure> {
    let request = CompletionRequest::parse(&read_long_json(payload).await?.fields)?;
    let project = &caller.project_id;
    let mut answer = CompletionAnswer::begin(&state.serving, project, &request, false).await?;
    let mut reply = HttpResponse::Ok();
    warnings::add(&mut reply, request.warnings());
    if !request.streams() {
        return Ok(reply.json(answer.whole().await?));
    }
    answer.wait_for_first().await?;
    Ok(event_stream(&mut reply).streaming(answer.stream()))
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
