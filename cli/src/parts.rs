//! The API and a worker, as `up` starts them together and `api` and `worker` apart.

use anyhow::Context as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use tunesmith_api::{ApiConfig, ApiServer};
use tunesmith_engine::Device;
use tunesmith_store::Store;
use tunesmith_worker::{ChildCommand, DEFAULT_TUNED_CACHE_BYTES, WorkerConfig};

/// Where the API listens unless it is told otherwise.
pub(crate) const DEFAULT_LISTEN: &str = "127.0.0.1:8080";

/// The API, as it is to be run.
pub(crate) fn bind_api(config: &ApiConfig, store: Store) -> anyhow::Result<ApiServer> {
    ApiServer::bind(config, store).with_context(|| {
        let listen = &config.listen;
        format!("the API cannot listen on {listen}: name another address with --listen")
    })
}

/// The one line of standard output, for whoever waits for it.
pub(crate) fn print_ready(listening: SocketAddr) {
    println!("tunesmith is ready at http://{}/v1", reachable(listening));
}

/// An address that a client on this machine can use.
fn reachable(listening: SocketAddr) -> SocketAddr {
    let ip = match listening.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listening.port())
}

/// What a worker and a sampler keep on their disk, which they may share.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct CacheArgs {
    /// Disk for models that were tuned in full and that adapters go on, in gibibytes; the one that was
    /// used longest ago makes room, and what is in use stays
    #[arg(long, env = "TUNESMITH_TUNED_CACHE", value_name = "GIB", default_value_t = DEFAULT_TUNED_CACHE_BYTES >> 30, value_parser = clap::value_parser!(u64).range(..=1 << 30))]
    tuned_cache: u64,
}

impl CacheArgs {
    /// In bytes.
    pub(crate) fn tuned_cache_bytes(self) -> u64 {
        self.tuned_cache << 30
    }
}

/// A worker whose trainer is this program's own `train`.
///
/// # Errors
/// When this program's own path cannot be found.
pub(crate) fn worker_config(
    cache_dir: PathBuf,
    cache: CacheArgs,
    work_dir: PathBuf,
    device: &str,
) -> anyhow::Result<WorkerConfig> {
    let mut config = WorkerConfig::new(cache_dir, work_dir, device, own_command("train")?);
    config.tuned_cache_bytes = cache.tuned_cache_bytes();
    Ok(config)
}

/// A hidden command of this program as a child.
///
/// # Errors
/// When this program's own path cannot be found.
pub(crate) fn own_command(name: &str) -> anyhow::Result<ChildCommand> {
    let program = std::env::current_exe().context("this program does not find itself")?;
    Ok(ChildCommand { program, args: vec![name.into()], env: Vec::new() })
}

/// Fails now, in one line, rather than in the first job.
pub(crate) fn check_device(name: &str) -> anyhow::Result<()> {
    Device::parse_list(name)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ready_line_names_an_address_that_can_be_called() {
        for (listening, named) in [
            ("127.0.0.1:80", "127.0.0.1:80"),
            ("0.0.0.0:8080", "127.0.0.1:8080"),
            ("[::]:8080", "[::1]:8080"),
            ("192.0.2.7:1", "192.0.2.7:1"),
        ] {
            let listening = listening.parse().expect("address");
            assert_eq!(reachable(listening).to_string(), named);
        }
    }

    #[test]
    fn a_device_that_is_not_there_is_refused_by_name() {
        let error = check_device("cuda:63").expect_err("refused").to_string();
        assert!(error.contains("cuda:63"), "{error}");
    }
}
