//! The sampler's child: frames in on standard input, frames out on standard output.

use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::thread;

use tunesmith_core::protocol::{read_frame, write_frame};
use tunesmith_core::sampling::{FromSampler, ToSampler};

use super::batcher::Batcher;
use super::check::check;
use super::model::ServedModel;
use crate::child::take_stdout;
use crate::device::Device;
use crate::error::EngineError;

/// Answers on this process's standard input and output until the input ends: the sampler is gone.
///
/// The exit status is 1 when the model could not be loaded, which was said, or the device failed.
#[must_use]
pub fn run_sampler() -> ExitCode {
    let output = match take_stdout() {
        Ok(output) => output,
        Err(error) => {
            tracing::error!(%error, "the sampler's child cannot take its standard output");
            return ExitCode::FAILURE;
        }
    };
    serve(io::stdin(), output)
}

/// As [`run_sampler`], on any streams.
pub(crate) fn serve(input: impl Read + Send + 'static, mut output: impl Write) -> ExitCode {
    let (sender, messages) = mpsc::channel();
    // Not joined: it waits on a read that may never end.
    thread::spawn(move || listen(input, &sender));
    let mut batcher = match messages.recv() {
        Ok(ToSampler::Load { base_model_dir, device, precision, max_batch, cache_bytes }) => {
            let loaded = Device::parse(&device).and_then(|device| {
                let model = ServedModel::load(&base_model_dir, &device, precision)?;
                Ok((Batcher::new(model, max_batch, cache_bytes as usize), device))
            });
            let (message, batcher) = match loaded {
                Ok((batcher, device)) => {
                    (FromSampler::Loaded { device: device.to_string() }, Some(batcher))
                }
                Err(error) => (FromSampler::LoadFailed { message: error.to_string() }, None),
            };
            if write_frame(&mut output, &message).is_err() {
                return ExitCode::FAILURE;
            }
            match batcher {
                Some(batcher) => batcher,
                None => return ExitCode::FAILURE,
            }
        }
        Ok(ToSampler::Check(files)) => {
            let reply = FromSampler::Checked { reply: check(&files) };
            return match write_frame(&mut output, &reply) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            };
        }
        Ok(_) => {
            tracing::error!("the sampler spoke before it named a model");
            return ExitCode::FAILURE;
        }
        Err(_) => return ExitCode::SUCCESS,
    };
    match answer(&mut batcher, &messages, &mut output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(EngineError::Report(error)) => {
            tracing::warn!(%error, "the sampler no longer reads: its child leaves");
            ExitCode::FAILURE
        }
        Err(error) => {
            tracing::error!(%error, "the sampler's child cannot go on");
            ExitCode::FAILURE
        }
    }
}

/// Passes messages on until the input ends.
fn listen(mut input: impl Read, sender: &mpsc::Sender<ToSampler>) {
    loop {
        match read_frame(&mut input) {
            Ok(Some(message)) => {
                if sender.send(message).is_err() {
                    return;
                }
            }
            Ok(None) => return,
            Err(error) => {
                tracing::error!(%error, "the sampler's words cannot be read");
                return;
            }
        }
    }
}

/// Works while the input lasts.
fn answer(
    batcher: &mut Batcher,
    messages: &Receiver<ToSampler>,
    output: &mut impl Write,
) -> Result<(), EngineError> {
    loop {
        let message = match batcher.is_idle() {
            true => messages.recv().map_err(|_| TryRecvError::Disconnected),
            false => messages.try_recv(),
        };
        let mut said = Vec::new();
        let mut sink = |message| said.push(message);
        match message {
            Ok(message) => obey(batcher, message, &mut sink),
            Err(TryRecvError::Empty) => batcher.step(&mut sink)?,
            Err(TryRecvError::Disconnected) => return Ok(()),
        }
        for message in &said {
            write_frame(output, message).map_err(EngineError::Report)?;
        }
    }
}

fn obey(batcher: &mut Batcher, message: ToSampler, sink: &mut dyn FnMut(FromSampler)) {
    match message {
        ToSampler::Load { .. } | ToSampler::Check(_) => {
            tracing::error!("the sampler named a second model");
        }
        ToSampler::LoadAdapter { adapter, dir } => {
            sink(match batcher.load_adapter(adapter.clone(), &dir) {
                Ok(()) => FromSampler::AdapterLoaded { adapter },
                Err(error) => FromSampler::AdapterFailed { adapter, message: error.to_string() },
            });
        }
        ToSampler::UnloadAdapter { adapter } => batcher.unload_adapter(&adapter),
        ToSampler::Sample(request) => batcher.submit(request, sink),
        ToSampler::Cancel { id } => batcher.cancel(id),
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use tunesmith_core::hyperparameters::Precision;
    use tunesmith_core::sampling::{SampleRequest, Sampling};

    use super::*;

    fn reference(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference").join(name)
    }

    fn load(base_model_dir: PathBuf) -> ToSampler {
        let (device, precision) = ("cpu".to_owned(), Precision::Auto);
        ToSampler::Load { base_model_dir, device, precision, max_batch: 4, cache_bytes: 1 << 20 }
    }

    fn sample(id: u64, adapter: &str) -> ToSampler {
        ToSampler::Sample(SampleRequest {
            id,
            adapter: Some(adapter.to_owned()),
            prompt: vec![5, 6, 7],
            n: 1,
            sampling: Sampling { temperature: 1.0, top_p: 0.9, seed: 3, ..Sampling::greedy(3) },
            low_priority: false,
        })
    }

    /// A pipe that is written by `script`, which sees what the child says.
    fn talk(script: impl FnOnce(&mut dyn Write, &mut dyn Read) + Send + 'static) -> ExitCode {
        let (input, mut to_child) = io::pipe().expect("pipe");
        let (mut from_child, output) = io::pipe().expect("pipe");
        let user = thread::spawn(move || script(&mut to_child, &mut from_child));
        let code = serve(input, output);
        user.join().expect("the script's assertions hold");
        code
    }

    fn say(mut to: &mut dyn Write, message: &ToSampler) {
        write_frame(&mut to, message).expect("write");
    }

    fn hear(mut from: &mut dyn Read) -> FromSampler {
        read_frame(&mut from).expect("a frame").expect("a message")
    }

    #[test]
    fn child_loads_a_model_and_an_adapter_answers_and_leaves_when_its_input_ends() {
        let code = talk(|to, from| {
            say(to, &load(reference("adapters/model")));
            assert_eq!(hear(from), FromSampler::Loaded { device: "cpu".to_owned() });
            let adapter = || "mine".to_owned();
            say(to, &sample(1, "mine"));
            assert!(matches!(hear(from), FromSampler::Failed { id: 1, .. }));
            let dir = reference("adapters/final/nowhere");
            say(to, &ToSampler::LoadAdapter { adapter: adapter(), dir });
            assert!(matches!(hear(from), FromSampler::AdapterFailed { .. }));
            let dir = reference("adapters/final/dora");
            say(to, &ToSampler::LoadAdapter { adapter: adapter(), dir });
            assert_eq!(hear(from), FromSampler::AdapterLoaded { adapter: adapter() });
            say(to, &sample(2, "mine"));
            for _ in 0..3 {
                assert!(matches!(hear(from), FromSampler::Token { id: 2, index: 0, .. }));
            }
            assert!(matches!(hear(from), FromSampler::End { id: 2, index: 0, .. }));
        });
        assert_eq!(code, ExitCode::SUCCESS);
    }

    #[test]
    fn model_that_cannot_be_loaded_is_told_and_ends_the_child() {
        let code = talk(|to, from| {
            say(to, &load(reference("nowhere")));
            let FromSampler::LoadFailed { message } = hear(from) else { panic!("not loaded") };
            assert!(message.contains("nowhere"), "{message}");
        });
        assert_eq!(code, ExitCode::FAILURE);
    }

    #[test]
    fn child_of_a_sampler_that_is_gone_leaves_in_the_middle_of_an_answer() {
        let code = talk(|to, from| {
            say(to, &load(reference("adapters/model")));
            hear(from);
            let ToSampler::Sample(mut request) = sample(1, "mine") else { panic!("a request") };
            request.adapter = None;
            request.sampling.max_tokens = 400;
            say(to, &ToSampler::Sample(request));
            hear(from);
        });
        // Whichever it notices first: that nothing comes in, or that nobody reads.
        let gone = [ExitCode::SUCCESS, ExitCode::FAILURE];
        assert!(gone.contains(&code));
    }
}
