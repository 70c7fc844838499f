//! `tunesmith up`: everything on one machine, in one process but for PostgreSQL and what computes.

use crate::api_args::ApiArgs;
use crate::installation::{self, DEFAULT_DATA_DIR, DataDir};
use crate::parts::{self, CacheArgs, DEFAULT_LISTEN};
use crate::sampler_args::SamplerArgs;
use crate::{api_key, shutdown};
use anyhow::{Context as _, bail};
use std::path::PathBuf;
use std::process::ExitCode;
use tokio_util::sync::CancellationToken;
use tunesmith_api::ApiConfig;
use tunesmith_sampler::{Sampler, SamplerConfig};
use tunesmith_store::embedded::Embedded;
use tunesmith_worker::{Worker, WorkerConfig};

/// Where to listen, where to keep things and where to train.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where the API listens; port 0 takes a free one
    #[arg(long, env = "TUNESMITH_LISTEN", value_name = "ADDRESS", default_value = DEFAULT_LISTEN)]
    pub(crate) listen: String,
    /// Where everything is kept
    #[arg(
        long,
        env = "TUNESMITH_DATA_DIR",
        value_name = "DIR",
        default_value = DEFAULT_DATA_DIR
    )]
    pub(crate) data_dir: PathBuf,
    /// Where jobs train: auto, cpu, cuda, cuda:N, or a list of GPUs such as cuda:0,cuda:1
    #[arg(long, env = "TUNESMITH_DEVICE", default_value = "auto")]
    pub(crate) device: String,
    /// Train only, and answer no chat completions
    #[arg(long, env = "TUNESMITH_NO_SAMPLER")]
    no_sampler: bool,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    sampler: SamplerArgs,
    #[command(flatten)]
    api: ApiArgs,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let stop = shutdown::on_signal()?;
    parts::check_device(&args.device)?;
    let data = DataDir::create(&args.data_dir)?;
    let (cache_dir, work_dir) = (data.cache_dir(), data.work_dir());
    let worker =
        parts::worker_config(cache_dir.clone(), args.cache, work_dir.clone(), &args.device)?;
    let sampler =
        args.sampler.config("127.0.0.1:0", cache_dir, args.cache, work_dir, &args.device)?;
    let sampler = (!args.no_sampler).then_some(sampler);
    let postgres = Embedded::start(&data.root).await?;
    let api = args.api.config(&args.listen);
    let served = serve(&api, &data, worker, sampler, &postgres, stop).await;
    // Whatever happened: it is stopped in order, and its own failure does not hide the first one.
    let stopped = postgres.stop().await.context("PostgreSQL did not stop");
    served.and(stopped)?;
    Ok(ExitCode::SUCCESS)
}

/// Runs the API, the worker and the sampler until `stop`, or until one of them breaks down.
async fn serve(
    api: &ApiConfig,
    data: &DataDir,
    worker: WorkerConfig,
    sampler: Option<SamplerConfig>,
    postgres: &Embedded,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    // A pool of connections each: those that the API's threads opened end with its threads, while
    // the worker still writes its checkpoint.
    let object_store = data.object_store_url()?;
    let worker_store = installation::connect(postgres.url(), &object_store).await?;
    worker_store.migrate().await?;
    api_key::ensure(&worker_store, &data.api_key()).await?;
    let api_store = installation::connect(postgres.url(), &object_store).await?;

    let server = parts::bind_api(api, api_store.clone())?;
    let worker = Worker::new(worker_store.clone(), worker);
    let sampler = sampler.map(|config| Sampler::bind(worker_store.clone(), config)).transpose()?;
    parts::print_ready(server.local_addr());
    let parts = async {
        // One that breaks down stops the others.
        tokio::join!(
            async {
                let served = server.run(stop.clone().cancelled_owned()).await;
                stop.cancel();
                served
            },
            async {
                let worked = worker.run(stop.clone()).await;
                stop.cancel();
                worked
            },
            async {
                let Some(sampler) = sampler else { return Ok(()) };
                let sampled = sampler.run(stop.clone()).await;
                stop.cancel();
                sampled
            },
        )
    };
    let (served, worked, sampled) = tokio::select! {
        ended = parts => ended,
        exited = postgres.exited() => {
            let status = exited.context("PostgreSQL is out of sight")?;
            bail!("PostgreSQL ended by itself ({status}): see {}", data.postgres_log().display());
        }
    };
    api_store.close().await;
    worker_store.close().await;
    served.context("the API broke down")?;
    worked?;
    sampled?;
    Ok(())
}
