//! `tunesmith migrate`: the database's tables as this program knows them.

use crate::installation;
use std::process::ExitCode;

/// Which database.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// postgres://…
    #[arg(long, env = "DATABASE_URL", value_name = "URL", hide_env_values = true)]
    database_url: String,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let store = installation::connect(&args.database_url, installation::NO_OBJECTS).await?;
    let migrated = store.migrate().await;
    store.close().await;
    migrated?;
    eprintln!("the database is up to date");
    Ok(ExitCode::SUCCESS)
}
