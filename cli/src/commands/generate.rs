//! `tunesmith generate`: one greedy answer, to look at what training did.

use anyhow::Context as _;
use std::path::PathBuf;
use std::process::ExitCode;
use tunesmith_core::dataset::{Message, Role};
use tunesmith_engine::Device;
use tunesmith_engine::sample;

/// Which model answers what.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A Hugging Face model directory
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// A PEFT adapter directory of that model
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// The user's message
    #[arg(long)]
    prompt: String,
    /// A system message before it
    #[arg(long)]
    system: Option<String>,
    /// The most tokens of the answer
    #[arg(long, default_value_t = 128)]
    max_new_tokens: usize,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, env = "TUNESMITH_DEVICE", default_value = "auto")]
    device: String,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let device = Device::parse(&args.device)?;
    let mut messages = Vec::new();
    if let Some(system) = &args.system {
        messages.push(Message::new(Role::System, system));
    }
    messages.push(Message::new(Role::User, &args.prompt));
    let answer = sample::answer(
        &args.model,
        args.adapter.as_deref(),
        &messages,
        args.max_new_tokens,
        &device,
    )
    .context("there is no answer")?;
    println!("{answer}");
    Ok(ExitCode::SUCCESS)
}
