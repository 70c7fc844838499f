//! The first API key, in a file that only its owner can read.

use anyhow::Context as _;
use std::io::{self, Write as _};
use std::path::Path;
use tempfile::NamedTempFile;
use tunesmith_store::Store;

/// Makes a key to the default project and writes it to `path`, unless the key that is there works.
pub(crate) async fn ensure(store: &Store, path: &Path) -> anyhow::Result<()> {
    let project = store.ensure_default_project().await?;
    match std::fs::read_to_string(path) {
        Ok(key) if store.authenticate(key.trim()).await?.is_some() => return Ok(()),
        Ok(_) => {
            tracing::warn!(path = %path.display(), "the database does not know this key: replaced");
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => {
            return Err(error).with_context(|| format!("{} cannot be read", path.display()));
        }
    }
    let key = store.create_api_key(&project, "first key").await?;
    write(path, &key.secret).with_context(|| format!("{} cannot be written", path.display()))
}

/// Writes the file whole or not at all, with mode 0600 from the start.
fn write(path: &Path, secret: &str) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut file = NamedTempFile::new_in(dir)?;
    file.write_all(secret.as_bytes())?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_key_file_is_its_owners_alone_and_replaces_an_older_one() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("api-key");
        for secret in ["sk-old", "sk-new"] {
            write(&path, secret).expect("write");
            assert_eq!(std::fs::read_to_string(&path).expect("read"), secret);
        }
        let mode = std::fs::metadata(&path).expect("metadata").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 1);
    }
}
