//! What `/metrics` tells of this process and of the jobs, for Prometheus.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use actix_web::http::Method;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use tunesmith_core::state::JobStatus;

/// The format of the text.
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// From a look-up to a large upload.
const DURATION_BUCKETS: [f64; 12] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0, 120.0];
/// From a short prompt on a GPU to a model that is loaded first.
const FIRST_TOKEN_BUCKETS: [f64; 12] =
    [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0];
/// What stands for the route of a path that there is not.
const NO_ROUTE: &str = "none";
/// The methods that have figures of their own.
const METHODS: [Method; 5] =
    [Method::GET, Method::HEAD, Method::POST, Method::DELETE, Method::OPTIONS];
const NO_METHOD: &str = "other";

/// The figures of this process. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Telemetry(Arc<Figures>);

#[derive(Debug)]
struct Figures {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    durations: Family<RouteLabels, Histogram, fn() -> Histogram>,
    unfinished_jobs: Family<StatusLabels, Gauge<u64, AtomicU64>>,
    open_streams: Gauge<u64, AtomicU64>,
    tokens: Family<TokenLabels, Counter>,
    first_token: Histogram,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    method: String,
    route: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteLabels {
    method: String,
    route: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TokenLabels {
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StatusLabels {
    status: &'static str,
}

impl Telemetry {
    pub(crate) fn new() -> Self {
        let requests = Family::default();
        let histogram: fn() -> Histogram = || Histogram::new(DURATION_BUCKETS);
        let durations = Family::new_with_constructor(histogram);
        let (unfinished_jobs, open_streams) = (Family::default(), Gauge::default());
        let mut registry = Registry::with_prefix("tunesmith");
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The program's version", version);
        registry.register("http_requests", "Requests that were answered", requests.clone());
        registry.register_with_unit(
            "http_request_duration",
            "Time until a reply began",
            Unit::Seconds,
            durations.clone(),
        );
        registry.register(
            "unfinished_jobs",
            "Jobs that have not ended, in the whole installation",
            unfinished_jobs.clone(),
        );
        registry.register(
            "open_streams",
            "Live streams that wait for what a job says next",
            open_streams.clone(),
        );
        let tokens = Family::default();
        let first_token = Histogram::new(FIRST_TOKEN_BUCKETS);
        registry.register("tokens", "Tokens of prompts and of answers", tokens.clone());
        registry.register_with_unit(
            "time_to_first_token",
            "Time until a sampler gave an answer's first token",
            Unit::Seconds,
            first_token.clone(),
        );
        Self(Arc::new(Figures {
            registry,
            requests,
            durations,
            unfinished_jobs,
            open_streams,
            tokens,
            first_token,
        }))
    }

    /// Counts a request whose reply begins.
    pub(crate) fn count_request(
        &self,
        method: &Method,
        route: Option<&str>,
        status: u16,
        elapsed: Duration,
    ) {
        // A client may make up methods.
        let method = if METHODS.contains(method) { method.as_str() } else { NO_METHOD };
        let (method, route) = (method.to_owned(), route.unwrap_or(NO_ROUTE).to_owned());
        let of_route = RouteLabels { method: method.clone(), route: route.clone() };
        self.0.durations.get_or_create(&of_route).observe(elapsed.as_secs_f64());
        self.0.requests.get_or_create(&RequestLabels { method, route, status }).inc();
    }

    /// Counts the tokens of a prompt, those of it that a sampler had in memory, and those of its
    /// answers.
    pub(crate) fn count_tokens(&self, prompt: u64, cached: u64, completion: u64) {
        let kinds = [("prompt", prompt), ("cached", cached), ("completion", completion)];
        for (kind, count) in kinds {
            self.0.tokens.get_or_create(&TokenLabels { kind }).inc_by(count);
        }
    }

    /// Notes how long an answer's first token took.
    pub(crate) fn observe_first_token(&self, elapsed: Duration) {
        self.0.first_token.observe(elapsed.as_secs_f64());
    }

    /// All figures; those of jobs and of streams are as given.
    pub(crate) fn text(&self, unfinished_jobs: &[(JobStatus, u64)], open_streams: usize) -> String {
        self.0.open_streams.set(open_streams as u64);
        for status in JobStatus::ALL.iter().filter(|status| !status.is_terminal()) {
            let jobs = unfinished_jobs.iter().find(|(of, _)| of == status);
            self.0
                .unfinished_jobs
                .get_or_create(&StatusLabels { status: status.as_str() })
                .set(jobs.map_or(0, |(_, jobs)| *jobs));
        }
        let mut text = String::new();
        // Writing into a string cannot fail.
        let _ = encode(&mut text, &self.0.registry);
        text
    }
}
