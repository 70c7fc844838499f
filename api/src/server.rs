//! The server: it builds itself on any address, port 0 included, and stops when it is told.

use crate::estimate::Prices;
use crate::exports::ExportChecks;
use crate::failure::Failure;
use crate::limits::{ProjectLimits, RateLimiter, over_quota};
use crate::live::Live;
use crate::observe::observe;
use crate::serving::Serving;
use crate::telemetry::Telemetry;
use crate::tokenizers::Tokenizers;
use crate::webhooks::{self, AddressPolicy, IpNet};
use crate::{batches, file_reports, maintenance, routes, validator};
use actix_cors::Cors;
use actix_web::dev::Server;
use actix_web::middleware::{Condition, from_fn};
use actix_web::{App, HttpServer, web};
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::num::NonZero;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, watch};
use tunesmith_core::ids::ProjectId;
use tunesmith_store::Store;

/// OpenAI's limit for a file that comes in one piece.
pub const DEFAULT_MAX_FILE_BYTES: u64 = 512 << 20;
/// How long requests that are under way may still take when the server stops.
const SHUTDOWN_SECONDS: u64 = 5;
/// Longer than the pools of HTTP clients keep a connection, so that it is they who close it.
const KEEP_ALIVE: Duration = Duration::from_secs(75);

/// Threads that take requests; the database is busy long before they are.
const MAX_THREADS: usize = 8;

/// Each keeps a core busy while it reads.
const MAX_PREVIEWS: usize = 2;

/// How the API is run.
#[derive(Debug, Clone)]
pub struct ApiConfig {
    /// `host:port`; port 0 takes a free one.
    pub listen: String,
    /// The largest file that `POST /v1/files` takes.
    pub max_file_bytes: u64,
    /// Ranges inside the network that webhooks may be sent to, by `http` too. All others lead to
    /// the internet, by `https`.
    pub webhook_ranges: Vec<IpNet>,
    /// Names that clients may use for base models: the name that they send, and whose it is here.
    pub model_aliases: BTreeMap<String, String>,
    /// What each project may ask for.
    pub limits: ProjectLimits,
    /// Web pages of these origins may call the API from a browser; `*` lets all.
    pub cors_origins: Vec<String>,
    /// What the operator charges; a preview of a job says what it would cost.
    pub prices: Prices,
}

impl ApiConfig {
    /// The usual limits, on the address `listen`.
    pub fn new(listen: impl Into<String>) -> Self {
        Self {
            listen: listen.into(),
            max_file_bytes: DEFAULT_MAX_FILE_BYTES,
            webhook_ranges: Vec::new(),
            model_aliases: BTreeMap::new(),
            limits: ProjectLimits::default(),
            cors_origins: Vec::new(),
            prices: Prices::default(),
        }
    }
}

/// What every handler sees.
#[derive(Clone)]
pub(crate) struct AppState {
    pub(crate) store: Store,
    pub(crate) max_file_bytes: u64,
    pub(crate) live: Live,
    pub(crate) telemetry: Telemetry,
    pub(crate) webhooks: AddressPolicy,
    pub(crate) model_aliases: BTreeMap<String, String>,
    pub(crate) limits: ProjectLimits,
    pub(crate) rate: Option<Arc<RateLimiter>>,
    pub(crate) prices: Prices,
    pub(crate) tokenizers: Arc<Tokenizers>,
    pub(crate) serving: Serving,
    pub(crate) export_checks: ExportChecks,
    /// Previews that may read files at a time.
    pub(crate) previews: Arc<Semaphore>,
}

impl AppState {
    /// The base model that `name` stands for: an alias' target, or itself.
    pub(crate) fn base_model_name<'a>(&'a self, name: &'a str) -> &'a str {
        self.model_aliases.get(name).map_or(name, String::as_str)
    }

    /// Fails if the project has as many bytes of files as it may, `more` of them included.
    ///
    /// # Errors
    /// `insufficient_quota`, or those of the database.
    pub(crate) async fn require_storage(
        &self,
        project: &ProjectId,
        more: u64,
    ) -> Result<(), Failure> {
        let Some(limit) = self.limits.stored_bytes else { return Ok(()) };
        if self.store.stored_bytes(project).await?.saturating_add(more.max(1)) <= limit {
            return Ok(());
        }
        Err(over_quota("bytes of files", limit, "Delete files that are of no use any more.").into())
    }
}

/// The REST API on an address of its own, with the validator of uploaded files beside it.
pub struct ApiServer {
    server: Server,
    local_addr: SocketAddr,
    store: Store,
    live: Live,
    /// Turns true when the server is told to stop.
    stop: watch::Sender<bool>,
    webhooks: AddressPolicy,
    tokenizers: Arc<Tokenizers>,
    serving: Serving,
}

impl ApiServer {
    /// Takes the address; connections wait until [`run`](Self::run). To be called in a Tokio
    /// runtime.
    ///
    /// # Errors
    /// An address that is taken or is none.
    pub fn bind(config: &ApiConfig, store: Store) -> io::Result<Self> {
        let listener = TcpListener::bind(&config.listen)?;
        let local_addr = listener.local_addr()?;
        let (stop, stopped) = watch::channel(false);
        let live = Live::new(store.clone(), stopped);
        let webhooks = AddressPolicy::new(config.webhook_ranges.clone());
        let tokenizers = Arc::new(Tokenizers::new(store.clone()));
        let telemetry = Telemetry::new();
        let aliases = config.model_aliases.clone();
        let serving =
            Serving::new(store.clone(), Arc::clone(&tokenizers), aliases, telemetry.clone())
                .map_err(io::Error::other)?;
        let export_checks =
            ExportChecks::new(store.clone(), Arc::clone(&tokenizers)).map_err(io::Error::other)?;
        let state = AppState {
            store: store.clone(),
            max_file_bytes: config.max_file_bytes,
            live: live.clone(),
            telemetry,
            webhooks: webhooks.clone(),
            model_aliases: config.model_aliases.clone(),
            limits: config.limits,
            rate: config.limits.requests_per_minute.map(RateLimiter::new).map(Arc::new),
            prices: config.prices.clone(),
            tokenizers: Arc::clone(&tokenizers),
            serving: serving.clone(),
            export_checks,
            previews: Arc::new(Semaphore::new(MAX_PREVIEWS)),
        };
        let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
        let threads = threads.min(MAX_THREADS);
        let origins = config.cors_origins.clone();
        // Called once in each thread.
        let server = HttpServer::new(move || {
            let store = state.store.of_thread(threads);
            App::new()
                .app_data(web::Data::new(AppState { store, ..state.clone() }))
                .configure(routes::configure)
                .wrap(Condition::new(!origins.is_empty(), cors(&origins)))
                .wrap(from_fn(observe))
        })
        .workers(threads)
        .keep_alive(KEEP_ALIVE)
        // Nobody waits for the answer of a client that has hung up.
        .h1_allow_half_closed(false)
        .shutdown_timeout(SHUTDOWN_SECONDS)
        // Signals are the program's business, which has more than this server to stop.
        .disable_signals()
        .listen(listener)?
        .run();
        Ok(Self { server, local_addr, store, live, stop, webhooks, tokenizers, serving })
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Serves and validates until `shutdown` is done; then lets what is under way end, for a few
    /// seconds.
    ///
    /// Requests run on threads of their own, with connections to the database of their own. What
    /// open streams need is read over those of `Store`, and connections that were opened for them
    /// end with the threads: whatever else uses the same pool is to be stopped first.
    ///
    /// # Errors
    /// The server broke down.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> io::Result<()> {
        let (store, stop, stopped) = (self.store.clone(), self.stop.clone(), self.stop.subscribe());
        let maintenance = tokio::spawn(maintenance::run(store.clone(), stopped.clone()));
        let live = tokio::spawn(self.live.clone().run());
        let deliveries =
            tokio::spawn(webhooks::run(store.clone(), self.webhooks.clone(), stopped.clone()));
        let batches = tokio::spawn(batches::run(self.serving.clone(), stopped.clone()));
        let tokenizers = Arc::clone(&self.tokenizers);
        let reports =
            tokio::spawn(file_reports::run(store.clone(), tokenizers.clone(), stopped.clone()));
        let mut validator = tokio::spawn(validator::run(store, tokenizers, stopped));
        let served = self.serve(shutdown).await;
        // Nobody has said so yet where the server broke down.
        stop.send_replace(true);
        let limit = Duration::from_secs(SHUTDOWN_SECONDS);
        if tokio::time::timeout(limit, &mut validator).await.is_err() {
            // Another validator takes the job up when the claim runs out.
            validator.abort();
        }
        // A report that is half made is made again by who comes next.
        reports.abort();
        maintenance.abort();
        live.abort();
        deliveries.abort();
        batches.abort();
        served
    }

    /// The same without the tasks beside it.
    pub(crate) async fn serve(self, shutdown: impl Future<Output = ()>) -> io::Result<()> {
        let handle = self.server.handle();
        let mut server = std::pin::pin!(self.server);
        tokio::select! {
            served = &mut server => served,
            () = shutdown => {
                // Streams end first, or the server would wait for them in vain.
                self.stop.send_replace(true);
                // Together: the server obeys only while it is polled.
                tokio::join!(handle.stop(true), server).1
            }
        }
    }
}

/// How long a browser may remember what it was allowed.
const CORS_MAX_AGE: usize = 3600;

/// What pages of `origins` may do from a browser. Keys travel in a header that a page sets itself,
/// never in cookies, so no page can use another's.
fn cors(origins: &[String]) -> Cors {
    let cors = Cors::default()
        .allow_any_header()
        .allow_any_method()
        .expose_any_header()
        .max_age(CORS_MAX_AGE);
    if origins.iter().any(|origin| origin == "*") {
        return cors.allow_any_origin().send_wildcard();
    }
    origins.iter().fold(cors, |cors, origin| cors.allowed_origin(origin))
}

#[cfg(test)]
mod tests {
    use super::{ApiConfig, ProjectLimits};
    use crate::testing::{Reply, TestApi};
    use reqwest::Method;
    use serde_json::json;

    #[tokio::test]
    async fn a_path_that_is_not_there_is_a_404_in_the_common_shape() {
        let api = TestApi::start().await;
        for path in ["/", "/v1", "/v1/nope", "/v1/files/a/b/c", "/assets/nope.js"] {
            assert_eq!(api.get(path).await.error(404)["code"], "unknown_url", "{path}");
        }
        let error = api.get("/v1/nope").await.error(404);
        assert_eq!(error["message"], "Invalid URL (GET /v1/nope)");
    }

    #[tokio::test]
    async fn a_method_that_a_path_does_not_have_is_a_405_in_the_common_shape() {
        let api = TestApi::start().await;
        let reply = Reply::of(api.request(Method::PUT, "/v1/files")).await;
        assert_eq!(reply.error(405)["message"], "Not allowed to PUT on /v1/files.");
        assert_eq!(reply.header("allow"), Some("GET, HEAD, POST"));
        let reply = Reply::of(api.request(Method::PUT, "/v1/models/a/b")).await;
        assert_eq!(reply.header("allow"), Some("GET, HEAD, DELETE"));
        let reply = Reply::of(api.request(Method::GET, "/v1/fine_tuning/jobs/preview")).await;
        assert_eq!(reply.header("allow"), Some("POST"));
    }

    #[tokio::test]
    async fn health_asks_for_no_key() {
        let api = TestApi::start().await;
        let anybody = api.client_with(None);
        for path in ["/healthz", "/readyz"] {
            assert_eq!(anybody.get(path).await.ok()["status"], "ok");
        }
    }

    #[tokio::test]
    async fn a_server_without_its_database_is_alive_and_not_ready() {
        let api = TestApi::start().await;
        api.store.close().await;
        assert_eq!(api.get("/readyz").await.error(503)["code"], "service_unavailable");
        assert_eq!(api.get("/v1/files").await.error(503)["type"], "server_error");
        api.get("/healthz").await.ok();
    }

    #[tokio::test]
    async fn the_page_of_a_job_comes_with_its_files_and_without_a_key() {
        let api = TestApi::start().await;
        let anybody = api.client_with(None);
        let page = anybody.get("/jobs/ftjob-any").await;
        assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
        let html = String::from_utf8(page.body).expect("text");
        for (path, kind) in [
            ("/assets/app.js", "text/javascript; charset=utf-8"),
            ("/assets/app.css", "text/css; charset=utf-8"),
        ] {
            assert!(html.contains(path), "{path}");
            let asset = anybody.get(path).await;
            assert_eq!((asset.status.as_u16(), asset.header("content-type")), (200, Some(kind)));
        }
    }

    #[tokio::test]
    async fn a_project_over_its_requests_a_minute_hears_when_to_come_back() {
        let api = TestApi::with(|config| config.limits.requests_per_minute = Some(2)).await;
        for left in ["1", "0"] {
            let reply = api.get("/v1/files").await;
            assert_eq!(reply.header("x-ratelimit-limit-requests"), Some("2"));
            assert_eq!(reply.header("x-ratelimit-remaining-requests"), Some(left));
            reply.ok();
        }
        let refused = api.get("/v1/files").await;
        let error = refused.error(429);
        assert_eq!(
            (&error["code"], &error["type"]),
            (&json!("rate_limit_exceeded"), &json!("requests"))
        );
        let seconds: f64 = refused.header("retry-after").expect("header").parse().expect("number");
        assert!((1.0..=30.0).contains(&seconds), "{seconds}");
        assert_eq!(refused.header("x-ratelimit-remaining-requests"), Some("0"));
        api.stranger().await.get("/v1/files").await.ok();
        api.client_with(None).get("/healthz").await.ok();
    }

    #[tokio::test]
    async fn a_limit_holds_for_all_servers_on_a_database_together() {
        let limits = ProjectLimits { requests_per_minute: Some(3), ..ProjectLimits::default() };
        let mut api = TestApi::with(|config| config.limits = limits).await;
        let other = api.beside(&ApiConfig { limits, ..ApiConfig::new("127.0.0.1:0") });
        for (client, left) in [(&*api, "2"), (&other, "1"), (&other, "0")] {
            let reply = client.get("/v1/files").await;
            assert_eq!(reply.header("x-ratelimit-remaining-requests"), Some(left));
            reply.ok();
        }
        for client in [&*api, &other] {
            let refused = client.get("/v1/files").await;
            assert_eq!(refused.error(429)["code"], "rate_limit_exceeded");
        }
    }

    #[tokio::test]
    async fn a_project_over_its_quota_is_told_what_to_do_and_that_no_retry_helps() {
        let api = TestApi::with(|config| {
            config.limits.stored_bytes = Some(5000);
            config.limits.unfinished_jobs = Some(1);
        })
        .await
        .with_base_model()
        .await;
        let job = api.start_job().await;
        let file = api.job(&job).await.training_file;
        let body = json!({"model": crate::testing::BASE, "training_file": file});
        let refused = api.post("/v1/fine_tuning/jobs", &body).await;
        assert_eq!(refused.error(429)["code"], "insufficient_quota");
        assert_eq!(refused.header("x-should-retry"), Some("false"));
        let part = reqwest::multipart::Part::bytes(vec![b'x'; 5000]).file_name("a");
        let form = reqwest::multipart::Form::new().text("purpose", "batch").part("file", part);
        assert_eq!(api.post_form(form).await.error(429)["code"], "insufficient_quota");
        let upload = json!({"bytes": 4999, "filename": "a", "mime_type": "a", "purpose": "batch"});
        assert_eq!(api.post("/v1/uploads", &upload).await.error(429)["code"], "insufficient_quota");
    }

    #[tokio::test]
    async fn an_alias_stands_for_a_base_model() {
        let api = TestApi::with(|config| {
            let alias = |name: &str| (name.to_owned(), crate::testing::BASE.to_owned());
            config.model_aliases = [alias("gpt-4o-mini")].into();
            config.model_aliases.insert("gpt-x".to_owned(), "nothing".to_owned());
        })
        .await
        .with_base_model()
        .await;
        let file = api.upload(crate::testing::chat_rows(10)).await;
        let body = json!({"model": "gpt-4o-mini", "training_file": file});
        let job = api.post("/v1/fine_tuning/jobs", &body).await.ok();
        assert_eq!(job["model"], "gpt-4o-mini");
        let row = api.job(job["id"].as_str().expect("id")).await;
        let base = api.store.base_model(crate::testing::BASE).await.expect("there");
        assert_eq!(row.base_model_id, base.id);
        assert_eq!(api.get("/v1/models/gpt-4o-mini").await.ok()["id"], "gpt-4o-mini");
        api.get("/v1/models/gpt-x").await.error(404);
        let listed = api.get("/v1/models").await.ok();
        let ids: Vec<&str> = listed["data"]
            .as_array()
            .expect("data")
            .iter()
            .map(|model| model["id"].as_str().expect("id"))
            .collect();
        assert_eq!(ids, [crate::testing::BASE, "gpt-4o-mini"]);
        let missing = json!({"model": "gpt-x", "training_file": file});
        assert_eq!(
            api.post("/v1/fine_tuning/jobs", &missing).await.error(400)["code"],
            "model_not_found"
        );
    }

    #[tokio::test]
    async fn pages_of_an_allowed_origin_alone_may_call_from_a_browser() {
        let api = TestApi::with(|config| {
            config.cors_origins = vec!["https://app.example".to_owned()];
        })
        .await;
        let preflight = |origin: &str| {
            let request = api
                .client_with(None)
                .request(Method::OPTIONS, "/v1/files")
                .header("origin", origin)
                .header("access-control-request-method", "POST")
                .header("access-control-request-headers", "authorization,x-stainless-os");
            Reply::of(request)
        };
        let allowed = preflight("https://app.example").await;
        assert_eq!(allowed.status, 200);
        assert_eq!(allowed.header("access-control-allow-origin"), Some("https://app.example"));
        assert!(
            preflight("https://evil.example").await.header("access-control-allow-origin").is_none()
        );
        let read = api.request(Method::GET, "/v1/files").header("origin", "https://app.example");
        let read = Reply::of(read).await;
        assert_eq!(read.header("access-control-allow-origin"), Some("https://app.example"));
        assert!(read.header("x-request-id").is_some());
        let closed = TestApi::start().await;
        let read = closed.request(Method::GET, "/v1/files").header("origin", "https://app.example");
        assert!(Reply::of(read).await.header("access-control-allow-origin").is_none());
    }

    #[tokio::test]
    async fn lists_are_compressed_for_who_takes_it_and_content_keeps_its_length() {
        let api = TestApi::start().await;
        let id = api.upload("0123456789").await;
        let get = |path: &str| {
            Reply::of(api.request(Method::GET, path).header("accept-encoding", "gzip"))
        };
        assert_eq!(get("/v1/files").await.header("content-encoding"), Some("gzip"));
        assert_eq!(api.get("/v1/files").await.header("content-encoding"), None);
        let body = json!({"model": "m"});
        let made = api.request(Method::POST, "/v1/fine_tuning/jobs").json(&body);
        let made = Reply::of(made.header("accept-encoding", "gzip")).await;
        assert_eq!(made.header("content-encoding"), None);
        let content = get(&format!("/v1/files/{id}/content")).await;
        assert_eq!(content.header("content-encoding"), None);
        assert_eq!(content.header("content-length"), Some("10"));
    }
}
