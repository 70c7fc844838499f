//! `tunesmith models weights`: downloads a tuned model and checks every byte of it.

use crate::bars;
use crate::rest::{Client, Download, RestError, ServerArgs};
use crate::unpack;
use anyhow::Context as _;
use clap::ValueEnum;
use futures::{StreamExt as _, TryStreamExt as _};
use reqwest::{Method, RequestBuilder};
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use tokio_util::io::{StreamReader, SyncIoBridge};
use tunesmith_core::errors::ErrorCode;
use tunesmith_core::export_check::{ExportCheck, ExportManifest, PassedCheck};
use tunesmith_core::weights::MANIFEST_NAME;

/// The wait between two looks at whether the server has checked the weights.
const COME_BACK: Duration = Duration::from_secs(5);

/// What comes out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// What was trained: a PEFT adapter directory, or the whole model after full fine-tuning
    Adapter,
    /// A Hugging Face model directory with the adapter merged into the weights
    Merged,
    /// The same as one GGUF file for llama.cpp, with a Modelfile for Ollama
    Gguf,
}

/// How the matrices of a GGUF are stored
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[expect(non_camel_case_types, reason = "the names by which GGUF calls its types")]
enum StorageType {
    /// Half precision
    #[value(name = "f16")]
    F16,
    /// Blocks of 32 with 8 bits a weight
    #[value(name = "q8_0")]
    Q8_0,
    /// Blocks of 256 with 4 bits a weight, and 6 where it matters most
    #[value(name = "q4_k_m")]
    Q4_K_M,
}

/// The type of a merged model's numbers
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Dtype {
    /// That of the base model; f32 of a model that was trained in full
    Auto,
    /// 4 bytes a number
    F32,
    /// 2 bytes, half precision
    F16,
    /// 2 bytes, as many digits as 8 bits hold and the range of f32
    Bf16,
}

/// Whether the weights are compared with the served model before they are given out
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Check {
    /// Where a sampler can do it
    Auto,
    /// Or not downloaded
    Required,
    /// No
    None,
}

/// Which weights, as what, where to.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The tuned model's name, or a checkpoint's
    name: String,
    /// What comes out
    #[arg(long, default_value = "adapter")]
    format: Format,
    /// How the matrices of a GGUF are stored; f16 without it
    #[arg(long = "type", value_name = "TYPE")]
    storage: Option<StorageType>,
    /// The type of a merged model's numbers; that of the base model without it
    #[arg(long)]
    dtype: Option<Dtype>,
    /// Bytes of tensors in each file of a merged model, at most; 5GB without it
    #[arg(long, value_name = "SIZE")]
    max_shard_size: Option<String>,
    /// Whether the server compares them with the served model first, which it does once
    #[arg(long, default_value = "auto")]
    check: Check,
    /// A directory that is new or empty; the model's name in the working directory without it
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    #[command(flatten)]
    server: ServerArgs,
}

/// Runs the command.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let output = args.output.unwrap_or_else(|| default_output(&args.name));
    // Before the download, which may be long.
    unpack::refuse_occupied(&output)?;
    let client = args.server.client()?;
    let format = args.format.to_possible_value().context("a format without a name")?;
    let mut request = client
        .request(Method::GET, &["models", &args.name, "weights"])
        .query(&[("format", format.get_name())]);
    if let Some(check) = args.check.to_possible_value() {
        request = request.query(&[("check", check.get_name())]);
    }
    if let Some(storage) = args.storage.and_then(|storage| storage.to_possible_value()) {
        request = request.query(&[("type", storage.get_name())]);
    }
    if let Some(dtype) = args.dtype.and_then(|dtype| dtype.to_possible_value()) {
        request = request.query(&[("dtype", dtype.get_name())]);
    }
    if let Some(size) = &args.max_shard_size {
        request = request.query(&[("max_shard_size", size)]);
    }
    let download = checked(&client, &request).await?;
    let bar = bars::bytes(download.size());
    let counted = bar.clone();
    let stream = download
        .into_stream()
        .boxed()
        .inspect_ok(move |chunk| counted.inc(chunk.len() as u64))
        .map_err(io::Error::other);
    let archive = SyncIoBridge::new(StreamReader::new(stream));
    let target = output.clone();
    let files = tokio::task::spawn_blocking(move || unpack::unpack(archive, &target))
        .await
        .context("unpacking was cut short")?;
    bar.finish_and_clear();
    for (name, bytes) in files? {
        println!("{bytes:>12}  {}", output.join(name).display());
    }
    let manifest = std::fs::read(output.join(MANIFEST_NAME)).context("the manifest")?;
    // A server of an earlier version says nothing of checks.
    if let Ok(manifest) = serde_json::from_slice::<ExportManifest>(&manifest) {
        println!("{}", sentence(&manifest.check));
    }
    Ok(ExitCode::SUCCESS)
}

/// The download, once the server has checked what it gives out.
async fn checked(client: &Client, request: &RequestBuilder) -> anyhow::Result<Download> {
    loop {
        let again = request.try_clone().context("a request that can be sent once")?;
        match client.download(again).await {
            Err(RestError::Server { code: Some(code), .. })
                if code == ErrorCode::ExportBeingChecked.as_str() =>
            {
                tokio::time::sleep(COME_BACK).await;
            }
            reply => return Ok(reply?),
        }
    }
}

/// What a person is told of a check.
fn sentence(check: &ExportCheck) -> String {
    match check {
        ExportCheck::Passed(PassedCheck { comparison, .. }) => format!(
            "Checked: the logits are those of the served model to {:.1e}, {:.1e} of their spread.",
            comparison.max_abs_error, comparison.relative_error
        ),
        ExportCheck::NotMade { reason, .. } => {
            format!("Not compared with the served model: {reason}")
        }
    }
}

/// The model's name as a directory's, without the characters that mean something in a path.
fn default_output(name: &str) -> PathBuf {
    Path::new(".").join(name.replace(['/', ':', '\\'], "-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_name_becomes_one_directory_below_the_working_directory() {
        for (name, dir) in [("ft:smol:org::x1", "./ft-smol-org--x1"), ("../..", "./..-..")] {
            assert_eq!(default_output(name), Path::new(dir));
        }
    }
}
