//! The `tunesmith` program. It reads its arguments, starts the parts and wires them together;
//! what the parts do is in the crates that they live in.

mod api_args;
mod api_key;
mod bars;
mod commands;
mod follow;
mod hub;
mod installation;
mod logging;
#[cfg(feature = "otel")]
mod otel;
mod parts;
mod preview_table;
mod rest;
mod sampler_args;
mod shutdown;
mod table;
mod unpack;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// A self-hosted fine-tuning service with OpenAI's REST contract.
#[derive(Debug, Parser)]
#[command(name = "tunesmith", version)]
struct Cli {
    /// How log lines look on standard error; RUST_LOG says which ones there are.
    #[arg(long, global = true, env = "TUNESMITH_LOG_FORMAT", default_value = "text")]
    log_format: logging::Format,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start everything on this machine: PostgreSQL, object store, API, a worker and a sampler
    Up(commands::up::Args),
    /// Start the REST API alone
    Api(commands::api::Args),
    /// Start a worker alone
    Worker(commands::worker::Args),
    /// Start a sampler alone, which answers chat completions for the API
    Sampler(commands::sampler::Args),
    /// Bring the database's tables up to date
    Migrate(commands::migrate::Args),
    /// API keys
    #[command(subcommand)]
    Keys(commands::keys::Command),
    /// Projects, the tenants of an installation
    #[command(subcommand)]
    Projects(commands::projects::Command),
    /// Base models and the weights of tuned ones
    #[command(subcommand)]
    Models(commands::models::Command),
    /// Fine-tuning jobs
    #[command(subcommand)]
    Jobs(commands::jobs::Command),
    /// Uploaded files
    #[command(subcommand)]
    Files(commands::files::Command),
    /// Print the description of the REST API, OpenAPI 3.1 in YAML
    Openapi,
    /// The worker's trainer: speaks frames on standard input and output
    #[command(hide = true)]
    Train,
    /// The sampler's child, which holds one base model: speaks frames as the trainer does
    #[command(hide = true)]
    Sample,
    /// Answer one prompt, greedily, from a model directory
    #[command(hide = true)]
    Generate(commands::generate::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match start(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(cli: Cli) -> anyhow::Result<ExitCode> {
    let _logging = logging::init(cli.log_format, cli.command.is_service())?;
    run(cli.command)
}

impl Command {
    /// Whether it runs until it is told to stop, and answers others meanwhile.
    fn is_service(&self) -> bool {
        matches!(self, Self::Up(_) | Self::Api(_) | Self::Worker(_) | Self::Sampler(_))
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    // The trainer has no sockets and no use for an async runtime's threads.
    match command {
        Command::Train => return Ok(commands::train::run()),
        Command::Sample => return Ok(commands::sample::run()),
        Command::Generate(args) => return commands::generate::run(&args),
        Command::Openapi => {
            print!("{}", tunesmith_api::openapi_yaml());
            return Ok(ExitCode::SUCCESS);
        }
        _ => {}
    }
    // Every TLS client of the process takes this one; it fails only when one is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("the async runtime does not start")?;
    runtime.block_on(async {
        match command {
            Command::Up(args) => commands::up::run(args).await,
            Command::Api(args) => commands::api::run(args).await,
            Command::Worker(args) => commands::worker::run(args).await,
            Command::Sampler(args) => commands::sampler::run(args).await,
            Command::Migrate(args) => commands::migrate::run(args).await,
            Command::Keys(command) => commands::keys::run(command).await,
            Command::Projects(command) => commands::projects::run(command).await,
            Command::Models(command) => commands::models::run(command).await,
            Command::Jobs(command) => commands::jobs::run(command).await,
            Command::Files(command) => commands::files::run(command).await,
            Command::Train | Command::Sample | Command::Generate(_) | Command::Openapi => {
                Ok(ExitCode::SUCCESS)
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_commands_and_flags_fit_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn up_listens_on_the_loopback_interface_unless_told_otherwise() {
        let cli = Cli::try_parse_from(["tunesmith", "up"]).expect("parses");
        let Command::Up(args) = cli.command else { panic!("not up: {cli:?}") };
        assert!(args.listen.starts_with("127.0.0.1:"), "{}", args.listen);
        assert_eq!(args.data_dir.to_str(), Some("tunesmith-data"));
    }

    #[test]
    fn an_unknown_log_format_is_refused_with_the_choices() {
        let error = Cli::try_parse_from(["tunesmith", "--log-format", "xml", "up"])
            .expect_err("refused")
            .to_string();
        assert!(error.contains("text") && error.contains("json"), "{error}");
    }

    #[test]
    fn hidden_commands_are_not_in_the_help_and_still_parse() {
        let help = Cli::command().render_long_help().to_string();
        assert!(!help.contains("generate") && help.contains("worker"), "{help}");
        assert!(Cli::try_parse_from(["tunesmith", "train"]).is_ok());
    }
}
