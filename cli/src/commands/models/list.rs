//! `tunesmith models list`: base models of the installation, or all models that a key may see.

use crate::installation::InstallationArgs;
use crate::rest::Client;
use crate::rest::wire::{Model, Page};
use crate::table;
use indicatif::HumanBytes;
use reqwest::Url;
use std::process::ExitCode;
use tunesmith_store::base_models::BaseModel;

/// Whom to ask. With a server's address and no installation named, the server; else the database.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    installation: InstallationArgs,
    /// A server's address, /v1 included: lists base and tuned models over REST
    #[arg(long, env = "TUNESMITH_BASE_URL", value_name = "URL")]
    base_url: Option<Url>,
    /// An API key of that server
    #[arg(long, env = "TUNESMITH_API_KEY", value_name = "KEY", hide_env_values = true)]
    api_key: Option<String>,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.base_url {
        Some(url) if !args.installation.is_named() => {
            let client = Client::new(url, args.api_key.as_deref())?;
            let page: Page<Model> = client.get(&["models"], &[]).await?;
            let row = |model: &Model| {
                [model.id.clone(), table::time(model.created), model.owned_by.clone()]
            };
            let rows: Vec<_> = page.data.iter().map(row).collect();
            print!("{}", table::render(["NAME", "CREATED", "OWNER"], &rows));
        }
        _ => base_models(&args.installation).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn base_models(installation: &InstallationArgs) -> anyhow::Result<()> {
    let installation = installation.open().await?;
    let listed = installation.store().list_base_models().await;
    installation.close().await?;
    let rows: Vec<_> = listed?.iter().map(row).collect();
    print!("{}", table::render(["NAME", "IMPORTED", "CONTEXT", "SIZE"], &rows));
    Ok(())
}

fn row(model: &BaseModel) -> [String; 4] {
    [
        model.name.clone(),
        table::time(model.created_at.unix_timestamp()),
        model.context_length.to_string(),
        HumanBytes(model.bytes()).to_string(),
    ]
}
