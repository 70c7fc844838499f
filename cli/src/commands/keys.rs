//! `tunesmith keys`: API keys, made by whoever can reach the database.

use crate::installation::InstallationArgs;
use std::process::ExitCode;
use tunesmith_store::tenants::DEFAULT_ORGANIZATION;

/// `tunesmith keys …`.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Make an API key to a project and print it; it cannot be shown again
    Create {
        /// The project, which is made if it is not there
        #[arg(long)]
        project: String,
        /// The project's owner, which is made if it is not there
        #[arg(long, default_value = DEFAULT_ORGANIZATION)]
        organization: String,
        /// What the key is for, in words
        #[arg(long, default_value = "")]
        name: String,
        #[command(flatten)]
        installation: InstallationArgs,
    },
}

/// Runs the command.
pub(crate) async fn run(command: Command) -> anyhow::Result<ExitCode> {
    let Command::Create { project, organization, name, installation } = command;
    let installation = installation.open_database().await?;
    let store = installation.store();
    let made = async {
        let project = store.create_project(&organization, &project).await?;
        store.create_api_key(&project, &name).await
    }
    .await;
    installation.close().await?;
    println!("{}", made?.secret);
    Ok(ExitCode::SUCCESS)
}
