//! What one project may ask of the server: how many requests a minute, how many jobs at one time,
//! how much storage.

use actix_web::http::header::{HeaderName, HeaderValue};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::ids::ProjectId;

const MINUTE: f64 = 60.0;
/// Buckets of projects that were not heard of for long are full, and forgotten beyond this many.
const MAX_BUCKETS: usize = 10_000;

/// The limits of each project; none where it is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProjectLimits {
    /// Requests a minute to one API process. As many may come at once after a minute's rest.
    pub requests_per_minute: Option<u32>,
    /// Jobs that have not ended, at one time.
    pub unfinished_jobs: Option<u64>,
    /// Bytes of files, at one time.
    pub stored_bytes: Option<u64>,
}

/// Counts requests. A bucket a project, which refills evenly (token bucket).
#[derive(Debug)]
pub(crate) struct RateLimiter {
    per_minute: f64,
    buckets: Mutex<HashMap<ProjectId, Bucket>>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    left: f64,
    at: Instant,
}

/// How a request stands with the limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Standing {
    limit: f64,
    remaining: f64,
    /// How long to wait for the next request; none if this one may go on.
    pub(crate) retry_after: Option<Duration>,
}

impl RateLimiter {
    /// One that lets `per_minute` requests a minute through.
    pub(crate) fn new(per_minute: u32) -> Self {
        Self { per_minute: f64::from(per_minute.max(1)), buckets: Mutex::default() }
    }

    /// Counts a request of `project`, at `now`.
    pub(crate) fn take(&self, project: &ProjectId, now: Instant) -> Standing {
        let per_second = self.per_minute / MINUTE;
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= MAX_BUCKETS {
            let minute = Duration::from_secs_f64(MINUTE);
            buckets.retain(|_, bucket| now.saturating_duration_since(bucket.at) < minute);
        }
        let full = Bucket { left: self.per_minute, at: now };
        let bucket = buckets.entry(project.clone()).or_insert(full);
        let rested = now.saturating_duration_since(bucket.at).as_secs_f64();
        bucket.left = (bucket.left + rested * per_second).min(self.per_minute);
        bucket.at = now;
        let retry_after = if bucket.left >= 1.0 {
            bucket.left -= 1.0;
            None
        } else {
            Some(Duration::from_secs_f64((1.0 - bucket.left) / per_second))
        };
        Standing { limit: self.per_minute, remaining: bucket.left, retry_after }
    }
}

impl Standing {
    /// OpenAI's headers that tell a client how it stands.
    pub(crate) fn headers(&self) -> [(HeaderName, HeaderValue); 3] {
        let reset = (self.limit - self.remaining) * MINUTE / self.limit;
        let reset = if reset < 1.0 {
            format!("{}ms", (reset * 1000.0).ceil())
        } else {
            format!("{}s", reset.ceil())
        };
        let value = |text: String| {
            HeaderValue::from_str(&text).unwrap_or_else(|_| HeaderValue::from_static("0"))
        };
        [
            (
                HeaderName::from_static("x-ratelimit-limit-requests"),
                value(format!("{}", self.limit)),
            ),
            (
                HeaderName::from_static("x-ratelimit-remaining-requests"),
                value(format!("{}", self.remaining.floor())),
            ),
            (HeaderName::from_static("x-ratelimit-reset-requests"), value(reset)),
        ]
    }

    /// The refusal, if it is one.
    pub(crate) fn refusal(&self) -> Option<ApiError> {
        let wait = self.retry_after?.as_secs_f64();
        Some(ApiError::new(
            ErrorCode::RateLimitExceeded,
            format!(
                "Rate limit reached: this project may send {} requests a minute. Try again in \
                 {:.1} s.",
                self.limit,
                (wait * 10.0).ceil() / 10.0
            ),
        ))
    }
}

/// The refusal of a project that has as much of something as it may.
pub(crate) fn over_quota(what: &str, limit: u64, way_out: &str) -> ApiError {
    ApiError::new(
        ErrorCode::InsufficientQuota,
        format!("This project may have {limit} {what} at one time. {way_out}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minutes_requests_may_come_at_once_and_then_they_come_back_evenly() {
        let limiter = RateLimiter::new(60);
        let (project, start) = (ProjectId::from("proj_a"), Instant::now());
        for left in (0..60).rev() {
            let standing = limiter.take(&project, start);
            assert_eq!((standing.retry_after, standing.remaining), (None, f64::from(left)));
        }
        let refused = limiter.take(&project, start);
        assert_eq!(refused.retry_after, Some(Duration::from_secs(1)));
        assert_eq!(refused.refusal().expect("refused").code, ErrorCode::RateLimitExceeded);
        let later = start + Duration::from_millis(1500);
        assert_eq!(limiter.take(&project, later).retry_after, None);
        assert_eq!(limiter.take(&project, later).retry_after, Some(Duration::from_millis(500)));
        assert_eq!(limiter.take(&ProjectId::from("proj_b"), later).retry_after, None);
    }

    #[test]
    fn the_headers_say_limit_rest_and_the_time_until_all_is_back() {
        let limiter = RateLimiter::new(120);
        let (project, start) = (ProjectId::from("proj_a"), Instant::now());
        let text = |standing: Standing| {
            standing.headers().map(|(_, value)| value.to_str().expect("text").to_owned())
        };
        assert_eq!(text(limiter.take(&project, start)), ["120", "119", "500ms"]);
        for _ in 0..8 {
            limiter.take(&project, start);
        }
        assert_eq!(text(limiter.take(&project, start)), ["120", "110", "5s"]);
    }
}
