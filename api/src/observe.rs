//! Around every request: its id, its span, one log line, and an error body in OpenAI's shape
//! whatever went wrong, a panic included.

use crate::failure::{self, Failure, invalid_value};
use crate::head;
use crate::limits::Standing;
use crate::server::AppState;
use crate::telemetry::Telemetry;
use actix_web::body::{BoxBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::error::InternalError;
use actix_web::guard::GuardContext;
use actix_web::http::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use actix_web::http::{Method, StatusCode, Uri};
use actix_web::middleware::Next;
use actix_web::{Error, HttpMessage as _, HttpResponse, web};
use futures::FutureExt as _;
use std::cell::OnceCell;
use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::time::Instant;
use tracing::field::Empty;
use tracing::{Instrument as _, Span};
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::ids::random_text;
use tunesmith_core::spans;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The middleware; the outermost one.
pub(crate) async fn observe<B: MessageBody + 'static>(
    mut request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let id = format!("req_{}", random_text(&mut rand::rng(), 24));
    let route = Route::default();
    request.extensions_mut().insert(route.clone());
    let line = Line {
        span: span(&request, &id),
        id,
        method: request.method().clone(),
        path: request.path().to_owned(),
        route,
        telemetry: request.app_data::<web::Data<AppState>>().map(|state| state.telemetry.clone()),
        started: Instant::now(),
    };
    if let Err(refused) = storable(request.uri()) {
        return Err(line.into_error(refused.into()));
    }
    if line.method == Method::HEAD {
        head::ask_as_get(&mut request);
    }
    // A handler owns nothing that outlives it but what the store guards by transactions.
    let replied = AssertUnwindSafe(next.call(request)).catch_unwind().instrument(line.span.clone());
    match replied.await {
        Ok(Ok(response)) => {
            line.log(response.status(), response.response().error());
            Ok(finish(response, &line))
        }
        Ok(Err(error)) => Err(line.into_error(error)),
        Err(panic) => Err(line.into_error(Failure::internal(panic_text(&*panic)).into())),
    }
}

/// The path as it was configured, once the request was found to have one: it outlives a request whose
/// handler panics. To ask actix-web beforehand would match all paths twice.
#[derive(Debug, Clone, Default)]
pub(crate) struct Route(Rc<OnceCell<Rc<str>>>);

impl Route {
    /// Notes that the request is one of `pattern`.
    pub(crate) fn found(request: &GuardContext<'_>, pattern: &Rc<str>) {
        if let Some(Self(route)) = request.req_data().get() {
            // A request has one path.
            let _ = route.set(Rc::clone(pattern));
        }
    }

    fn pattern(&self) -> Option<&str> {
        self.0.get().map(Rc::as_ref)
    }
}

/// The request's span, with the attributes that OpenTelemetry's conventions name. It ends when the
/// reply begins.
fn span(request: &ServiceRequest, id: &str) -> Span {
    let (method, path) = (request.method(), request.path());
    let span = tracing::info_span!(
        target: spans::TARGET,
        "request",
        otel.kind = "server",
        otel.name = %method,
        otel.status_code = Empty,
        http.request.method = %method,
        http.route = Empty,
        http.response.status_code = Empty,
        url.path = path,
        request_id = id,
    );
    #[cfg(feature = "otel")]
    crate::trace_context::join(&span, request.headers());
    span
}

/// Names and cursors of a URL are looked for in the database, which has no text with U+0000.
fn storable(uri: &Uri) -> Result<(), Failure> {
    if uri.path().contains("%00") || uri.query().is_some_and(|query| query.contains("%00")) {
        return Err(
            invalid_value("url", "text with %00", "text without the character U+0000").into()
        );
    }
    Ok(())
}

/// What the log says of one request.
struct Line {
    span: Span,
    id: String,
    method: Method,
    path: String,
    /// So that its figures do not grow with the ids.
    route: Route,
    telemetry: Option<Telemetry>,
    started: Instant,
}

impl Line {
    fn log(&self, status: StatusCode, error: Option<&Error>) {
        let Self { span, id, method, path, route, telemetry, started } = self;
        let _inside = span.enter();
        let elapsed = started.elapsed();
        let milliseconds = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        let status = status.as_u16();
        let route = route.pattern();
        span.record("http.response.status_code", status);
        if let Some(route) = route {
            span.record("http.route", route);
            #[cfg(feature = "otel")]
            crate::trace_context::rename(span, format!("{method} {route}"));
        }
        if status >= 500 {
            span.record("otel.status_code", "ERROR");
        }
        if let Some(telemetry) = telemetry {
            telemetry.count_request(method, route, status, elapsed);
        }
        match error {
            Some(error) if status >= 500 => tracing::error!(
                request_id = id, %method, path, status, milliseconds, %error, "request failed"
            ),
            _ => tracing::info!(request_id = id, %method, path, status, milliseconds, "request"),
        }
    }

    /// An error that already is its reply, with the id on it: no response was made to carry it.
    fn into_error(self, error: Error) -> Error {
        let mut reply = error.error_response();
        self.log(reply.status(), Some(&error));
        self.mark(&mut reply);
        InternalError::from_response(error, with_error_body(reply)).into()
    }

    fn mark<B>(&self, reply: &mut HttpResponse<B>) {
        // Letters, digits and an underscore: always a header value.
        if let Ok(id) = HeaderValue::from_str(&self.id) {
            reply.headers_mut().insert(X_REQUEST_ID, id);
        }
    }
}

fn finish<B: MessageBody + 'static>(
    response: ServiceResponse<B>,
    line: &Line,
) -> ServiceResponse<BoxBody> {
    let (request, mut reply) = response.into_parts();
    line.mark(&mut reply);
    if let Some(standing) = request.extensions().get::<Standing>() {
        for (name, value) in standing.headers() {
            reply.headers_mut().insert(name, value);
        }
    }
    let reply = with_error_body(reply.map_into_boxed_body());
    let is_head = line.method == Method::HEAD;
    ServiceResponse::new(request, if is_head { head::without_content(reply) } else { reply })
}

/// Errors that actix-web makes itself come as plain text or empty: they get the common shape.
fn with_error_body(reply: HttpResponse) -> HttpResponse {
    let status = reply.status();
    let is_json = reply.headers().get(CONTENT_TYPE).is_some_and(|kind| kind == "application/json");
    if !(status.is_client_error() || status.is_server_error()) || is_json {
        return reply;
    }
    let code = match status {
        StatusCode::NOT_FOUND => ErrorCode::UnknownUrl,
        StatusCode::METHOD_NOT_ALLOWED => ErrorCode::MethodNotAllowed,
        StatusCode::PAYLOAD_TOO_LARGE => ErrorCode::PayloadTooLarge,
        _ if status.is_server_error() => ErrorCode::Internal,
        _ => ErrorCode::InvalidBody,
    };
    let message = status.canonical_reason().unwrap_or("The request was refused.");
    let body = failure::wire(&ApiError::new(code, message)).to_string();
    let mut reply = reply.set_body(BoxBody::new(body));
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    reply
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned());
    format!("a handler panicked: {}", text.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use actix_web::App;
    use actix_web::middleware::from_fn;
    use actix_web::test::{TestRequest, init_service, try_call_service};

    async fn reply_of(path: &str) -> (StatusCode, Option<String>, serde_json::Value) {
        let app = init_service(
            App::new()
                .wrap(from_fn(observe))
                .route("/ok", web::get().to(|| async { HttpResponse::Ok().json("fine") }))
                .route("/boom", web::get().to(boom))
                .route("/plain", web::get().to(|| async { HttpResponse::BadRequest().body("x") })),
        )
        .await;
        let reply = match try_call_service(&app, TestRequest::get().uri(path).to_request()).await {
            Ok(response) => response.into_parts().1,
            Err(error) => error.error_response(),
        };
        let id = reply.headers().get(X_REQUEST_ID).map(|id| id.to_str().expect("text").to_owned());
        let status = reply.status();
        let body = actix_web::body::to_bytes(reply.into_body()).await.expect("body");
        (status, id, serde_json::from_slice(&body).expect("json"))
    }

    async fn boom() -> HttpResponse {
        panic!("the handler's bug")
    }

    #[actix_web::test]
    async fn every_reply_carries_an_id_of_its_own() {
        let (_, first, _) = reply_of("/ok").await;
        let (_, second, _) = reply_of("/ok").await;
        assert!(first.as_deref().is_some_and(|id| id.starts_with("req_")), "{first:?}");
        assert_ne!(first, second);
    }

    #[actix_web::test]
    async fn a_panic_is_a_500_in_the_common_shape() {
        let (status, id, body) = reply_of("/boom").await;
        assert_eq!(status, 500);
        assert!(id.is_some());
        assert_eq!(body["error"]["code"], "internal_error");
        assert!(!body.to_string().contains("bug"), "{body}");
    }

    #[actix_web::test]
    async fn an_error_that_is_not_json_gets_the_common_shape() {
        for (path, status, code) in [("/plain", 400, "invalid_body"), ("/no", 404, "unknown_url")] {
            let (got, _, body) = reply_of(path).await;
            assert_eq!(got, status);
            assert_eq!(body["error"]["code"], code);
            assert!(body["error"].get("param").is_some());
        }
    }
}
