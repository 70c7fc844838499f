//! `tunesmith models import-adapter`: a PEFT directory → a tuned model, over REST.

use crate::rest::wire::Model;
use crate::rest::{ServerArgs, file_part};
use anyhow::{Context as _, bail};
use reqwest::Method;
use reqwest::multipart::{Form, Part};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tunesmith_core::weights::{ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME};

/// What PEFT wrote before it wrote safetensors.
const PICKLED: &str = "adapter_model.bin";

/// Which adapter, on which base model.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The directory that PEFT has saved: adapter_config.json and adapter_model.safetensors
    dir: PathBuf,
    /// The base model that the adapter was trained on, by its name here
    #[arg(long, value_name = "NAME")]
    model: String,
    /// A part of the new model's name
    #[arg(long)]
    suffix: Option<String>,
    #[command(flatten)]
    server: ServerArgs,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Args { dir, model, suffix, server } = args;
    let client = server.client()?;
    let config = dir.join(ADAPTER_CONFIG_NAME);
    let config = tokio::fs::read(&config)
        .await
        .with_context(|| format!("{} cannot be read: is it a PEFT directory?", config.display()))?;
    let (weights, bar) = file_part(&weights(&dir)?).await?;
    let mut form = Form::new()
        .text("model", model)
        .part("adapter_config", Part::bytes(config).file_name(ADAPTER_CONFIG_NAME));
    if let Some(suffix) = suffix {
        form = form.text("suffix", suffix);
    }
    let form = form.part("adapter_model", weights);
    let imported = client.json(client.request(Method::POST, &["models"]).multipart(form)).await;
    bar.finish_and_clear();
    let model: Model = imported.with_context(|| format!("{} was not imported", dir.display()))?;
    println!("{}", model.id);
    Ok(ExitCode::SUCCESS)
}

/// The file of the tensors.
fn weights(dir: &Path) -> anyhow::Result<PathBuf> {
    let weights = dir.join(ADAPTER_WEIGHTS_NAME);
    if !weights.exists() && dir.join(PICKLED).exists() {
        bail!(
            "{} holds {PICKLED}, a pickle, which may run code and is not read: load it with PEFT \
             and save it again, which writes {ADAPTER_WEIGHTS_NAME}",
            dir.display()
        );
    }
    Ok(weights)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pickle_is_refused_with_the_way_out() {
        let dir = tempfile::tempdir().expect("temp dir");
        std::fs::write(dir.path().join(PICKLED), "").expect("write");
        let error = weights(dir.path()).expect_err("a pickle").to_string();
        assert!(error.contains("save it again"), "{error}");
        std::fs::write(dir.path().join(ADAPTER_WEIGHTS_NAME), "").expect("write");
        assert_eq!(weights(dir.path()).expect("there"), dir.path().join(ADAPTER_WEIGHTS_NAME));
    }
}
