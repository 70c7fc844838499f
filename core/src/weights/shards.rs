//! Cuts a model into safetensors files of a bounded size, as transformers' `save_pretrained` does:
//! `model.safetensors`, or `model-00001-of-00002.safetensors` and so on with an index that says which
//! tensor lies where.
//!
//! Only names and sizes are looked at, so the files' sizes are known before any number is.

use serde_json::{Map, Value, json};
use std::cmp::Reverse;

/// Tensors of a file, in bytes, unless another limit is asked for.
pub const MAX_SHARD_SIZE: u64 = 5_000_000_000;

/// Names the file of each tensor where there are several.
pub const INDEX_NAME: &str = "model.safetensors.index.json";

/// The header is padded to a multiple of this, so that the numbers behind it are aligned.
const HEADER_ALIGNMENT: usize = 8;

/// A tensor that will be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorLayout {
    /// Its name.
    pub name: String,
    /// Its type as a safetensors header names it, such as `BF16`.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Bytes of all its elements.
    pub bytes: u64,
}

/// A safetensors file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    /// Its name.
    pub name: String,
    /// Its first bytes, up to the first tensor's.
    pub head: Vec<u8>,
    /// Its tensors in their order, by their places in the list.
    pub tensors: Vec<usize>,
    /// Its size.
    pub bytes: u64,
}

/// The files of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shards {
    /// With the tensors.
    pub files: Vec<Shard>,
    /// The index's content, where the files are several.
    pub index: Option<String>,
}

impl Shards {
    /// Puts `tensors` into files in their order, each file with as many as fit into
    /// `max_shard_size` bytes; a tensor that is larger has a file of its own.
    #[must_use]
    pub fn cut(tensors: &[TensorLayout], max_shard_size: u64) -> Self {
        let mut groups: Vec<Vec<usize>> = Vec::new();
        let mut size = 0;
        for (index, tensor) in tensors.iter().enumerate() {
            match groups.last_mut() {
                Some(group) if size + tensor.bytes <= max_shard_size => {
                    group.push(index);
                    size += tensor.bytes;
                }
                _ => {
                    groups.push(vec![index]);
                    size = tensor.bytes;
                }
            }
        }
        let count = groups.len();
        let files: Vec<Shard> = groups
            .into_iter()
            .enumerate()
            .map(|(number, group)| Shard::new(file_name(number, count), group, tensors))
            .collect();
        let index = (count > 1).then(|| index(&files, tensors));
        Self { files, index }
    }
}

impl Shard {
    fn new(name: String, mut group: Vec<usize>, tensors: &[TensorLayout]) -> Self {
        // Readers look at the numbers where they lie in the file, so wider ones go first: no
        // number then begins off a multiple of its size.
        group.sort_by_key(|&index| Reverse(tensors[index].element_bytes()));
        let mut header = Map::new();
        // transformers refuses a file that does not say which framework's layout it has.
        header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
        let mut end = 0;
        for &index in &group {
            let TensorLayout { name, dtype, shape, bytes } = &tensors[index];
            let start = end;
            end += bytes;
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
            header.insert(name.clone(), entry);
        }
        let mut text = Value::Object(header).to_string();
        let padded = text.len().next_multiple_of(HEADER_ALIGNMENT);
        text.extend(std::iter::repeat_n(' ', padded - text.len()));
        let mut head = (text.len() as u64).to_le_bytes().to_vec();
        head.extend_from_slice(text.as_bytes());
        let bytes = head.len() as u64 + end;
        Self { name, head, tensors: group, bytes }
    }
}

impl TensorLayout {
    /// Bytes to one element, and 0 of a tensor that has none.
    fn element_bytes(&self) -> u64 {
        let elements: usize = self.shape.iter().product();
        self.bytes.checked_div(elements as u64).unwrap_or(0)
    }
}

fn file_name(number: usize, count: usize) -> String {
    match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
    }
}

fn index(files: &[Shard], tensors: &[TensorLayout]) -> String {
    let total_size: u64 = tensors.iter().map(|tensor| tensor.bytes).sum();
    let mut weight_map = Map::new();
    for file in files {
        for &index in &file.tensors {
            weight_map.insert(tensors[index].name.clone(), json!(file.name));
        }
    }
    weight_map.sort_keys();
    let index = json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
    format!("{index:#}\n")
}

/// Bytes in words as transformers has them for `max_shard_size`: a whole number, alone or with `KB`,
/// `MB` or `GB` (thousands) or `KiB`, `MiB` or `GiB` (1024s) behind it. `None` for anything else,
/// and for 0.
#[must_use]
pub fn parse_shard_size(text: &str) -> Option<u64> {
    const UNITS: [(&str, u64); 7] = [
        ("KIB", 1 << 10),
        ("MIB", 1 << 20),
        ("GIB", 1 << 30),
        ("KB", 1000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("", 1),
    ];
    let upper = text.to_ascii_uppercase();
    let (number, unit) =
        UNITS.iter().find_map(|(name, unit)| Some((upper.strip_suffix(name)?, *unit)))?;
    // `parse` would take a sign.
    if !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    number.parse::<u64>().ok()?.checked_mul(unit).filter(|&bytes| bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, dtype: &str, elements: usize) -> TensorLayout {
        let size = if dtype == "F32" { 4 } else { 2 };
        TensorLayout {
            name: name.to_owned(),
            dtype: dtype.to_owned(),
            shape: vec![elements],
            bytes: (elements * size) as u64,
        }
    }

    fn header(shard: &Shard) -> Value {
        let length = u64::from_le_bytes(shard.head[..8].try_into().expect("eight bytes"));
        assert_eq!(shard.head.len() as u64, 8 + length);
        assert_eq!(length % 8, 0);
        serde_json::from_slice(&shard.head[8..]).expect("json")
    }

    #[test]
    fn what_fits_lies_in_one_file_without_an_index() {
        let tensors = [tensor("a", "BF16", 10), tensor("b", "BF16", 5)];
        let shards = Shards::cut(&tensors, 30);
        let [file] = &shards.files[..] else { panic!("{shards:?}") };
        assert_eq!((file.name.as_str(), &file.tensors[..]), ("model.safetensors", &[0, 1][..]));
        assert_eq!(file.bytes, file.head.len() as u64 + 30);
        assert_eq!(
            header(file),
            json!({
                "__metadata__": {"format": "pt"},
                "a": {"dtype": "BF16", "shape": [10], "data_offsets": [0, 20]},
                "b": {"dtype": "BF16", "shape": [5], "data_offsets": [20, 30]},
            })
        );
        assert_eq!(shards.index, None);
    }

    #[test]
    fn a_file_ends_before_the_limit_and_the_index_knows_where_each_tensor_lies() {
        let sizes = [4, 5, 1, 20, 2, 8];
        let tensors: Vec<_> = sizes
            .iter()
            .enumerate()
            .map(|(index, &size)| tensor(&format!("t{}", 9 - index), "F16", size))
            .collect();
        let shards = Shards::cut(&tensors, 20);
        let groups: Vec<_> = shards.files.iter().map(|file| file.tensors.clone()).collect();
        // The fourth is larger than a file may be.
        assert_eq!(groups, [vec![0, 1, 2], vec![3], vec![4, 5]]);
        let index: Value =
            serde_json::from_str(shards.index.as_deref().expect("an index")).expect("json");
        assert_eq!(index["metadata"]["total_size"], 80);
        let map = index["weight_map"].as_object().expect("a map");
        assert_eq!(map.len(), 6);
        for (number, file) in shards.files.iter().enumerate() {
            assert_eq!(file.name, format!("model-0000{}-of-00003.safetensors", number + 1));
            for &tensor in &file.tensors {
                assert_eq!(map[&tensors[tensor].name], *file.name);
                assert!(header(file).get(&tensors[tensor].name).is_some());
            }
        }
    }

    #[test]
    fn a_number_begins_at_a_multiple_of_its_size() {
        let tensors = [tensor("a", "BF16", 3), tensor("b", "F32", 2), tensor("c", "BF16", 1)];
        let shards = Shards::cut(&tensors, MAX_SHARD_SIZE);
        assert_eq!(shards.files[0].tensors, [1, 0, 2]);
        assert_eq!(header(&shards.files[0])["a"]["data_offsets"], json!([8, 14]));
    }

    #[test]
    fn sizes_are_said_as_in_transformers() {
        for (text, bytes) in
            [("1", 1), ("5GB", 5_000_000_000), ("200mb", 200_000_000), ("3KiB", 3072)]
        {
            assert_eq!(parse_shard_size(text), Some(bytes), "{text}");
        }
        for text in ["", "0", "GB", "-5GB", "+5GB", "1.5GB", "5 GB", "5TB", "99999999999999GB"] {
            assert_eq!(parse_shard_size(text), None, "{text}");
        }
    }
}
