//! Orders of front-ends over HTTP: who may send one, how many there may be, and what they hear.

use crate::check;
use crate::model::{Asked, ToModel};
use crate::models::Models;
use actix_web::http::header::{AUTHORIZATION, CONTENT_ENCODING, HeaderValue, RETRY_AFTER};
use actix_web::web::{self, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse};
use bytes::Bytes;
use futures::{Stream, stream};
use sha2::{Digest as _, Sha256};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::export_check::CHECK_PATH;
use tunesmith_core::serving::{
    MAX_ORDER_BYTES, SAMPLE_PATH, SAY_EVERY_SECONDS, SampleLine, SampleOrder,
};

/// What a handler sees.
pub(crate) struct Desk {
    pub(crate) models: Arc<Models>,
    token_sha256: [u8; 32],
    places: Arc<Semaphore>,
    /// One for the export that is being checked.
    pub(crate) checks: Semaphore,
    next_id: AtomicU64,
}

impl Desk {
    /// A desk that lets in who shows `token`, with room for so many orders.
    pub(crate) fn new(models: Arc<Models>, token: &str, max_orders: usize) -> Self {
        Self {
            models,
            token_sha256: Sha256::digest(token).into(),
            places: Arc::new(Semaphore::new(max_orders)),
            checks: Semaphore::new(1),
            next_id: AtomicU64::new(0),
        }
    }

    /// Lets in who shows the token, and says why it refuses others. Hashes are compared, and to
    /// their end, so that the time it takes tells nothing of the token.
    fn let_in(&self, request: &HttpRequest) -> Result<(), ApiError> {
        let header = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let shown = header.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
        let shown: [u8; 32] = Sha256::digest(shown).into();
        let differences =
            shown.iter().zip(&self.token_sha256).fold(0, |found, (a, b)| found | (a ^ b));
        if std::hint::black_box(differences) == 0 {
            return Ok(());
        }
        Err(ApiError::new(ErrorCode::InvalidApiKey, "This is no front-end's token."))
    }
}

/// The two paths.
pub(crate) fn configure(config: &mut ServiceConfig) {
    config.route(SAMPLE_PATH, web::post().to(sample));
    config.route(CHECK_PATH, web::post().to(check_export));
}

async fn check_export(
    desk: web::Data<Desk>,
    request: HttpRequest,
    payload: web::Payload,
) -> HttpResponse {
    match desk.let_in(&request) {
        Ok(()) => check::check(&desk, payload).await,
        Err(error) => refusal(&error),
    }
}

async fn sample(
    desk: web::Data<Desk>,
    request: HttpRequest,
    payload: web::Payload,
) -> HttpResponse {
    if let Err(error) = desk.let_in(&request) {
        return refusal(&error);
    }
    let order = match payload.to_bytes_limited(MAX_ORDER_BYTES).await {
        Ok(Ok(body)) => serde_json::from_slice::<SampleOrder>(&body).map_err(|e| e.to_string()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("it is over {MAX_ORDER_BYTES} bytes")),
    };
    let order = match order {
        Ok(order) if order.n == 0 || order.prompt.is_empty() || order.sampling.max_tokens == 0 => {
            let message = "An order needs a prompt, an answer and a token to give.";
            return refusal(&ApiError::new(ErrorCode::InvalidValue, message));
        }
        Ok(order) => order,
        Err(reason) => {
            let message = format!("This is no order: {reason}.");
            return refusal(&ApiError::new(ErrorCode::InvalidBody, message));
        }
    };
    let Ok(place) = Arc::clone(&desk.places).try_acquire_owned() else {
        let message = "The sampler has as many requests as it takes. Try again in a moment.";
        return refusal(&ApiError::new(ErrorCode::RateLimitExceeded, message));
    };
    let id = desk.next_id.fetch_add(1, Ordering::Relaxed);
    let (lines, said) = mpsc::unbounded_channel();
    let left = order.n;
    let model = desk.models.ask(Asked { id, order, lines });
    let answer = Answer { id, said, model, left, _place: place };
    HttpResponse::Ok()
        .content_type("application/x-ndjson")
        // A compressor would hold lines back.
        .insert_header((CONTENT_ENCODING, HeaderValue::from_static("identity")))
        .streaming(answer.stream())
}

fn refusal(error: &ApiError) -> HttpResponse {
    let status = actix_web::http::StatusCode::from_u16(error.code.http_status())
        .unwrap_or(actix_web::http::StatusCode::INTERNAL_SERVER_ERROR);
    let mut reply = HttpResponse::build(status);
    if error.code == ErrorCode::RateLimitExceeded {
        reply.insert_header((RETRY_AFTER, "1"));
    }
    reply.json(error)
}

/// An order under way. Dropping it before its end, as happens when the front-end hangs up, cancels
/// the order.
struct Answer {
    id: u64,
    said: mpsc::UnboundedReceiver<SampleLine>,
    model: mpsc::UnboundedSender<ToModel>,
    /// Answers that are not complete.
    left: u32,
    _place: OwnedSemaphorePermit,
}

impl Answer {
    fn stream(self) -> impl Stream<Item = Result<Bytes, Infallible>> {
        stream::unfold(self, |mut answer| async move {
            let text = answer.next().await?;
            Some((Ok(text), answer))
        })
    }

    /// What to send next: all lines that are there; none when the order has come to its end.
    async fn next(&mut self) -> Option<Bytes> {
        if self.left == 0 {
            return None;
        }
        let wait = Duration::from_secs(SAY_EVERY_SECONDS);
        let mut line = match tokio::time::timeout(wait, self.said.recv()).await {
            Err(_elapsed) => SampleLine::Waiting,
            Ok(Some(line)) => line,
            // It died with the order on its way.
            Ok(None) => SampleLine::Failed {
                error: ApiError::new(
                    ErrorCode::SamplerFailed,
                    "The model's process has just ended. The next request starts it again.",
                ),
            },
        };
        let mut text = Vec::new();
        loop {
            match &line {
                SampleLine::End { .. } => self.left -= 1,
                SampleLine::Failed { .. } => self.left = 0,
                SampleLine::Waiting | SampleLine::Token { .. } => {}
            }
            // Numbers and text are always JSON.
            let _ = serde_json::to_writer(&mut text, &line);
            text.push(b'\n');
            match self.said.try_recv() {
                Ok(next) if self.left > 0 => line = next,
                _ => return Some(text.into()),
            }
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if self.left > 0 {
            let _ = self.model.send(ToModel::Cancel(self.id));
        }
    }
}
