//! Writing f32 tensors as a safetensors file, one tensor in memory at a time.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;

use ::safetensors::SafeTensors;
use ::safetensors::tensor::Metadata;
use serde_json::{Map, Value, json};
use tunesmith_core::weights::FloatType;

use crate::error::EngineError;
use crate::parameter::NamedTensor;

// The format is little endian, and values are written as they lie in memory.
const _: () = assert!(cfg!(target_endian = "little"));

/// The header's length is padded to a multiple of this, so that the values are aligned.
const HEADER_ALIGNMENT: usize = 8;
/// A longer header than this is that of a broken file.
const MAX_HEADER_BYTES: u64 = 100 << 20;

/// Name and shape of a tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TensorShape {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
}

impl TensorShape {
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Writes `tensors` in their order to `path` and syncs the file. `values(i)` gives the values of
/// tensor number `i` when their turn has come, so a model need not fit in memory.
pub(crate) fn write_streamed(
    path: &Path,
    tensors: &[TensorShape],
    mut values: impl FnMut(usize) -> Result<Vec<f32>, EngineError>,
) -> Result<(), EngineError> {
    write_pieces(path, tensors, |index, write| write(&values(index)?))
}

/// Takes values of a tensor, the next ones in its order.
pub(crate) type WritePiece<'a> = dyn FnMut(&[f32]) -> Result<(), EngineError> + 'a;

/// As [`write_streamed`], for tensors that need not fit in memory either: `values(i, write)` calls
/// `write` for piece after piece of tensor number `i`.
pub(crate) fn write_pieces(
    path: &Path,
    tensors: &[TensorShape],
    mut values: impl FnMut(usize, &mut WritePiece<'_>) -> Result<(), EngineError>,
) -> Result<(), EngineError> {
    let file = File::create(path).map_err(EngineError::io(path))?;
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    let header = header(tensors);
    let mut write = |bytes: &[u8]| writer.write_all(bytes).map_err(EngineError::io(path));
    write(&(header.len() as u64).to_le_bytes())?;
    write(header.as_bytes())?;
    for (index, tensor) in tensors.iter().enumerate() {
        let mut written = 0;
        values(index, &mut |piece| {
            written += piece.len();
            write(bytemuck::cast_slice(piece))
        })?;
        if written != tensor.elements() {
            return Err(EngineError::Model(format!(
                "{}: tensor {} of shape {:?} has {written} values",
                path.display(),
                tensor.name,
                tensor.shape,
            )));
        }
    }
    let file = writer.into_inner().map_err(|error| EngineError::io(path)(error.into_error()))?;
    file.sync_all().map_err(EngineError::io(path))
}

/// Writes tensors that are in memory already.
pub(crate) fn write(path: &Path, tensors: Vec<NamedTensor>) -> Result<(), EngineError> {
    let (shapes, values): (Vec<_>, Vec<_>) = tensors
        .into_iter()
        .map(|tensor| (TensorShape { name: tensor.name, shape: tensor.shape }, tensor.data))
        .unzip();
    let mut values = values.into_iter();
    write_streamed(path, &shapes, |_| Ok(values.next().unwrap_or_default()))
}

/// Reads a whole file of tensors of floats, in the order in which they lie in the file. What is
/// narrower than f32, as an adapter that was made elsewhere may be, is widened.
pub(crate) fn read(path: &Path) -> Result<Vec<NamedTensor>, EngineError> {
    let bytes = std::fs::read(path).map_err(EngineError::io(path))?;
    let broken =
        |problem: String| EngineError::Checkpoint(format!("{}: {problem}", path.display()));
    let file = SafeTensors::deserialize(&bytes).map_err(|e| broken(e.to_string()))?;
    let mut tensors: Vec<(usize, NamedTensor)> = Vec::with_capacity(file.len());
    for (name, view) in file.tensors() {
        let float = FloatType::parse(&view.dtype().to_string())
            .ok_or_else(|| broken(format!("tensor {name} is {:?} and no float", view.dtype())))?;
        let data = float.decode(view.data());
        let position = view.data().as_ptr().addr();
        tensors.push((position, NamedTensor { name, shape: view.shape().to_vec(), data }));
    }
    tensors.sort_by_key(|(position, _)| *position);
    Ok(tensors.into_iter().map(|(_, tensor)| tensor).collect())
}

/// Reads the head of a safetensors file: its bytes, length included, and what they say.
pub(crate) fn read_header(
    path: &Path,
    reader: &mut impl Read,
) -> Result<(Vec<u8>, Metadata), EngineError> {
    let refuse = |problem: &dyn std::fmt::Display| {
        EngineError::Model(format!("{}: not a safetensors file: {problem}", path.display()))
    };
    let mut header = vec![0; 8];
    reader.read_exact(&mut header).map_err(EngineError::io(path))?;
    let length = header.iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
    if length > MAX_HEADER_BYTES {
        return Err(refuse(&format_args!("a header of {length} bytes")));
    }
    reader.take(length).read_to_end(&mut header).map_err(EngineError::io(path))?;
    if header.len() as u64 != 8 + length {
        return Err(refuse(&"it ends within its header"));
    }
    // Not `SafeTensors::read_metadata`, which wants the tensors' bytes behind the header.
    let metadata = serde_json::from_slice(&header[8..]).map_err(|error| refuse(&error))?;
    Ok((header, metadata))
}

fn header(tensors: &[TensorShape]) -> String {
    let mut header = Map::new();
    // transformers refuses a file that does not say which framework's layout it has.
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.elements() * size_of::<f32>();
        header.insert(
            tensor.name.clone(),
            json!({"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, end]}),
        );
        start = end;
    }
    let mut text = Value::Object(header).to_string();
    let padded = text.len().next_multiple_of(HEADER_ALIGNMENT);
    text.extend(std::iter::repeat_n(' ', padded - text.len()));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_tensors_are_read_back_bit_for_bit_and_in_order() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("x.safetensors");
        let tensors = vec![
            NamedTensor {
                name: "z".into(),
                shape: vec![2, 1],
                data: vec![-0.0, f32::MIN_POSITIVE],
            },
            NamedTensor { name: "a".into(), shape: vec![3], data: vec![1.5, f32::MAX, 1e-40] },
        ];
        write(&path, tensors.clone()).expect("write");
        assert_eq!(read(&path).expect("read"), tensors);
        assert!(read(&path).expect("read")[0].data[0].is_sign_negative());
    }

    #[test]
    fn a_tensor_with_too_few_values_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("temp dir");
        let shapes = [TensorShape { name: "w".into(), shape: vec![2, 2] }];
        let error = write_streamed(&dir.path().join("x"), &shapes, |_| Ok(vec![0.0; 3]))
            .expect_err("too few");
        assert!(error.to_string().contains("tensor w of shape [2, 2] has 3 values"), "{error}");
    }

    #[test]
    fn a_torn_file_is_refused() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("x.safetensors");
        write(&path, vec![NamedTensor { name: "a".into(), shape: vec![2], data: vec![1.0, 2.0] }])
            .expect("write");
        let bytes = std::fs::read(&path).expect("read");
        std::fs::write(&path, &bytes[..bytes.len() - 1]).expect("tear");
        assert!(matches!(read(&path), Err(EngineError::Checkpoint(_))));
    }
}
