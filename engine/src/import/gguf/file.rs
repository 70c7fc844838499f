//! Reading a GGUF file: the header, the metadata and where each tensor lies.
//!
//! The format is that of `docs/gguf.md` in ggml, versions 2 and 3, little endian. Nothing in the
//! file is trusted: every length is held against what is left of the file before anything is
//! allocated for it.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::quantisation::TensorType;
use crate::error::EngineError;

const MAGIC: [u8; 4] = *b"GGUF";
/// Tensors begin at multiples of this, unless `general.alignment` says otherwise.
const ALIGNMENT: u64 = 32;
const MAX_DIMENSIONS: u32 = 4;

/// A value of the metadata. Integers of every width are one kind, and so are lists of them.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Integer(i128),
    F32(f32),
    F64(f64),
    Flag(bool),
    Text(String),
    Integers(Vec<i64>),
    Reals(Vec<f32>),
    Texts(Vec<String>),
    Flags(Vec<bool>),
    /// A list of another kind, which no model of ours needs.
    Other,
}

/// Where a tensor lies and how it is stored.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TensorInfo {
    /// As PyTorch counts: the last dimension is the contiguous one.
    pub(super) shape: Vec<usize>,
    pub(super) kind: TensorType,
    /// Bytes from the start of the file.
    start: u64,
}

/// An open GGUF file whose head has been read.
pub(super) struct GgufFile {
    file: File,
    path: PathBuf,
    pub(super) tensors: BTreeMap<String, TensorInfo>,
}

impl GgufFile {
    /// Opens `path` and reads all but the tensors' values. Returns the metadata beside it.
    ///
    /// # Errors
    /// [`EngineError::Model`] for a file that is no GGUF, is torn, or holds a tensor of a type
    /// that cannot be read exactly; [`EngineError::Io`] when it cannot be read.
    pub(super) fn open(path: &Path) -> Result<(Self, HashMap<String, Value>), EngineError> {
        let file = File::open(path).map_err(EngineError::io(path))?;
        let size = file.metadata().map_err(EngineError::io(path))?.len();
        let mut head = Head {
            reader: BufReader::with_capacity(1 << 20, &file),
            path,
            position: 0,
            size,
            subject: "the header".to_owned(),
        };
        let (tensor_count, value_count) = head.start()?;
        let mut metadata = HashMap::new();
        for _ in 0..value_count {
            head.subject = "a key of the metadata".to_owned();
            let key = head.text()?;
            head.subject = key.clone();
            let kind = head.u32()?;
            metadata.insert(key, head.value(kind)?);
        }
        let mut infos = Vec::new();
        for _ in 0..tensor_count {
            infos.push(head.tensor()?);
        }
        let alignment = match metadata.get("general.alignment") {
            Some(Value::Integer(alignment)) => u64::try_from(*alignment).unwrap_or(0),
            _ => ALIGNMENT,
        };
        if !alignment.is_power_of_two() {
            return Err(head.error(&"general.alignment is no power of two"));
        }
        let data = head.position.next_multiple_of(alignment);
        let mut tensors = BTreeMap::new();
        for (name, mut info) in infos {
            head.subject = format!("tensor {name}");
            info.start = info
                .start
                .checked_add(data)
                .filter(|start| {
                    start.checked_add(info.bytes() as u64).is_some_and(|end| end <= size)
                })
                .ok_or_else(|| head.torn())?;
            if tensors.insert(name, info).is_some() {
                return Err(head.error(&"is there twice"));
            }
        }
        Ok((Self { file, path: path.to_owned(), tensors }, metadata))
    }

    /// Reads `values.len()` values of `info` into `values`, from number `first` on. Both are
    /// whole numbers of blocks.
    pub(super) fn read(
        &self,
        info: &TensorInfo,
        first: usize,
        values: &mut [f32],
    ) -> Result<(), EngineError> {
        let block = info.kind.block();
        let mut bytes = vec![0; values.len() / block.values * block.bytes];
        let start = info.start + (first / block.values * block.bytes) as u64;
        self.file.read_exact_at(&mut bytes, start).map_err(EngineError::io(&self.path))?;
        info.kind.dequantise(&bytes, values);
        Ok(())
    }

    /// All values of a small tensor.
    pub(super) fn read_whole(&self, info: &TensorInfo) -> Result<Vec<f32>, EngineError> {
        let mut values = vec![0.0; info.elements()];
        self.read(info, 0, &mut values)?;
        Ok(values)
    }
}

impl TensorInfo {
    /// Number of values.
    pub(super) fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn bytes(&self) -> usize {
        let block = self.kind.block();
        self.elements() / block.values * block.bytes
    }
}

/// The part of the file before the tensors' values, read from front to back.
struct Head<'a> {
    reader: BufReader<&'a File>,
    path: &'a Path,
    position: u64,
    size: u64,
    /// What is being read, for messages.
    subject: String,
}

impl Head<'_> {
    /// Magic and version. Returns the number of tensors and of values of the metadata.
    fn start(&mut self) -> Result<(u64, u64), EngineError> {
        if self.bytes()? != MAGIC {
            return Err(self.error(&"this is not a GGUF file"));
        }
        match self.u32()? {
            2 | 3 => {}
            version if version.swap_bytes() == 3 => {
                return Err(self.error(&"the file is big-endian: convert it to little endian"));
            }
            version => {
                return Err(self.error(&format_args!(
                    "version {version} of the format is not known: convert the model anew"
                )));
            }
        }
        Ok((self.u64()?, self.u64()?))
    }

    fn tensor(&mut self) -> Result<(String, TensorInfo), EngineError> {
        self.subject = "the list of tensors".to_owned();
        let name = self.text()?;
        self.subject = format!("tensor {name}");
        let dimensions = self.u32()?;
        if dimensions > MAX_DIMENSIONS {
            return Err(self.error(&format_args!("has {dimensions} dimensions")));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(self.u64()?);
        }
        let elements = shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size));
        if elements.is_none_or(|elements| elements > 1 << 40) {
            return Err(self.error(&format_args!("has the shape {shape:?}")));
        }
        let code = self.u32()?;
        let kind = TensorType::from_code(code).map_err(|name| {
            self.error(&format_args!(
                "is stored as {name}, which cannot be read exactly: use a file in one of {}",
                TensorType::names()
            ))
        })?;
        // GGUF counts dimensions from the contiguous one.
        let shape: Vec<usize> = shape.into_iter().rev().map(|size| size as usize).collect();
        let row = shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(kind.block().values) {
            return Err(self.error(&format_args!(
                "has rows of {row} values, which are no whole blocks of {}",
                kind.name()
            )));
        }
        let start = self.u64()?;
        Ok((name, TensorInfo { shape, kind, start }))
    }

    fn value(&mut self, kind: u32) -> Result<Value, EngineError> {
        match kind {
            6 => Ok(Value::F32(f32::from_le_bytes(self.bytes()?))),
            12 => Ok(Value::F64(f64::from_le_bytes(self.bytes()?))),
            7 => Ok(Value::Flag(self.bytes::<1>()? != [0])),
            8 => Ok(Value::Text(self.text()?)),
            9 => self.list(),
            _ => self.integer(kind).map(Value::Integer),
        }
    }

    fn list(&mut self) -> Result<Value, EngineError> {
        let kind = self.u32()?;
        let length = self.u64()?;
        // Even a list of empty texts takes a byte for each entry.
        if length > self.size - self.position {
            return Err(self.torn());
        }
        match kind {
            6 => {
                let mut list = Vec::new();
                for _ in 0..length {
                    list.push(f32::from_le_bytes(self.bytes()?));
                }
                Ok(Value::Reals(list))
            }
            8 => {
                let mut list = Vec::new();
                for _ in 0..length {
                    list.push(self.text()?);
                }
                Ok(Value::Texts(list))
            }
            7 => {
                let mut list = Vec::new();
                for _ in 0..length {
                    list.push(self.bytes::<1>()? != [0]);
                }
                Ok(Value::Flags(list))
            }
            12 | 9 => {
                for _ in 0..length {
                    if kind == 9 {
                        return Err(self.error(&"is a list of lists"));
                    }
                    self.value(kind)?;
                }
                Ok(Value::Other)
            }
            _ => {
                let mut list = Vec::new();
                for _ in 0..length {
                    list.push(
                        i64::try_from(self.integer(kind)?)
                            .map_err(|_| self.error(&"has a number beyond 64 bits"))?,
                    );
                }
                Ok(Value::Integers(list))
            }
        }
    }

    fn integer(&mut self, kind: u32) -> Result<i128, EngineError> {
        Ok(match kind {
            0 => u8::from_le_bytes(self.bytes()?).into(),
            1 => i8::from_le_bytes(self.bytes()?).into(),
            2 => u16::from_le_bytes(self.bytes()?).into(),
            3 => i16::from_le_bytes(self.bytes()?).into(),
            4 => u32::from_le_bytes(self.bytes()?).into(),
            5 => i32::from_le_bytes(self.bytes()?).into(),
            10 => u64::from_le_bytes(self.bytes()?).into(),
            11 => i64::from_le_bytes(self.bytes()?).into(),
            other => return Err(self.error(&format_args!("has the unknown type {other}"))),
        })
    }

    fn text(&mut self) -> Result<String, EngineError> {
        let length = self.u64()?;
        if length > self.size - self.position {
            return Err(self.torn());
        }
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|_| self.error(&"is not UTF-8"))
    }

    fn u32(&mut self) -> Result<u32, EngineError> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, EngineError> {
        self.bytes().map(u64::from_le_bytes)
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], EngineError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), EngineError> {
        if bytes.len() as u64 > self.size - self.position {
            return Err(self.torn());
        }
        self.reader.read_exact(bytes).map_err(EngineError::io(self.path))?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn torn(&self) -> EngineError {
        self.error(&format_args!("the file of {} bytes ends within it: fetch it again", self.size))
    }

    fn error(&self, problem: &dyn std::fmt::Display) -> EngineError {
        EngineError::Model(format!("{}: {}: {problem}", self.path.display(), self.subject))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
    }

    /// A file with one value of the metadata and tensors of one row: name, width, type, offset.
    fn gguf(tensors: &[(&str, u64, u32, u64)], data: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend((tensors.len() as u64).to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
        bytes.extend(
            [text("list"), 9u32.to_le_bytes().to_vec(), 8u32.to_le_bytes().to_vec()].concat(),
        );
        bytes.extend([2u64.to_le_bytes().to_vec(), text("a\0"), text("é")].concat());
        for (name, width, code, offset) in tensors {
            bytes.extend([text(name), 1u32.to_le_bytes().to_vec()].concat());
            bytes.extend(width.to_le_bytes());
            bytes.extend(code.to_le_bytes());
            bytes.extend(offset.to_le_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT as usize), 0);
        bytes.extend(data);
        bytes
    }

    fn open(bytes: &[u8]) -> Result<(GgufFile, HashMap<String, Value>), EngineError> {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("x.gguf");
        std::fs::write(&path, bytes).expect("write");
        GgufFile::open(&path)
    }

    fn error(bytes: &[u8]) -> String {
        open(bytes).err().expect("refused").to_string()
    }

    #[test]
    fn texts_keep_every_byte_and_tensors_their_values() {
        let data: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|value| value.to_le_bytes()).collect();
        let (file, metadata) = open(&gguf(&[("w", 2, 0, 0)], &data)).expect("a file");
        assert_eq!(metadata["list"], Value::Texts(vec!["a\0".to_owned(), "é".to_owned()]));
        assert_eq!(file.tensors["w"].shape, [2]);
        assert_eq!(file.read_whole(&file.tensors["w"]).expect("values"), [1.5, -2.0]);
    }

    #[test]
    fn a_file_that_is_cut_off_anywhere_is_refused() {
        let whole = gguf(&[("w", 2, 0, 0), ("v", 2, 0, 32)], &[0; 40]);
        open(&whole).expect("the whole file");
        for length in 0..whole.len() {
            let message = error(&whole[..length]);
            assert!(message.contains("x.gguf: "), "{length}: {message}");
        }
    }

    #[test]
    fn what_a_file_says_of_its_lengths_is_not_believed() {
        let whole = gguf(&[("w", 2, 0, 0)], &[0; 8]);
        // Numbers of tensors and of values, the key's length, the list's length, and a text's.
        for at in [8, 16, 24, 44, 52] {
            for length in [u64::MAX, 1 << 60, 1 << 40] {
                let mut bytes = whole.clone();
                bytes[at..at + 8].copy_from_slice(&length.to_le_bytes());
                assert!(error(&bytes).contains("x.gguf"), "{at} {length}");
            }
        }
    }

    #[test]
    fn a_tensor_that_cannot_be_read_is_named_with_the_reason() {
        let cases = [
            (vec![("w", 256, 19, 0)], "tensor w: is stored as IQ1_S"),
            (vec![("w", 256, 99, 0)], "tensor w: is stored as type number 99"),
            (vec![("w", 48, 8, 0)], "tensor w: has rows of 48 values, which are no whole blocks"),
            (vec![("w", 2, 0, 64)], "tensor w: the file of"),
            (vec![("w", 2, 0, u64::MAX)], "tensor w: the file of"),
            (vec![("w", u64::MAX, 0, 0)], "tensor w: has the shape"),
            (vec![("w", 2, 0, 0), ("w", 2, 0, 0)], "tensor w: is there twice"),
        ];
        for (tensors, word) in cases {
            let message = error(&gguf(&tensors, &[0; 64]));
            assert!(message.contains(word), "{message}");
        }
    }

    #[test]
    fn a_file_of_another_format_or_byte_order_is_refused_by_what_it_is() {
        assert!(error(b"PK\x03\x04........").contains("not a GGUF file"));
        let mut bytes = gguf(&[], &[]);
        bytes[4..8].copy_from_slice(&3u32.to_be_bytes());
        assert!(error(&bytes).contains("big-endian"));
        bytes[4..8].copy_from_slice(&1u32.to_le_bytes());
        assert!(error(&bytes).contains("version 1"));
    }
}
