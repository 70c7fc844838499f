//! `tunesmith models weights`: downloads a tuned model and checks every byte of it.

use crate::bars;
use crate::rest::ServerArgs;
use crate::unpack;
use anyhow::Context as _;
use clap::ValueEnum;
use futures::{StreamExt as _, TryStreamExt as _};
use reqwest::Method;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tokio_util::io::{StreamReader, SyncIoBridge};

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
    if let Some(storage) = args.storage.and_then(|storage| storage.to_possible_value()) {
        request = request.query(&[("type", storage.get_name())]);
    }
    let download = client.download(request).await?;
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
    Ok(ExitCode::SUCCESS)
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
