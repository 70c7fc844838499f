//! The part of a GGUF file before the tensors' bytes: version, metadata, and where tensors lie.

use super::storage::TensorType;

/// Tensors begin at multiples of this.
pub(super) const ALIGNMENT: usize = 32;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    U32(u32),
    F32(f32),
    Flag(bool),
    Text(String),
    Flags(Vec<bool>),
    Integers(Vec<i32>),
    Reals(Vec<f32>),
    Texts(Vec<String>),
}

impl From<u32> for Value {
    fn from(value: u32) -> Self {
        Self::U32(value)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl Value {
    /// The number of the kind.
    fn code(&self) -> u32 {
        match self {
            Self::U32(_) => 4,
            Self::F32(_) => 6,
            Self::Flag(_) => 7,
            Self::Text(_) => 8,
            Self::Flags(_) | Self::Integers(_) | Self::Reals(_) | Self::Texts(_) => 9,
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        let mut list = |kind: u32, length: usize| {
            out.extend(kind.to_le_bytes());
            out.extend((length as u64).to_le_bytes());
        };
        match self {
            Self::U32(value) => out.extend(value.to_le_bytes()),
            Self::F32(value) => out.extend(value.to_le_bytes()),
            Self::Flag(value) => out.push(u8::from(*value)),
            Self::Text(value) => write_text(value, out),
            Self::Flags(values) => {
                list(7, values.len());
                out.extend(values.iter().map(|&value| u8::from(value)));
            }
            Self::Integers(values) => {
                list(5, values.len());
                out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
            Self::Reals(values) => {
                list(6, values.len());
                out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
            Self::Texts(values) => {
                list(8, values.len());
                values.iter().for_each(|value| write_text(value, out));
            }
        }
    }
}

/// Where a tensor lies, for the head of the file.
pub(super) struct Place<'a> {
    pub(super) name: &'a str,
    /// As PyTorch counts: the last dimension is the contiguous one.
    pub(super) shape: &'a [usize],
    pub(super) kind: TensorType,
    /// Bytes from the start of the first tensor.
    pub(super) offset: u64,
}

/// The head of a file, up to the first tensor's first byte.
pub(super) fn header(metadata: &[(String, Value)], tensors: &[Place<'_>]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        write_text(key, &mut out);
        out.extend(value.code().to_le_bytes());
        value.write(&mut out);
    }
    for Place { name, shape, kind, offset } in tensors {
        write_text(name, &mut out);
        out.extend((shape.len() as u32).to_le_bytes());
        // GGUF counts dimensions from the contiguous one.
        out.extend(shape.iter().rev().flat_map(|&size| (size as u64).to_le_bytes()));
        out.extend(kind.code().to_le_bytes());
        out.extend(offset.to_le_bytes());
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    out
}

fn write_text(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}
