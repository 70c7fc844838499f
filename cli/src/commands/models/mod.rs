//! `tunesmith models`: base models and adapters into the installation, weights of tuned ones out.

mod import;
mod import_adapter;
mod list;
mod weights;

use std::process::ExitCode;

/// `tunesmith models …`.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Register a base model: a Hugging Face directory, a .gguf file, or a hub id
    Import(import::Args),
    /// Make a tuned model of an adapter that PEFT or another program has saved
    ImportAdapter(import_adapter::Args),
    /// List the models there are
    List(list::Args),
    /// Download a tuned model's weights
    Weights(weights::Args),
}

/// Runs the command.
pub(crate) async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Import(args) => import::run(args).await,
        Command::ImportAdapter(args) => import_adapter::run(args).await,
        Command::List(args) => list::run(args).await,
        Command::Weights(args) => weights::run(args).await,
    }
}
