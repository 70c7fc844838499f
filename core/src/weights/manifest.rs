//! The manifest: which files a directory of weights has, each with its size and its sum.
//!
//! It is written last, so a directory that has one is complete.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::io::{self, Read};
use std::path::Path;

/// The manifest's own name, beside the files that it lists.
pub const MANIFEST_NAME: &str = "manifest.json";
/// The file that says what a model is, as Hugging Face has it.
pub const CONFIG_NAME: &str = "config.json";

/// The files of a directory, by name.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Manifest {
    /// All but the manifest itself.
    pub files: Vec<ManifestFile>,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestFile {
    /// Its name in the directory.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Its SHA-256 as 64 lower-case hexadecimal digits.
    pub sha256: String,
}

impl ManifestFile {
    /// Measures what `reader` gives, without holding it in memory.
    ///
    /// # Errors
    /// What the reader gives.
    pub fn measure(name: impl Into<String>, mut reader: impl Read) -> io::Result<Self> {
        let mut hash = Sha256::new();
        let mut bytes = 0;
        let mut buffer = vec![0; 64 << 10];
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => {
                    hash.update(&buffer[..length]);
                    bytes += length as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Self { name: name.into(), bytes, sha256: hex::encode(hash.finalize()) })
    }
}

impl Manifest {
    /// Measures the files directly in `dir`, in the order of their names. An older manifest and
    /// directories are left out.
    ///
    /// # Errors
    /// What the file system gives, or `InvalidData` for a name that is not UTF-8.
    pub fn of_dir(dir: &Path) -> io::Result<Self> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            if !entry.path().is_file() {
                continue;
            }
            let name = entry.file_name().into_string().map_err(|name| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("the file name {} is not UTF-8", name.display()),
                )
            })?;
            if name != MANIFEST_NAME {
                names.push(name);
            }
        }
        names.sort();
        let files = names
            .into_iter()
            .map(|name| {
                let file = std::fs::File::open(dir.join(&name))?;
                ManifestFile::measure(name, file)
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { files })
    }

    /// The entry of that name.
    #[must_use]
    pub fn file(&self, name: &str) -> Option<&ManifestFile> {
        self.files.iter().find(|file| file.name == name)
    }

    /// Bytes of all files together.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_measured_by_length_and_sha256() {
        let file = ManifestFile::measure("a.txt", b"abc".as_slice()).expect("read");
        assert_eq!(
            serde_json::to_value(file).expect("json"),
            serde_json::json!({
                "name": "a.txt",
                "bytes": 3,
                "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            })
        );
    }

    #[test]
    fn a_directory_is_listed_by_name_without_its_manifest() {
        let dir = tempfile::tempdir().expect("directory");
        for (name, text) in [("b", "12"), ("a", "1"), (MANIFEST_NAME, "{}")] {
            std::fs::write(dir.path().join(name), text).expect("write");
        }
        std::fs::create_dir(dir.path().join("c")).expect("directory");
        let manifest = Manifest::of_dir(dir.path()).expect("manifest");
        let names: Vec<_> = manifest.files.iter().map(|file| file.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(manifest.total_bytes(), 3);
        assert_eq!(manifest.file("b").map(|file| file.bytes), Some(2));
        assert_eq!(manifest.file("c"), None);
    }
}
