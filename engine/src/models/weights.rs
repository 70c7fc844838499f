//! Safetensors files of a model directory, mapped into memory and read as f32.

#![expect(
    unsafe_code,
    reason = "mapping a file is unsafe because another process could change it while it is read"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::{Mmap, UncheckedAdvice};
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::error::EngineError;

/// A file of one model, and a file that lists several.
const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

/// All weights of a directory, each to be taken once.
pub(crate) struct WeightFiles {
    dir: PathBuf,
    files: Vec<WeightFile>,
    /// By name; in order, so that errors are the same from run to run.
    tensors: BTreeMap<String, Location>,
}

struct WeightFile {
    name: String,
    bytes: Mmap,
}

struct Location {
    file: usize,
    /// Bytes from the start of the file.
    start: usize,
    end: usize,
    dtype: Dtype,
    shape: Vec<usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl WeightFiles {
    /// Maps `model.safetensors`, or else the files that `model.safetensors.index.json` lists.
    ///
    /// # Errors
    /// [`EngineError::Io`] for a file that cannot be read; [`EngineError::Model`] for one that is
    /// malformed, or when neither is there.
    pub(crate) fn open(dir: &Path) -> Result<Self, EngineError> {
        let mut weights = Self { dir: dir.to_owned(), files: Vec::new(), tensors: BTreeMap::new() };
        if dir.join(SINGLE_FILE).exists() {
            weights.map(SINGLE_FILE)?;
            return Ok(weights);
        }
        let index_path = dir.join(INDEX_FILE);
        if !index_path.exists() {
            return Err(EngineError::Model(format!(
                "{} holds neither {SINGLE_FILE} nor {INDEX_FILE}",
                dir.display()
            )));
        }
        let text = std::fs::read_to_string(&index_path).map_err(EngineError::io(&index_path))?;
        let index: Index =
            serde_json::from_str(&text).map_err(|error| malformed(&index_path, &error))?;
        let names: BTreeSet<&String> = index.weight_map.values().collect();
        for name in names {
            // The index comes from outside: a path in it must not lead out of the directory.
            if name.contains(['/', '\\']) {
                return Err(malformed(&index_path, &format!("{name:?} is no file name")));
            }
            weights.map(name)?;
        }
        if let Some(name) =
            index.weight_map.keys().find(|name| !weights.tensors.contains_key(*name))
        {
            return Err(malformed(&index_path, &format!("weight {name} is in none of its files")));
        }
        Ok(weights)
    }

    fn map(&mut self, file_name: &str) -> Result<(), EngineError> {
        let path = &self.dir.join(file_name);
        let file = File::open(path).map_err(EngineError::io(path))?;
        // SAFETY: the service writes model files once, under a name that appears when they are
        // complete, and never changes them. Bytes are only read, into numbers of which every bit
        // pattern is valid.
        let bytes = unsafe { Mmap::map(&file) }.map_err(EngineError::io(path))?;
        let (header, metadata) =
            SafeTensors::read_metadata(&bytes).map_err(|error| malformed(path, &error))?;
        // Behind the header's length, which is a u64, and the header.
        let data = size_of::<u64>() + header;
        for (name, info) in metadata.tensors() {
            let location = Location {
                file: self.files.len(),
                start: data + info.data_offsets.0,
                end: data + info.data_offsets.1,
                dtype: info.dtype,
                shape: info.shape.clone(),
            };
            if location.end > bytes.len() {
                return Err(malformed(
                    path,
                    &format!("weight {name} is cut off: fetch the file again"),
                ));
            }
            if let Some(first) = self.tensors.insert(name.clone(), location) {
                let other = &self.files[first.file].name;
                return Err(malformed(
                    path,
                    &format!(
                        "weight {name} is in {other} too: the files are of two models, so fetch \
                         the model again"
                    ),
                ));
            }
        }
        self.files.push(WeightFile { name: file_name.to_owned(), bytes });
        Ok(())
    }

    /// The values of `name`, which must have `shape`.
    ///
    /// # Errors
    /// [`EngineError::Model`] when it is missing, misshapen, or of a type that is not a float.
    pub(crate) fn take(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, EngineError> {
        let mut values = Vec::new();
        self.append(name, shape, &mut values)?;
        Ok(values)
    }

    /// Puts the values of `name`, which must have `shape`, behind those in `values`: the one copy
    /// of a weight that is ever made.
    ///
    /// # Errors
    /// As [`WeightFiles::take`].
    pub(crate) fn append(
        &mut self,
        name: &str,
        shape: &[usize],
        values: &mut Vec<f32>,
    ) -> Result<(), EngineError> {
        let location = self.tensors.remove(name).ok_or_else(|| {
            EngineError::Model(format!(
                "{}: weight {name} is missing: the model is incomplete, or of another \
                 architecture than its config.json says",
                self.dir.display()
            ))
        })?;
        let file = &self.files[location.file];
        let refuse = |problem: String| {
            EngineError::Model(format!(
                "{}: weight {name} {problem}",
                self.dir.join(&file.name).display()
            ))
        };
        if location.shape != shape {
            return Err(refuse(format!(
                "has shape {:?}, but config.json asks for {shape:?}",
                location.shape
            )));
        }
        let bytes = &file.bytes[location.start..location.end];
        match location.dtype {
            Dtype::F32 => widen(bytes, values, f32::from_le_bytes),
            Dtype::BF16 => widen(bytes, values, |b| bf16::from_le_bytes(b).to_f32()),
            Dtype::F16 => widen(bytes, values, |b| f16::from_le_bytes(b).to_f32()),
            other => {
                return Err(refuse(format!("is of type {other:?}: use f32, bf16 or f16")));
            }
        }
        release(&file.bytes, location.start..location.end);
        Ok(())
    }

    /// Whether `name` has not been taken.
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Checks that every weight was used.
    ///
    /// # Errors
    /// [`EngineError::Model`] naming one that was not: the model has a part that this engine does
    /// not compute.
    pub(crate) fn finish(self) -> Result<(), EngineError> {
        // Old checkpoints store the rotary frequencies, which follow from config.json.
        match self.tensors.keys().find(|name| !name.ends_with("rotary_emb.inv_freq")) {
            Some(name) => Err(EngineError::Model(format!(
                "weight {name} has no place in the architecture of config.json"
            ))),
            None => Ok(()),
        }
    }
}

/// Appends little-endian numbers of N bytes as f32, on all threads.
fn widen<const N: usize>(
    bytes: &[u8],
    values: &mut Vec<f32>,
    convert: impl Fn([u8; N]) -> f32 + Sync,
) {
    let numbers = bytes.as_chunks::<N>().0;
    // Exactly, since a vector that grows by itself takes up to twice what it holds.
    values.reserve_exact(numbers.len());
    values.par_extend(numbers.par_iter().with_min_len(1 << 16).map(|&number| convert(number)));
}

/// Gives the pages inside `range` back to the system, which else counts them as this process's
/// until the file is closed: while a model is loaded, all of it would be there twice.
fn release(bytes: &Mmap, range: Range<usize>) {
    const PAGE: usize = 4096;
    let (start, end) = (range.start.next_multiple_of(PAGE), range.end / PAGE * PAGE);
    if start < end {
        // SAFETY: the mapping is of a file and never written to, so a page that is needed again is
        // read from the file again. A refusal costs memory and nothing else.
        let _ =
            unsafe { bytes.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) };
    }
}

fn malformed(path: &Path, error: &dyn std::fmt::Display) -> EngineError {
    EngineError::Model(format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;
    use serde_json::json;

    use super::*;

    fn write(path: &Path, tensors: &[(&str, Dtype, &[u8])]) {
        let views = tensors.iter().map(|&(name, dtype, bytes)| {
            let values = bytes.len() * 8 / dtype.bitsize();
            (name, TensorView::new(dtype, vec![values], bytes).unwrap())
        });
        std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    /// A directory of two shards, `a` in the first and `b` in the second, and an index.
    fn shards(index: &serde_json::Value) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join("1.safetensors"), &[("a", Dtype::F32, &f32s(&[1.0]))]);
        write(&dir.path().join("2.safetensors"), &[("b", Dtype::F32, &f32s(&[2.0]))]);
        std::fs::write(dir.path().join(INDEX_FILE), index.to_string()).unwrap();
        dir
    }

    fn error(dir: &Path) -> String {
        WeightFiles::open(dir).err().expect("refused").to_string()
    }

    #[test]
    fn weights_of_all_shards_are_found() {
        let dir = shards(&json!({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}));
        let mut weights = WeightFiles::open(dir.path()).unwrap();
        let mut values = vec![7.0];
        weights.append("b", &[1], &mut values).unwrap();
        weights.append("a", &[1], &mut values).unwrap();
        assert_eq!(values, [7.0, 2.0, 1.0]);
        weights.finish().unwrap();
    }

    #[test]
    fn shard_that_is_missing_is_named() {
        let dir = shards(&json!({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}));
        std::fs::remove_file(dir.path().join("2.safetensors")).unwrap();
        assert!(error(dir.path()).contains("2.safetensors"));
    }

    #[test]
    fn weight_in_two_shards_is_named_with_both() {
        let dir = shards(&json!({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}));
        write(&dir.path().join("2.safetensors"), &[("a", Dtype::F32, &f32s(&[2.0]))]);
        let message = error(dir.path());
        assert!(message.contains("2.safetensors: weight a is in 1.safetensors too"), "{message}");
    }

    #[test]
    fn index_that_leads_out_of_the_directory_is_refused() {
        for name in ["../1.safetensors", "/etc/passwd", "x/1.safetensors", "..\\1.safetensors"] {
            let dir = shards(&json!({"weight_map": {"a": name}}));
            let message = error(dir.path());
            assert!(message.contains("is no file name"), "{message}");
        }
    }

    #[test]
    fn weight_that_the_index_lists_and_no_shard_has_is_named() {
        let dir = shards(&json!({"weight_map": {"a": "1.safetensors", "c": "2.safetensors"}}));
        assert!(error(dir.path()).contains("weight c is in none of its files"));
    }

    #[test]
    fn index_without_a_weight_map_is_refused_by_its_name() {
        let dir = shards(&json!({"metadata": {}}));
        assert!(error(dir.path()).contains(INDEX_FILE));
    }

    #[test]
    fn every_f16_and_bf16_is_widened_to_the_number_that_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        write(
            &dir.path().join(SINGLE_FILE),
            &[("half", Dtype::F16, &bytes), ("brain", Dtype::BF16, &bytes)],
        );
        let mut weights = WeightFiles::open(dir.path()).unwrap();
        for (bits, value) in (0..=u16::MAX).zip(weights.take("half", &[1 << 16]).unwrap()) {
            let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
            let (exponent, fraction) = (i32::from(bits >> 10 & 31), f32::from(bits & 1023));
            let expected = match exponent {
                // Subnormal numbers, and zero.
                0 => fraction * 2f32.powi(-24),
                31 if fraction > 0.0 => {
                    assert!(value.is_nan(), "{bits:#06x}");
                    continue;
                }
                31 => f32::INFINITY,
                _ => (1.0 + fraction / 1024.0) * 2f32.powi(exponent - 15),
            };
            assert_eq!(value.to_bits(), (sign * expected).to_bits(), "{bits:#06x}");
        }
        for (bits, value) in (0..=u16::MAX).zip(weights.take("brain", &[1 << 16]).unwrap()) {
            let expected = f32::from_bits(u32::from(bits) << 16);
            assert!(
                value.to_bits() == expected.to_bits() || (value.is_nan() && expected.is_nan()),
                "{bits:#06x}"
            );
        }
    }

    #[test]
    fn weight_of_whole_numbers_is_refused_with_its_file_and_name() {
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join(SINGLE_FILE), &[("a", Dtype::I32, &[0; 4])]);
        let mut weights = WeightFiles::open(dir.path()).unwrap();
        let message = weights.take("a", &[1]).unwrap_err().to_string();
        assert!(message.contains("model.safetensors: weight a is of type I32"), "{message}");
    }
}
