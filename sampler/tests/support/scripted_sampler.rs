//! Stands in for a sampler's child: speaks its protocol, and answers by rules that a test can
//! foretell. Its prompt's first token says what it does.

use std::io::{BufReader, Write as _};
use std::path::Path;
use std::time::Duration;
use tunesmith_core::errors::ErrorCode;
use tunesmith_core::export_check::{CheckFiles, CheckReply};
use tunesmith_core::protocol::{read_frame, write_frame};
use tunesmith_core::sampling::{EndReason, FromSampler, SampleRequest, ToSampler, TokenLogprob};

/// Exits at once with status 9.
const DIE: u32 = 9001;
/// Says one token and then nothing more; a check waits until its scratch directory is removed.
const HANG: u32 = 9002;
/// Fails by itself.
const FAIL: u32 = 9003;
/// Tells of what was cancelled and unloaded so far, and which process it is.
const TELL: u32 = 9004;

fn main() {
    let mut input = BufReader::new(std::io::stdin().lock());
    let mut output = std::io::stdout().lock();
    let mut say = |message: &FromSampler| {
        write_frame(&mut output, message).expect("write");
        output.flush().expect("flush");
    };
    let mut adapters: Vec<String> = Vec::new();
    let (mut cancelled, mut unloaded) = (0, 0);
    while let Some(message) = read_frame(&mut input).expect("a frame") {
        match message {
            ToSampler::Load { base_model_dir, .. } if has(&base_model_dir, "config.json") => {
                eprintln!("loaded {}", base_model_dir.display());
                say(&FromSampler::Loaded { device: "paper".to_owned() });
            }
            ToSampler::Load { .. } => {
                say(&FromSampler::LoadFailed { message: "there is no config.json".to_owned() });
                return;
            }
            ToSampler::LoadAdapter { adapter, dir } if has(&dir, "adapter_config.json") => {
                adapters.push(adapter.clone());
                say(&FromSampler::AdapterLoaded { adapter });
            }
            ToSampler::LoadAdapter { adapter, .. } => {
                let message = "there is no adapter_config.json".to_owned();
                say(&FromSampler::AdapterFailed { adapter, message });
            }
            ToSampler::UnloadAdapter { adapter } => {
                adapters.retain(|known| *known != adapter);
                unloaded += 1;
            }
            ToSampler::Cancel { .. } => cancelled += 1,
            ToSampler::Check(files) if files.prompts[0][0] == DIE => std::process::exit(9),
            ToSampler::Check(files) if files.prompts[0][0] == HANG => {
                wait_with(&files.scratch_dir);
                say(&FromSampler::Checked { reply: CheckReply::Unfit { reason: seen(&files) } });
                return;
            }
            ToSampler::Check(files) => {
                say(&FromSampler::Checked { reply: CheckReply::Unfit { reason: seen(&files) } });
                return;
            }
            ToSampler::Sample(request) => match request.prompt[0] {
                DIE => std::process::exit(9),
                HANG => say(&token(&request, 0, 7)),
                FAIL => {
                    let (code, message) = (ErrorCode::OutOfMemory, "too long".to_owned());
                    say(&FromSampler::Failed { id: request.id, code, message });
                }
                TELL => {
                    for told in [cancelled, unloaded, std::process::id()] {
                        say(&token(&request, 0, told));
                    }
                    say(&end(&request, 0));
                }
                _ => {
                    let adapter = request.adapter.as_ref();
                    assert!(adapter.is_none_or(|name| adapters.contains(name)), "{request:?}");
                    answer(&request, &mut say);
                }
            },
        }
    }
}

/// Makes `dir`, which tells that it waits, and returns when somebody has removed it.
fn wait_with(dir: &Path) {
    std::fs::create_dir(dir).expect("create");
    while dir.exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What it was given, in words.
fn seen(files: &CheckFiles) -> String {
    let names = |dir: &Path| {
        let entries = std::fs::read_dir(dir).expect("a directory").flatten();
        let mut names: Vec<_> =
            entries.map(|entry| entry.file_name().into_string().expect("text")).collect();
        names.sort();
        names.join("+")
    };
    format!(
        "{} as {} beside {} and {}",
        names(&files.export_dir),
        files.form,
        names(&files.model_dir),
        files.adapter_dir.as_deref().map_or_else(|| "nothing".to_owned(), names),
    )
}

fn has(dir: &Path, name: &str) -> bool {
    dir.join(name).is_file()
}

/// Each token of the prompt plus one; with an adapter, plus a hundred.
fn answer(request: &SampleRequest, say: &mut impl FnMut(&FromSampler)) {
    let more = if request.adapter.is_some() { 100 } else { 1 };
    for index in 0..request.n {
        for id in request.prompt.iter().take(request.sampling.max_tokens as usize) {
            say(&token(request, index, id + more));
        }
        say(&end(request, index));
    }
}

fn token(request: &SampleRequest, index: u32, id: u32) -> FromSampler {
    let token = TokenLogprob { id, logprob: -0.5 };
    FromSampler::Token { id: request.id, index, token, top: Vec::new() }
}

fn end(request: &SampleRequest, index: u32) -> FromSampler {
    FromSampler::End { id: request.id, index, reason: EndReason::Stop, cached_tokens: 0 }
}
