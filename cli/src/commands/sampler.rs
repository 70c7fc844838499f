//! `tunesmith sampler`: a sampler alone. Any number of them answer for one API.

use crate::installation::StoreArgs;
use crate::parts::CacheArgs;
use crate::sampler_args::SamplerArgs;
use crate::{parts, shutdown};
use std::path::PathBuf;
use std::process::ExitCode;
use tunesmith_sampler::Sampler;

use super::worker::default_dir;

/// Where to listen, where models come from and where they answer.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where it takes orders of APIs, which no client sees; port 0 takes a free one
    #[arg(
        long,
        env = "TUNESMITH_SAMPLER_LISTEN",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:0"
    )]
    listen: String,
    /// How APIs reach it, as in http://10.1.0.7:9000; where it listens unless this is given
    #[arg(long, env = "TUNESMITH_SAMPLER_URL", value_name = "URL")]
    url: Option<String>,
    /// Where models answer: auto, cpu, cuda or cuda:N
    #[arg(long, env = "TUNESMITH_DEVICE", default_value = "auto")]
    device: String,
    /// Base models are kept here; workers and samplers of one machine may share it
    #[arg(long, env = "TUNESMITH_CACHE_DIR", value_name = "DIR", default_value_os_t = default_dir("cache"))]
    cache_dir: PathBuf,
    /// Weights of tuned models are kept here on their way; samplers of one machine may share it
    #[arg(long, env = "TUNESMITH_WORK_DIR", value_name = "DIR", default_value_os_t = default_dir("work"))]
    work_dir: PathBuf,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    sampler: SamplerArgs,
    #[command(flatten)]
    store: StoreArgs,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let stop = shutdown::on_signal()?;
    parts::check_device(&args.device)?;
    let Args { listen, cache_dir, cache, work_dir, device, .. } = &args;
    let mut config =
        args.sampler.config(listen, cache_dir.clone(), *cache, work_dir.clone(), device)?;
    config.url = args.url;
    let store = args.store.connect().await?;
    Sampler::bind(store.clone(), config)?.run(stop).await?;
    store.close().await;
    Ok(ExitCode::SUCCESS)
}
