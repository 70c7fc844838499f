//! Whether an export says what the served model says.
//!
//! One of the two is in memory at a time. The served model is computed as it answers: the base
//! model's matrices, and an adapter beside them. The export is read by the importer and computed by
//! the trainer's forward pass, which shares neither the loading nor the cached attention. Both
//! multiply in f32 on the CPU, so that what differs is what the export has lost, and not what a
//! device rounds.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use tunesmith_core::export_check::{CheckFiles, CheckReply, Comparison, ExportForm};
use tunesmith_core::hyperparameters::Precision;
use tunesmith_core::memory::Size;
use tunesmith_core::weights::FloatType;

use super::comparison::Comparer;
use super::model::ServedModel;
use crate::device::Device;
use crate::error::EngineError;
use crate::export::safetensors::read_header;
use crate::import::import_source;
use crate::model_directory::weight_files;
use crate::models::config::ModelConfig;
use crate::sample;
use crate::train::memory;

/// Beside the weights: the program, a pass over a text, and what importing holds.
const BESIDE: u64 = 256 << 20;

/// Why there is no comparison.
enum Stopped {
    Unfit(String),
    NotMade(String),
}

impl From<EngineError> for Stopped {
    fn from(error: EngineError) -> Self {
        match error {
            // A full disk, or a file that is out of reach.
            EngineError::Io { .. } | EngineError::Device(_) => Self::NotMade(error.to_string()),
            other => Self::Unfit(other.to_string()),
        }
    }
}

/// Loads what is served and the export, and compares what they say.
pub(super) fn check(files: &CheckFiles) -> CheckReply {
    match compare(files) {
        Ok(comparison) => CheckReply::Compared(comparison),
        Err(Stopped::Unfit(reason)) => CheckReply::Unfit { reason },
        Err(Stopped::NotMade(reason)) => CheckReply::NotMade { reason },
    }
}

fn compare(files: &CheckFiles) -> Result<Comparison, Stopped> {
    require_memory(files)?;
    let served = served_logits(files)?;
    let model = match files.form {
        ExportForm::Adapter => sample::load(&files.model_dir, Some(&files.export_dir), &cpu()?)?,
        ExportForm::Model | ExportForm::Merged(_) => {
            import_source(&files.export_dir, &files.scratch_dir)?;
            sample::load(&files.scratch_dir, None, &cpu()?)?
        }
        ExportForm::Gguf(_) => {
            import_source(&gguf_file(&files.export_dir)?, &files.scratch_dir)?;
            sample::load(&files.scratch_dir, None, &cpu()?)?
        }
    };
    let mut comparer = Comparer::default();
    for (prompt, served) in files.prompts.iter().zip(&served) {
        let positions: Vec<usize> = (0..prompt.len()).collect();
        let export = model.logits(prompt, &positions)?;
        comparer.add(served, &export).map_err(Stopped::Unfit)?;
    }
    let numbers = match files.form {
        ExportForm::Model => narrowest(&float_tensors(&files.export_dir)?),
        ExportForm::Merged(form) => {
            let tensors = float_tensors(&files.export_dir)?;
            if let Some(dtype) = form.dtype {
                require_type(&tensors, dtype)?;
            }
            narrowest(&tensors)
        }
        ExportForm::Adapter | ExportForm::Gguf(_) => None,
    };
    Ok(comparer.finish(numbers))
}

fn cpu() -> Result<Device, EngineError> {
    Device::parse("cpu")
}

/// Fails where the weights, of which one set is in memory at a time, do not fit beside what runs.
fn require_memory(files: &CheckFiles) -> Result<(), Stopped> {
    let size = ModelConfig::read(&files.model_dir)?.size();
    let tokens: usize = files.prompts.iter().map(Vec::len).sum();
    let float = size_of::<f32>() as u64;
    let needed = float * (size.parameters() + tokens as u64 * size.vocab_size) + BESIDE;
    match memory::available() {
        Some(available) if needed > memory::usable(available) => Err(Stopped::NotMade(format!(
            "it needs about {} of memory, and the sampler has {} free",
            Size(needed),
            Size(available)
        ))),
        _ => Ok(()),
    }
}

/// The logits of every position of each text, as the served model has them.
fn served_logits(files: &CheckFiles) -> Result<Vec<Vec<Vec<f32>>>, Stopped> {
    let whose = |stopped| match stopped {
        Stopped::Unfit(reason) => Stopped::Unfit(format!("the served model is broken: {reason}")),
        not_made => not_made,
    };
    let compute = || {
        let mut model = ServedModel::load(&files.model_dir, &cpu()?, Precision::Fp32)?;
        let adaptation = match &files.adapter_dir {
            Some(dir) => Some(model.read_adapter(dir)?),
            None => None,
        };
        let logits = |prompt: &Vec<u32>| model.logits(prompt, adaptation.as_ref());
        files.prompts.iter().map(logits).collect::<Result<_, EngineError>>()
    };
    compute().map_err(|error| whose(error.into()))
}

fn gguf_file(dir: &Path) -> Result<PathBuf, EngineError> {
    let entries = fs::read_dir(dir).map_err(EngineError::io(dir))?;
    let mut paths = entries.filter_map(Result::ok).map(|entry| entry.path());
    paths
        .find(|path| path.extension().is_some_and(|extension| extension == "gguf"))
        .ok_or_else(|| EngineError::Model("there is no .gguf file in the export".to_owned()))
}

/// The tensors of a Hugging Face directory that hold floats.
fn float_tensors(dir: &Path) -> Result<Vec<(String, FloatType)>, EngineError> {
    let mut found = Vec::new();
    for name in weight_files(dir)? {
        let path = dir.join(name);
        let mut file = File::open(&path).map_err(EngineError::io(&path))?;
        let (_, metadata) = read_header(&path, &mut file)?;
        found.extend(metadata.tensors().into_iter().filter_map(|(name, tensor)| {
            Some((name, FloatType::parse(&tensor.dtype.to_string())?))
        }));
    }
    Ok(found)
}

fn narrowest(tensors: &[(String, FloatType)]) -> Option<FloatType> {
    // Of the two short ones, bf16 keeps fewer digits.
    let mut narrowest_first = FloatType::ALL.into_iter().rev();
    narrowest_first.find(|float| tensors.iter().any(|(_, found)| found == float))
}

/// Fails where a tensor has another type than was asked for.
fn require_type(tensors: &[(String, FloatType)], wanted: FloatType) -> Result<(), Stopped> {
    match tensors.iter().find(|(_, found)| *found != wanted) {
        Some((name, found)) => {
            Err(Stopped::Unfit(format!("{name} is {found} where {wanted} was asked for")))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use tunesmith_core::export_check::Bound;

    use super::*;

    fn reference(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference").join(name)
    }

    fn files(adapter: &str, export_dir: PathBuf, form: ExportForm, scratch: &Path) -> CheckFiles {
        CheckFiles {
            model_dir: reference("adapters/model"),
            adapter_dir: Some(reference("adapters/final").join(adapter)),
            export_dir,
            form,
            scratch_dir: scratch.join("imported"),
            prompts: vec![vec![1, 5, 6, 7], vec![9], vec![3; 20]],
        }
    }

    #[test]
    fn an_adapter_on_its_way_out_says_what_the_served_one_says_and_another_does_not() {
        let scratch = tempfile::tempdir().expect("temp dir");
        for name in ["lora", "dora", "dora_rslora_qv", "lora_last_layer"] {
            let export = reference("adapters/final").join(name);
            let files = files(name, export, ExportForm::Adapter, scratch.path());
            let CheckReply::Compared(found) = check(&files) else { panic!("{name}") };
            assert_eq!((found.texts, found.positions), (3, 25));
            let bound = Bound::of(ExportForm::Adapter, None);
            assert_eq!(bound.passed_by(&found), None, "{name}: {found:?}");
            assert!(found.max_abs_error > 0.0, "{name} is computed in two ways: {found:?}");
        }
        let other = reference("adapters/final/lora");
        let files = files("dora", other, ExportForm::Adapter, scratch.path());
        let CheckReply::Compared(found) = check(&files) else { panic!("another adapter loads") };
        assert!(Bound::of(ExportForm::Adapter, None).passed_by(&found).is_some(), "{found:?}");
    }

    #[test]
    fn an_export_of_another_type_than_was_asked_for_is_unfit_and_names_the_tensor() {
        let tensors = [("a".to_owned(), FloatType::F32), ("b".to_owned(), FloatType::Bf16)];
        assert_eq!(narrowest(&tensors), Some(FloatType::Bf16));
        assert!(require_type(&tensors[..1], FloatType::F32).is_ok());
        let Err(Stopped::Unfit(reason)) = require_type(&tensors, FloatType::F32) else {
            panic!("it is of two types")
        };
        assert_eq!(reason, "b is bf16 where f32 was asked for");
    }

    #[test]
    fn an_export_that_cannot_be_opened_is_unfit_and_says_why() {
        let scratch = tempfile::tempdir().expect("temp dir");
        let empty = tempfile::tempdir().expect("temp dir");
        let export = || empty.path().to_owned();
        let gguf = ExportForm::Gguf(tunesmith_core::gguf::StorageType::F16);
        let reply = check(&files("lora", export(), gguf, scratch.path()));
        let CheckReply::Unfit { reason } = reply else { panic!("{reply:?}") };
        assert_eq!(reason, "there is no .gguf file in the export");
        std::fs::write(empty.path().join("model.gguf"), b"GGUF").expect("write");
        let reply = check(&files("lora", export(), gguf, &scratch.path().join("b")));
        assert!(matches!(reply, CheckReply::Unfit { .. }), "{reply:?}");
    }

    #[test]
    fn a_disk_that_fails_says_nothing_of_the_export() {
        let scratch = tempfile::tempdir().expect("temp dir");
        let nowhere = scratch.path().join("nowhere");
        let reply = check(&files("lora", nowhere, ExportForm::Adapter, scratch.path()));
        assert!(matches!(reply, CheckReply::NotMade { .. }), "{reply:?}");
    }
}
