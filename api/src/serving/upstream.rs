//! An order at a sampler: which sampler takes it, and what it says.

use super::Serving;
use crate::failure::{Failure, model_not_served};
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use rand::seq::SliceRandom as _;
use reqwest::StatusCode;
use std::io;
use std::time::Duration;
use tokio_util::codec::{FramedRead, LinesCodec};
use tokio_util::io::StreamReader;
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::serving::{SAMPLE_PATH, SampleLine, SampleOrder};
use tunesmith_store::samplers::Sampler;

/// Far over a token with its alternatives.
const MAX_LINE_BYTES: usize = 64 << 10;
/// When one comes back to samplers that are all busy.
const BUSY_WAIT: Duration = Duration::from_secs(1);

/// An order that a sampler has taken. Dropping it cancels the order.
pub(super) struct Upstream {
    lines: FramedRead<StreamReader<BoxStream<'static, io::Result<Bytes>>, Bytes>, LinesCodec>,
}

/// What one sampler says to an order.
enum Asked {
    Taken(Upstream),
    /// It has no place for it.
    Busy,
    /// It is not there any more.
    Gone,
    Refused(ApiError),
}

impl Serving {
    /// Finds a sampler that takes the order; one that has the model in memory comes first.
    ///
    /// # Errors
    /// `model_not_served` where no sampler is there, `rate_limit_exceeded` where none has room,
    /// what a sampler says against the order, and those of the store.
    pub(super) async fn order(
        &self,
        model: &str,
        order: &SampleOrder,
    ) -> Result<Upstream, Failure> {
        let mut samplers = self.store.live_samplers().await?;
        samplers.shuffle(&mut rand::rng());
        let wanted = order.in_memory();
        samplers.sort_by_key(|sampler| !sampler.models.contains(&wanted));
        let mut is_busy = false;
        for sampler in &samplers {
            match self.ask(sampler, order).await {
                Asked::Taken(upstream) => return Ok(upstream),
                Asked::Busy => is_busy = true,
                Asked::Gone => tracing::warn!(sampler = %sampler.id, "a sampler does not answer"),
                Asked::Refused(error) => return Err(error.into()),
            }
        }
        if is_busy {
            let message = "Every sampler has as many requests as it takes. Try again in a moment.";
            let error = ApiError::new(ErrorCode::RateLimitExceeded, message);
            return Err(Failure::retry_after(error, BUSY_WAIT));
        }
        Err(model_not_served(model).into())
    }

    async fn ask(&self, sampler: &Sampler, order: &SampleOrder) -> Asked {
        let url = format!("{}{SAMPLE_PATH}", sampler.url);
        let sent = self.http.post(url).bearer_auth(&sampler.token).json(order).send().await;
        let reply = match sent {
            Ok(reply) => reply,
            Err(error) => {
                tracing::warn!(sampler = %sampler.id, %error, "an order did not reach its sampler");
                return Asked::Gone;
            }
        };
        match reply.status() {
            StatusCode::OK => {
                let pieces = reply.bytes_stream().map_err(io::Error::other).boxed();
                let codec = LinesCodec::new_with_max_length(MAX_LINE_BYTES);
                Asked::Taken(Upstream { lines: FramedRead::new(StreamReader::new(pieces), codec) })
            }
            StatusCode::TOO_MANY_REQUESTS => Asked::Busy,
            // Its address is another process's by now.
            StatusCode::UNAUTHORIZED | StatusCode::NOT_FOUND => Asked::Gone,
            status => Asked::Refused(reply.json().await.unwrap_or_else(|_| {
                let message = format!("The sampler answered with status {status}.");
                ApiError::new(ErrorCode::SamplerFailed, message)
            })),
        }
    }
}

impl Upstream {
    /// What the sampler says next. May be dropped and called again.
    ///
    /// # Errors
    /// `sampler_failed` where it falls silent or hangs up before the order's end.
    pub(super) async fn next(&mut self) -> Result<SampleLine, ApiError> {
        let failed = |reason: String| {
            let message = format!("The sampler broke off: {reason}. Send the request again.");
            ApiError::new(ErrorCode::SamplerFailed, message)
        };
        match self.lines.next().await {
            Some(Ok(line)) => {
                serde_json::from_str(&line).map_err(|error| failed(format!("{error}")))
            }
            Some(Err(error)) => Err(failed(error.to_string())),
            None => Err(failed("it hung up".to_owned())),
        }
    }
}
