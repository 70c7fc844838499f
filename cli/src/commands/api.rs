//! `tunesmith api`: the REST API alone.

use crate::api_args::ApiArgs;
use crate::installation::StoreArgs;
use crate::parts::{self, DEFAULT_LISTEN};
use crate::shutdown;
use anyhow::Context as _;
use std::process::ExitCode;

/// Where to listen and what to serve.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where the API listens; port 0 takes a free one
    #[arg(long, env = "TUNESMITH_LISTEN", value_name = "ADDRESS", default_value = DEFAULT_LISTEN)]
    listen: String,
    #[command(flatten)]
    api: ApiArgs,
    #[command(flatten)]
    store: StoreArgs,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let stop = shutdown::on_signal()?;
    let store = args.store.connect().await?;
    let server = parts::bind_api(&args.api.config(&args.listen), store.clone())?;
    parts::print_ready(server.local_addr());
    server.run(stop.cancelled_owned()).await.context("the API broke down")?;
    store.close().await;
    Ok(ExitCode::SUCCESS)
}
