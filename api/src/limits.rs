//! What one project may ask of the server: how many requests a minute, how many jobs at one time,
//! how much storage.

use actix_web::http::header::{HeaderName, HeaderValue};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::ids::ProjectId;
use tunesmith_store::request_budgets::Grant;
use tunesmith_store::{Store, StoreError};

const SECONDS: u32 = 60;
const MINUTE: Duration = Duration::from_secs(SECONDS as u64);
/// Projects that were not heard of for long are forgotten beyond this many.
const MAX_PROJECTS: usize = 10_000;

/// The limits of each project; none where it is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProjectLimits {
    /// Requests a minute, to all front-ends together. As many may come at once after a minute's rest.
    pub requests_per_minute: Option<u32>,
    /// Jobs that have not ended, at one time.
    pub unfinished_jobs: Option<u64>,
    /// Bytes of files, at one time.
    pub stored_bytes: Option<u64>,
}

/// Counts requests against a bucket a project, which refills evenly and is shared by all front-ends
/// ([`Store::take_requests`]). What a second brings is taken at once, so that the database is asked
/// about once a second for each project, however much it sends.
#[derive(Debug)]
pub(crate) struct RateLimiter {
    per_minute: u32,
    hands: Mutex<HashMap<ProjectId, Hand>>,
}

/// What was taken out of a project's bucket and not spent, and how the bucket stood then.
#[derive(Debug, Clone, Copy)]
struct Hand {
    requests: u32,
    taken_at: Instant,
    /// When the bucket will be full.
    full_at: Instant,
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
        Self { per_minute: per_minute.max(1), hands: Mutex::default() }
    }

    /// Counts a request of `project`.
    ///
    /// # Errors
    /// Those of the database.
    pub(crate) async fn take(
        &self,
        store: &Store,
        project: &ProjectId,
    ) -> Result<Standing, StoreError> {
        if let Some(standing) = self.spend(project, Instant::now()) {
            return Ok(standing);
        }
        let most = (self.per_minute / SECONDS).max(1);
        let grant = store.take_requests(project, self.per_minute, most).await?;
        Ok(self.received(project, grant, Instant::now()))
    }

    /// How a request stands where the database need not be asked: there are some in hand, or there
    /// can be none in the bucket yet.
    fn spend(&self, project: &ProjectId, now: Instant) -> Option<Standing> {
        let mut hands = self.hands.lock().unwrap_or_else(PoisonError::into_inner);
        let hand = hands.get_mut(project)?;
        if now.saturating_duration_since(hand.taken_at) > MINUTE {
            // Nobody saves up more than a bucket holds.
            hand.requests = 0;
        }
        if hand.requests > 0 {
            hand.requests -= 1;
            return Some(self.standing(*hand, now, None));
        }
        let wait = self.wait(*hand, now);
        (!wait.is_zero()).then(|| self.standing(*hand, now, Some(wait)))
    }

    /// Takes what was granted in hand, and spends one of it.
    fn received(&self, project: &ProjectId, grant: Grant, now: Instant) -> Standing {
        let mut hands = self.hands.lock().unwrap_or_else(PoisonError::into_inner);
        if hands.len() >= MAX_PROJECTS {
            hands.retain(|_, hand| now.saturating_duration_since(hand.taken_at) < MINUTE);
        }
        let new = Hand { requests: 0, taken_at: now, full_at: now };
        let hand = hands.entry(project.clone()).or_insert(new);
        // Another request may have taken some meanwhile.
        hand.requests = hand.requests.saturating_add(grant.requests);
        hand.taken_at = now;
        hand.full_at = now + grant.full_in;
        let refused = hand.requests == 0;
        hand.requests = hand.requests.saturating_sub(1);
        let retry_after = refused.then(|| self.wait(*hand, now).max(Duration::from_millis(1)));
        self.standing(*hand, now, retry_after)
    }

    /// How long until there is a request in the bucket.
    fn wait(&self, hand: Hand, now: Instant) -> Duration {
        let until_full = hand.full_at.saturating_duration_since(now);
        (until_full + MINUTE / self.per_minute).saturating_sub(MINUTE)
    }

    fn standing(&self, hand: Hand, now: Instant, retry_after: Option<Duration>) -> Standing {
        let limit = f64::from(self.per_minute);
        let until_full = hand.full_at.saturating_duration_since(now).as_secs_f64();
        let in_bucket = limit - until_full * limit / MINUTE.as_secs_f64();
        let remaining = (in_bucket.max(0.0) + f64::from(hand.requests)).min(limit);
        Standing { limit, remaining, retry_after }
    }
}

impl Standing {
    /// OpenAI's headers that tell a client how it stands.
    pub(crate) fn headers(&self) -> [(HeaderName, HeaderValue); 3] {
        let reset = (self.limit - self.remaining) * MINUTE.as_secs_f64() / self.limit;
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

    /// A bucket as the database keeps it, with a clock of its own.
    struct Bucket {
        full_at: Instant,
        taken: u32,
    }

    impl Bucket {
        /// One request of `limiter`'s project, at `now`.
        fn take(&mut self, limiter: &RateLimiter, now: Instant) -> Standing {
            let project = ProjectId::from("proj_a");
            if let Some(standing) = limiter.spend(&project, now) {
                return standing;
            }
            self.taken += 1;
            let each = MINUTE / limiter.per_minute;
            let until_full = self.full_at.saturating_duration_since(now);
            let most = (limiter.per_minute / SECONDS).max(1);
            let there = MINUTE.saturating_sub(until_full).as_nanos() / each.as_nanos();
            let requests = u32::try_from(there).expect("few").min(most);
            let full_in = until_full + each * requests;
            self.full_at = now + full_in;
            limiter.received(&project, Grant { requests, full_in }, now)
        }
    }

    #[test]
    fn a_minutes_requests_may_come_at_once_and_then_they_come_back_evenly() {
        let limiter = RateLimiter::new(60);
        let start = Instant::now();
        let mut bucket = Bucket { full_at: start, taken: 0 };
        for left in (0..60).rev() {
            let standing = bucket.take(&limiter, start);
            assert_eq!((standing.retry_after, standing.remaining), (None, f64::from(left)));
        }
        let refused = bucket.take(&limiter, start);
        assert_eq!(refused.retry_after, Some(Duration::from_secs(1)));
        assert_eq!(refused.refusal().expect("refused").code, ErrorCode::RateLimitExceeded);
        let later = start + Duration::from_millis(1500);
        assert_eq!(bucket.take(&limiter, later).retry_after, None);
        assert_eq!(bucket.take(&limiter, later).retry_after, Some(Duration::from_millis(500)));
        assert!(limiter.spend(&ProjectId::from("proj_b"), later).is_none());
    }

    #[test]
    fn a_bucket_is_asked_once_for_what_a_second_brings_and_not_while_it_is_empty() {
        let limiter = RateLimiter::new(600);
        let start = Instant::now();
        let mut bucket = Bucket { full_at: start, taken: 0 };
        for left in (0..600).rev() {
            let standing = bucket.take(&limiter, start);
            assert_eq!((standing.retry_after, standing.remaining), (None, f64::from(left)));
        }
        assert_eq!(bucket.taken, 60);
        for _ in 0..100 {
            let refused = bucket.take(&limiter, start);
            assert_eq!(refused.retry_after, Some(Duration::from_millis(100)));
        }
        assert_eq!(bucket.taken, 60);
    }

    #[test]
    fn what_was_taken_and_not_spent_is_good_for_a_minute() {
        let limiter = RateLimiter::new(600);
        let start = Instant::now();
        let mut bucket = Bucket { full_at: start, taken: 0 };
        bucket.take(&limiter, start);
        bucket.take(&limiter, start + MINUTE);
        assert_eq!(bucket.taken, 1);
        bucket.take(&limiter, start + MINUTE + Duration::from_secs(1));
        assert_eq!(bucket.taken, 2);
    }

    #[test]
    fn the_headers_say_limit_rest_and_the_time_until_all_is_back() {
        let limiter = RateLimiter::new(120);
        let start = Instant::now();
        let mut bucket = Bucket { full_at: start, taken: 0 };
        let text = |standing: Standing| {
            standing.headers().map(|(_, value)| value.to_str().expect("text").to_owned())
        };
        assert_eq!(text(bucket.take(&limiter, start)), ["120", "119", "500ms"]);
        for _ in 0..8 {
            bucket.take(&limiter, start);
        }
        assert_eq!(text(bucket.take(&limiter, start)), ["120", "110", "5s"]);
    }
}
