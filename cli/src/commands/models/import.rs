//! `tunesmith models import`: any source → a Hugging Face directory → the installation.

use crate::installation::{Installation, InstallationArgs};
use crate::{bars, hub};
use anyhow::{Context as _, bail};
use clap::builder::NonEmptyStringValueParser;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tunesmith_engine::import::{Imported, import_source};
use tunesmith_store::StoreError;
use tunesmith_store::base_models::{BaseModel, NewBaseModel};

/// What to import, under which name.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A Hugging Face model directory, a .gguf file, or a hub id such as owner/name
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    source: String,
    /// What clients will call the model; the source's own name without it
    #[arg(long, value_parser = NonEmptyStringValueParser::new())]
    name: Option<String>,
    #[command(flatten)]
    installation: InstallationArgs,
}

/// Where a source lies.
#[derive(Debug, PartialEq)]
enum Source {
    Local(PathBuf),
    /// An id on the hub.
    Hub(String),
}

impl Source {
    fn parse(source: &str) -> anyhow::Result<Self> {
        if Path::new(source).exists() {
            Ok(Self::Local(source.into()))
        } else if hub::is_id(source) {
            Ok(Self::Hub(source.to_owned()))
        } else {
            bail!(
                "{source} is not there: give a Hugging Face model directory, a .gguf file, or a \
                 hub id such as owner/name"
            )
        }
    }

    /// The name that is known before anything is read.
    fn name(&self) -> Option<&str> {
        match self {
            Self::Local(_) => None,
            Self::Hub(id) => Some(id.rsplit_once('/').map_or(id.as_str(), |(_, name)| name)),
        }
    }
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let source = Source::parse(&args.source)?;
    let installation = args.installation.open().await?;
    let imported = import(&installation, source, args.name).await;
    installation.close().await?;
    let model = imported?;
    println!("{}", model.name);
    Ok(ExitCode::SUCCESS)
}

async fn import(
    installation: &Installation,
    source: Source,
    name: Option<String>,
) -> anyhow::Result<BaseModel> {
    let name = name.or_else(|| source.name().map(str::to_owned));
    if let Some(name) = &name {
        // Before a download or a conversion of minutes, rather than after it.
        refuse_taken(installation, name).await?;
    }
    let scratch = installation.scratch()?;
    let dir = scratch.path().join("model");
    let spinner = bars::spinner();
    spinner.set_message("the model is being read");
    let converted = {
        let dir = dir.clone();
        tokio::task::spawn_blocking(move || convert(&source, &dir)).await
    };
    let model = converted.context("the import was cut short")??;
    let has_chat_template = model.has_chat_template;
    spinner.set_message("the model is being stored");
    let new = NewBaseModel {
        name: name.unwrap_or(model.name),
        context_length: model.context_length,
        config: model.config,
    };
    let stored = installation.store().import_base_model(&new, &dir).await;
    spinner.finish_and_clear();
    if stored.is_ok() && !has_chat_template {
        eprintln!(
            "{} has no chat template: it takes prompt/completion and text rows; chat rows need a \
             model that was made for chat",
            new.name
        );
    }
    stored.map_err(|error| match error {
        StoreError::AlreadyExists { .. } => taken(&new.name),
        error => error.into(),
    })
}

fn convert(source: &Source, dir: &Path) -> anyhow::Result<Imported> {
    match source {
        Source::Local(path) => Ok(import_source(path, dir)?),
        Source::Hub(id) => Ok(import_source(&hub::download(id)?, dir)?),
    }
}

async fn refuse_taken(installation: &Installation, name: &str) -> anyhow::Result<()> {
    match installation.store().base_model(name).await {
        Ok(_) => Err(taken(name)),
        Err(StoreError::NotFound { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn taken(name: &str) -> anyhow::Error {
    anyhow::anyhow!("there is a base model {name} already: give another name with --name")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_is_there_comes_before_a_hub_id() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().to_str().expect("text");
        assert_eq!(Source::parse(path).expect("there"), Source::Local(path.into()));
        let hub = Source::parse("acme-x/tiny-chat-model").expect("an id");
        assert_eq!(hub.name(), Some("tiny-chat-model"));
        assert_eq!(Source::parse("gpt2-none-here").expect("an id").name(), Some("gpt2-none-here"));
    }

    #[test]
    fn a_path_that_is_not_there_is_refused_with_the_choices() {
        for source in ["/no/such/model.gguf", "./model", "a/b/c"] {
            let error = Source::parse(source).expect_err("not there").to_string();
            assert!(error.starts_with(&format!("{source} is not there: give")), "{error}");
        }
    }
}
