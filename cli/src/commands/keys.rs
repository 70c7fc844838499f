//! `tunesmith keys`: API keys, made and taken back by whoever can reach the database.

use crate::installation::InstallationArgs;
use crate::table;
use std::process::ExitCode;
use tunesmith_core::ids::{AdminKeyId, ApiKeyId};
use tunesmith_store::page::PageRequest;
use tunesmith_store::tenants::DEFAULT_ORGANIZATION;
use tunesmith_store::{Store, StoreError};

/// `tunesmith keys …`.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Make an API key to a project and print it; it cannot be shown again
    Create {
        /// The project, which is made if it is not there
        #[arg(long, required_unless_present = "admin")]
        project: Option<String>,
        /// Make a key to the organisation's projects and keys instead
        #[arg(long, conflicts_with = "project")]
        admin: bool,
        /// The project's owner, which is made if it is not there
        #[arg(long, default_value = DEFAULT_ORGANIZATION)]
        organization: String,
        /// What the key is for, in words
        #[arg(long, default_value = "")]
        name: String,
        #[command(flatten)]
        installation: InstallationArgs,
    },
    /// List the keys that work, without their secrets
    List {
        #[command(flatten)]
        installation: InstallationArgs,
    },
    /// Make a key worthless from now on
    Revoke {
        /// The key's id, as `keys list` shows it
        id: String,
        #[command(flatten)]
        installation: InstallationArgs,
    },
}

/// Runs the command.
pub(crate) async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Create { project, admin: _, organization, name, installation } => {
            let installation = installation.open_database().await?;
            let made = create(installation.store(), project.as_deref(), &organization, &name).await;
            installation.close().await?;
            println!("{}", made?);
        }
        Command::List { installation } => {
            let installation = installation.open_database().await?;
            let listed = list(installation.store()).await;
            installation.close().await?;
            print!("{}", table::render(["ID", "KEY", "PROJECT", "NAME", "CREATED"], &listed?));
        }
        Command::Revoke { id, installation } => {
            let installation = installation.open_database().await?;
            let revoked = revoke(installation.store(), &id).await;
            installation.close().await?;
            revoked?;
            eprintln!("{id} opens nothing any more");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The secret of a new key: to a project, or, without one, an admin key.
async fn create(
    store: &Store,
    project: Option<&str>,
    organization: &str,
    name: &str,
) -> Result<String, StoreError> {
    match project {
        Some(project) => {
            let project = store.create_project(organization, project).await?;
            Ok(store.create_api_key(&project, name).await?.secret)
        }
        None => {
            let organization = store.create_organization(organization).await?;
            Ok(store.create_admin_key(&organization, name, None).await?.secret)
        }
    }
}

async fn list(store: &Store) -> Result<Vec<[String; 5]>, StoreError> {
    let everything = PageRequest::first(u32::MAX);
    let time = |time: time::OffsetDateTime| table::time(time.unix_timestamp());
    let admin = store.list_admin_keys(None, &everything).await?.items.into_iter().map(|key| {
        [key.id.to_string(), key.redacted, "(admin)".to_owned(), key.name, time(key.created_at)]
    });
    let keys = store.list_api_keys(None, &everything).await?.items.into_iter();
    let keys = keys
        .map(|key| [key.id.to_string(), key.redacted, key.project, key.name, time(key.created_at)]);
    Ok(admin.chain(keys).collect())
}

async fn revoke(store: &Store, id: &str) -> Result<(), StoreError> {
    if id.starts_with(AdminKeyId::PREFIX) {
        store.revoke_admin_key(None, &AdminKeyId::from(id)).await
    } else {
        store.revoke_api_key(None, &ApiKeyId::from(id)).await
    }
}
