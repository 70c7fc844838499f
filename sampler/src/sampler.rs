//! The service: takes its address, says in the database that it is there, and leaves in order.

use crate::config::SamplerConfig;
use crate::http::{self, Desk};
use crate::models::{Context, Models};
use actix_web::dev::Server;
use actix_web::{App, HttpServer, web};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tunesmith_core::ids::{SamplerId, random_text};
use tunesmith_store::Store;
use tunesmith_store::samplers::{SAMPLER_RENEWAL, Sampler as Row};
use tunesmith_worker::{ModelCache, WorkDir};

/// Longer than front-ends keep an idle connection.
const KEEP_ALIVE: Duration = Duration::from_secs(120);

/// Why a sampler cannot work.
#[derive(Debug, thiserror::Error)]
pub enum SamplerError {
    /// Its address cannot be had.
    #[error("the sampler cannot listen on {listen}: {source}")]
    Listen {
        /// As configured.
        listen: String,
        /// Why.
        source: io::Error,
    },
    /// Its directory cannot be used.
    #[error("the sampler's directory {path} cannot be used: {source}")]
    WorkDir {
        /// As configured.
        path: std::path::PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The server broke down.
    #[error("the sampler's server broke down: {0}")]
    Server(#[from] io::Error),
}

/// A sampler: takes orders until it is told to stop.
pub struct Sampler {
    server: Server,
    local_addr: SocketAddr,
    store: Store,
    models: Arc<Models>,
    row: Row,
    stop_grace: Duration,
}

impl Sampler {
    /// Takes the address and the directory; orders wait until [`run`](Self::run). To be called in
    /// a Tokio runtime.
    ///
    /// # Errors
    /// [`SamplerError::Listen`], [`SamplerError::WorkDir`].
    pub fn bind(store: Store, config: SamplerConfig) -> Result<Self, SamplerError> {
        let id = SamplerId::generate(&mut rand::rng());
        let token = random_text(&mut rand::rng(), 48);
        let listen = config.listen.clone();
        let listen_error = |source| SamplerError::Listen { listen: listen.clone(), source };
        let listener = TcpListener::bind(&listen).map_err(listen_error)?;
        let local_addr = listener.local_addr().map_err(listen_error)?;
        let url = config.url.clone();
        let url = url.unwrap_or_else(|| format!("http://{}", reachable(local_addr)));
        let work_dir = WorkDir::create(&config.work_dir, id.as_str())
            .map_err(|source| SamplerError::WorkDir { path: config.work_dir.clone(), source })?;
        let (max_orders, stop_grace) = (config.max_orders, config.stop_grace);
        let cache = ModelCache::new(&config.cache_dir, config.tuned_cache_bytes);
        let models =
            Arc::new(Models::new(Context { store: store.clone(), cache, work_dir, config }));
        let desk = web::Data::new(Desk::new(Arc::clone(&models), &token, max_orders));
        let server =
            HttpServer::new(move || App::new().app_data(desk.clone()).configure(http::configure))
                // It waits for models and does little itself.
                .workers(2)
                .keep_alive(KEEP_ALIVE)
                // A front-end that hangs up cancels its order.
                .h1_allow_half_closed(false)
                .shutdown_timeout(stop_grace.as_secs())
                .disable_signals()
                .listen(listener)
                .map_err(listen_error)?
                .run();
        let row = Row { id, url: url.trim_end_matches('/').to_owned(), token, models: Vec::new() };
        Ok(Self { server, local_addr, store, models, row, stop_grace })
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Its name in the database and in logs.
    #[must_use]
    pub fn id(&self) -> &SamplerId {
        &self.row.id
    }

    /// Answers until `shutdown` is cancelled. Then it takes no more orders, and those under way
    /// have [`SamplerConfig::stop_grace`] to come to their end.
    ///
    /// # Errors
    /// [`SamplerError::Server`]. A database that is away is waited for.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), SamplerError> {
        let Self { server, store, models, row, stop_grace, .. } = self;
        tracing::info!(sampler_id = %row.id, url = row.url, "the sampler is ready");
        let handle = server.handle();
        let mut server = std::pin::pin!(server);
        let announced = announce(&store, &models, row.clone());
        let served = tokio::select! {
            served = &mut server => served,
            () = announced => Ok(()),
            () = shutdown.cancelled() => {
                leave(&store, &row).await;
                // Together: the server obeys only while it is polled.
                tokio::join!(handle.stop(true), server).1
            }
        };
        // What is not answered by now ends with its child.
        if tokio::time::timeout(stop_grace, models.stop()).await.is_err() {
            tracing::warn!(sampler_id = %row.id, "a model did not stop in time");
        }
        tracing::info!(sampler_id = %row.id, "the sampler has stopped");
        Ok(served?)
    }
}

/// Says again and again that the sampler is there, and with which models.
async fn announce(store: &Store, models: &Models, mut row: Row) {
    loop {
        row.models = models.in_memory();
        if let Err(error) = store.announce_sampler(&row).await {
            tracing::warn!(%error, "the sampler cannot say that it is there; trying again");
        }
        let _ = tokio::time::timeout(SAMPLER_RENEWAL, models.changed.notified()).await;
    }
}

async fn leave(store: &Store, row: &Row) {
    if let Err(error) = store.remove_sampler(&row.id).await {
        tracing::warn!(%error, "the sampler's row stays; it runs out by itself");
    }
}

/// An address that a front-end on this machine can use.
fn reachable(listening: SocketAddr) -> SocketAddr {
    let ip = match listening.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listening.port())
}
