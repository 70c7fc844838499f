//! `tunesmith worker`: a worker alone. Any number of them share one queue.

use crate::installation::{DEFAULT_DATA_DIR, StoreArgs};
use crate::parts::CacheArgs;
use crate::{parts, shutdown};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tunesmith_worker::Worker;

/// Where jobs come from and where they train.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where jobs train: auto, cpu, cuda, cuda:N, or a list of GPUs such as cuda:0,cuda:1
    #[arg(long, env = "TUNESMITH_DEVICE", default_value = "auto")]
    device: String,
    /// Base models are kept here; workers of one machine may share it
    #[arg(long, env = "TUNESMITH_CACHE_DIR", value_name = "DIR", default_value_os_t = default_dir("cache"))]
    cache_dir: PathBuf,
    /// Files of the job at hand are kept here; workers of one machine may share it
    #[arg(long, env = "TUNESMITH_WORK_DIR", value_name = "DIR", default_value_os_t = default_dir("work"))]
    work_dir: PathBuf,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    store: StoreArgs,
}

/// Beside what `up` keeps.
pub(super) fn default_dir(name: &str) -> PathBuf {
    Path::new(DEFAULT_DATA_DIR).join(name)
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let stop = shutdown::on_signal()?;
    parts::check_device(&args.device)?;
    let config = parts::worker_config(args.cache_dir, args.cache, args.work_dir, &args.device)?;
    let store = args.store.connect().await?;
    Worker::new(store.clone(), config).run(stop).await?;
    store.close().await;
    Ok(ExitCode::SUCCESS)
}
