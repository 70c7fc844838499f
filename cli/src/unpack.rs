//! Unpacks a tar of weights: nothing outside its directory, nothing that its manifest does not
//! vouch for, and nothing at all unless the whole archive is right.

use anyhow::{Context as _, bail, ensure};
use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path};
use tunesmith_core::weights::{MANIFEST_NAME, Manifest, ManifestFile};

/// Unpacks `archive` into `output`, which must be new or empty, and checks each file against the
/// manifest. The files appear in `output` together, or not at all. Gives their names and sizes.
///
/// # Errors
/// When `output` holds something, the archive breaks off or names a path outside of it, or a file
/// is missing, unknown to the manifest or not as the manifest says.
pub(crate) fn unpack(archive: impl Read, output: &Path) -> anyhow::Result<Vec<(String, u64)>> {
    refuse_occupied(output)?;
    let parent = match output.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent).with_context(|| format!("{} cannot be made", parent.display()))?;
    // Beside the output, so that the last step is a rename. Dropping it removes what is in it.
    let staging = tempfile::Builder::new()
        .prefix(".tunesmith-weights-")
        .permissions(Permissions::from_mode(0o755))
        .tempdir_in(parent)
        .with_context(|| format!("{} cannot be written to", parent.display()))?;
    let files = unpack_into(archive, staging.path())?;
    check(&files, staging.path())?;
    // A rename takes the place of an empty directory, and fails on one that filled up meanwhile.
    fs::rename(staging.path(), output)
        .with_context(|| format!("{} cannot be made", output.display()))?;
    Ok(files.into_iter().map(|(name, file)| (name, file.bytes)).collect())
}

/// Refuses an `output` that is there and not an empty directory.
///
/// # Errors
/// Says which.
pub(crate) fn refuse_occupied(output: &Path) -> anyhow::Result<()> {
    let occupied = match fs::read_dir(output) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => {
            return Err(error).with_context(|| format!("{} cannot be used", output.display()));
        }
    };
    ensure!(!occupied, "{} is not empty: name another directory with --output", output.display());
    Ok(())
}

fn unpack_into(archive: impl Read, dir: &Path) -> anyhow::Result<BTreeMap<String, ManifestFile>> {
    let mut files = BTreeMap::new();
    let mut archive = tar::Archive::new(archive);
    for entry in archive.entries().context("the download is not a tar archive")? {
        let mut entry = entry.context("the download broke off")?;
        let path = entry.path().context("the archive names a path that is not text")?.into_owned();
        match entry.header().entry_type() {
            tar::EntryType::Directory => continue,
            tar::EntryType::Regular => {}
            other => bail!("the archive holds {} as {other:?}, not a file", path.display()),
        }
        let name = safe_name(&path)?;
        let target = dir.join(&name);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)
                .with_context(|| format!("{} cannot be made", parent.display()))?;
        }
        ensure!(!files.contains_key(&name), "the archive holds {name} twice");
        let file = File::create_new(&target)
            .and_then(|to| ManifestFile::measure(name.clone(), Tee { from: &mut entry, to }))
            .with_context(|| format!("{name} cannot be unpacked"))?;
        files.insert(name, file);
    }
    Ok(files)
}

/// The entry's path as a name with `/`, if it stays within the directory.
fn safe_name(path: &Path) -> anyhow::Result<String> {
    let mut parts = Vec::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::Normal(part) => {
                parts.push(part.to_str().context("the archive names a path that is not text")?);
            }
            _ => bail!("the archive names {}, a path outside of it", path.display()),
        }
    }
    ensure!(!parts.is_empty(), "the archive holds a file without a name");
    Ok(parts.join("/"))
}

/// Writes all that it reads, so that a file is measured while it is unpacked.
struct Tee<R, W> {
    from: R,
    to: W,
}

impl<R: Read, W: Write> Read for Tee<R, W> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(buffer)?;
        self.to.write_all(&buffer[..read])?;
        Ok(read)
    }
}

fn check(files: &BTreeMap<String, ManifestFile>, dir: &Path) -> anyhow::Result<()> {
    ensure!(
        files.contains_key(MANIFEST_NAME),
        "the download broke off: {MANIFEST_NAME}, the archive's last file, is missing"
    );
    let text = fs::read(dir.join(MANIFEST_NAME)).context("the manifest cannot be read")?;
    let manifest: Manifest =
        serde_json::from_slice(&text).context("the manifest is not in its format")?;
    for listed in &manifest.files {
        let file = files
            .get(&listed.name)
            .with_context(|| format!("the manifest lists {}, which did not come", listed.name))?;
        ensure!(
            file == listed,
            "{} is not what the manifest says: {} bytes with sha256 {}, not {} bytes with {}",
            listed.name,
            file.bytes,
            file.sha256,
            listed.bytes,
            listed.sha256
        );
    }
    let known = |name: &str| name == MANIFEST_NAME || manifest.file(name).is_some();
    if let Some(name) = files.keys().find(|name| !known(name)) {
        bail!("the archive holds {name}, which its manifest does not list");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tar of `entries`; names go in as they are, which `tar::Builder` would refuse for some.
    fn archive(entries: &[(&str, tar::EntryType, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, kind, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o644);
            header.set_size(content.len() as u64);
            header.set_cksum();
            builder.append(&header, *content).expect("append");
        }
        builder.into_inner().expect("finish")
    }

    fn manifest(files: &[(&str, &[u8])]) -> Vec<u8> {
        let files: Vec<_> = files
            .iter()
            .map(|(name, content)| ManifestFile::measure(*name, *content).expect("measure"))
            .collect();
        serde_json::to_vec(&Manifest { files }).expect("json")
    }

    const FILE: tar::EntryType = tar::EntryType::Regular;
    const WEIGHTS: &[u8] = b"weights";

    /// Unpacks into a directory beside nothing else and checks that a failure leaves no trace.
    fn refused(entries: &[(&str, tar::EntryType, &[u8])]) -> String {
        let dir = tempfile::tempdir().expect("temp dir");
        let output = dir.path().join("in/out");
        let error = unpack(archive(entries).as_slice(), &output).expect_err("refused");
        let left: Vec<_> = fs::read_dir(dir.path().join("in")).expect("parent").collect();
        assert!(left.is_empty(), "{left:?}");
        assert!(!dir.path().join("in/x").exists() && !dir.path().join("x").exists());
        format!("{error:#}")
    }

    #[test]
    fn files_arrive_with_their_directories_and_the_manifest() {
        let dir = tempfile::tempdir().expect("temp dir");
        let manifest = manifest(&[("adapter.safetensors", WEIGHTS), ("deep/er.txt", b"")]);
        let tar = archive(&[
            ("adapter.safetensors", FILE, WEIGHTS),
            ("./deep/er.txt", FILE, b""),
            (MANIFEST_NAME, FILE, &manifest),
        ]);
        let output = dir.path().join("out");
        fs::create_dir(&output).expect("an empty directory is welcome");
        let files = unpack(tar.as_slice(), &output).expect("unpacks");
        assert_eq!(files.len(), 3);
        assert_eq!(fs::read(output.join("adapter.safetensors")).expect("read"), WEIGHTS);
        assert!(output.join("deep/er.txt").is_file());
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 1, "no staging is left");
    }

    #[test]
    fn a_path_outside_the_directory_is_refused() {
        for name in ["../x", "a/../../x", "/tmp/x"] {
            let error = refused(&[(name, FILE, WEIGHTS)]);
            assert!(error.contains("outside"), "{name}: {error}");
        }
    }

    #[test]
    fn a_link_is_refused() {
        let error = refused(&[("x", tar::EntryType::Symlink, b"")]);
        assert!(error.contains("Symlink"), "{error}");
    }

    #[test]
    fn a_file_that_comes_twice_is_refused() {
        refused(&[("x", FILE, WEIGHTS), ("./x", FILE, WEIGHTS)]);
    }

    #[test]
    fn a_changed_file_a_missing_one_and_an_unlisted_one_are_refused_by_name() {
        let one = manifest(&[("model.safetensors", b"WEIGHTS")]);
        let error = refused(&[("model.safetensors", FILE, WEIGHTS), (MANIFEST_NAME, FILE, &one)]);
        assert!(error.contains("model.safetensors is not what the manifest says"), "{error}");
        let error = refused(&[(MANIFEST_NAME, FILE, &one)]);
        assert!(error.contains("lists model.safetensors, which did not come"), "{error}");
        let none = manifest(&[]);
        let error = refused(&[("extra", FILE, WEIGHTS), (MANIFEST_NAME, FILE, &none)]);
        assert!(error.contains("holds extra"), "{error}");
    }

    #[test]
    fn a_download_that_broke_off_is_refused_wherever_it_broke() {
        let manifest = manifest(&[("w", WEIGHTS)]);
        let tar = archive(&[("w", FILE, WEIGHTS), (MANIFEST_NAME, FILE, &manifest)]);
        let dir = tempfile::tempdir().expect("temp dir");
        // Two records of a header and its content; the end marker of 1024 zeros may be missing.
        for length in [0, 100, 512, 515, 1024, 1100, 1540] {
            let output = dir.path().join(length.to_string());
            unpack(&tar[..length], &output).expect_err("broken off");
            assert!(!output.exists(), "{length} bytes");
        }
    }

    #[test]
    fn an_output_with_something_in_it_is_refused_and_kept() {
        let dir = tempfile::tempdir().expect("temp dir");
        fs::write(dir.path().join("mine"), "precious").expect("write");
        let error = unpack(archive(&[]).as_slice(), dir.path()).expect_err("occupied").to_string();
        assert!(error.contains("is not empty"), "{error}");
        assert_eq!(fs::read(dir.path().join("mine")).expect("kept"), b"precious");
    }
}
