//! `tunesmith projects`: the tenants of an installation.

use crate::installation::InstallationArgs;
use crate::table;
use std::process::ExitCode;
use tunesmith_store::page::PageRequest;
use tunesmith_store::tenants::DEFAULT_ORGANIZATION;

/// `tunesmith projects …`.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Make a project and print its id; one of that name that is there is no error
    Create {
        /// Its name
        name: String,
        /// Its owner, which is made if it is not there
        #[arg(long, default_value = DEFAULT_ORGANIZATION)]
        organization: String,
        #[command(flatten)]
        installation: InstallationArgs,
    },
    /// List the projects, archived ones too
    List {
        #[command(flatten)]
        installation: InstallationArgs,
    },
}

/// Runs the command.
pub(crate) async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Create { name, organization, installation } => {
            let installation = installation.open_database().await?;
            let made = installation.store().create_project(&organization, &name).await;
            installation.close().await?;
            println!("{}", made?);
        }
        Command::List { installation } => {
            let installation = installation.open_database().await?;
            let everything = PageRequest::first(u32::MAX);
            let listed = installation.store().list_projects(None, true, &everything).await;
            installation.close().await?;
            let rows: Vec<_> = listed?
                .items
                .into_iter()
                .map(|project| {
                    let created = table::time(project.created_at.unix_timestamp());
                    let status = if project.archived_at.is_some() { "archived" } else { "active" };
                    let id = project.id.to_string();
                    [id, project.name, project.organization, created, status.to_owned()]
                })
                .collect();
            let header = ["ID", "NAME", "ORGANIZATION", "CREATED", "STATUS"];
            print!("{}", table::render(header, &rows));
        }
    }
    Ok(ExitCode::SUCCESS)
}
