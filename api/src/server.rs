//! The server: it builds itself on any address, port 0 included, and stops when it is told.

use crate::live::Live;
use crate::observe::observe;
use crate::telemetry::Telemetry;
use crate::{maintenance, routes, validator};
use actix_web::dev::Server;
use actix_web::middleware::from_fn;
use actix_web::{App, HttpServer, web};
use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;
use tokio::sync::watch;
use tunesmith_store::Store;

/// OpenAI's limit for a file that comes in one piece.
pub const DEFAULT_MAX_FILE_BYTES: u64 = 512 << 20;
/// How long requests that are under way may still take when the server stops.
const SHUTDOWN_SECONDS: u64 = 5;
/// Longer than the pools of HTTP clients keep a connection, so that it is they who close it.
const KEEP_ALIVE: Duration = Duration::from_secs(75);

/// How the API is run.
#[derive(Debug, Clone)]
pub struct ApiConfig {
    /// `host:port`; port 0 takes a free one.
    pub listen: String,
    /// The largest file that `POST /v1/files` takes.
    pub max_file_bytes: u64,
}

impl ApiConfig {
    /// The usual limits, on the address `listen`.
    pub fn new(listen: impl Into<String>) -> Self {
        Self { listen: listen.into(), max_file_bytes: DEFAULT_MAX_FILE_BYTES }
    }
}

/// What every handler sees.
#[derive(Debug)]
pub(crate) struct AppState {
    pub(crate) store: Store,
    pub(crate) max_file_bytes: u64,
    pub(crate) live: Live,
    pub(crate) telemetry: Telemetry,
}

/// The REST API on an address of its own, with the validator of uploaded files beside it.
pub struct ApiServer {
    server: Server,
    local_addr: SocketAddr,
    store: Store,
    live: Live,
    /// Turns true when the server is told to stop.
    stop: watch::Sender<bool>,
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
        let state = web::Data::new(AppState {
            store: store.clone(),
            max_file_bytes: config.max_file_bytes,
            live: live.clone(),
            telemetry: Telemetry::new(),
        });
        let server = HttpServer::new(move || {
            App::new().app_data(state.clone()).configure(routes::configure).wrap(from_fn(observe))
        })
        .keep_alive(KEEP_ALIVE)
        .shutdown_timeout(SHUTDOWN_SECONDS)
        // Signals are the program's business, which has more than this server to stop.
        .disable_signals()
        .listen(listener)?
        .run();
        Ok(Self { server, local_addr, store, live, stop })
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Serves and validates until `shutdown` is done; then lets what is under way end, for a few
    /// seconds.
    ///
    /// Requests run on threads of their own, and the connections of `Store`'s pool that they opened
    /// end with them: whatever else uses the same pool is to be stopped first.
    ///
    /// # Errors
    /// The server broke down.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> io::Result<()> {
        let (store, stopped) = (self.store.clone(), self.stop.subscribe());
        let maintenance = tokio::spawn(maintenance::run(store.clone(), stopped.clone()));
        let live = tokio::spawn(self.live.clone().run());
        let mut validator = tokio::spawn(validator::run(store, stopped));
        let served = self.serve(shutdown).await;
        let limit = Duration::from_secs(SHUTDOWN_SECONDS);
        if tokio::time::timeout(limit, &mut validator).await.is_err() {
            // Another validator takes the job up when the claim runs out.
            validator.abort();
        }
        maintenance.abort();
        live.abort();
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

#[cfg(test)]
mod tests {
    use crate::testing::{Reply, TestApi};
    use reqwest::Method;

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
}
