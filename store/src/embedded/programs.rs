//! Finding PostgreSQL's programs.

use super::EmbeddedError;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Names the directory of `initdb` and `postgres`, before any other place.
pub(super) const PROGRAMS_VARIABLE: &str = "TUNESMITH_PG_BIN";
/// The oldest version whose features the schema uses.
pub(super) const OLDEST_VERSION: u32 = 15;
/// Where Debian and its kin keep one directory a version.
const DEBIAN: &str = "/usr/lib/postgresql";

/// `initdb` and `postgres` of one version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Programs {
    pub(super) initdb: PathBuf,
    pub(super) postgres: PathBuf,
    /// The major version.
    pub(super) version: u32,
}

/// The programs for a cluster of `version`, or the first there are for a new one.
pub(super) fn find(version: Option<u32>) -> Result<Programs, EmbeddedError> {
    find_in(
        std::env::var_os(PROGRAMS_VARIABLE).as_deref(),
        std::env::var_os("PATH").as_deref(),
        Path::new(DEBIAN),
        version,
    )
}

fn find_in(
    chosen: Option<&OsStr>,
    path: Option<&OsStr>,
    debian: &Path,
    version: Option<u32>,
) -> Result<Programs, EmbeddedError> {
    let directories = match chosen {
        Some(directory) => vec![PathBuf::from(directory)],
        None => {
            let path = path.map(|path| std::env::split_paths(path).collect::<Vec<_>>());
            path.unwrap_or_default().into_iter().chain(newest_first(debian)).collect()
        }
    };
    let found: Vec<Programs> = directories.iter().filter_map(|dir| programs_in(dir)).collect();
    let suitable = found.iter().find(|programs| match version {
        Some(version) => programs.version == version,
        None => programs.version >= OLDEST_VERSION,
    });
    match (suitable, version, found.iter().map(|programs| programs.version).max()) {
        (Some(programs), _, _) => Ok(programs.clone()),
        (None, _, None) => Err(EmbeddedError::NotInstalled),
        (None, Some(version), Some(found)) => Err(EmbeddedError::OtherVersion { version, found }),
        (None, None, Some(found)) => Err(EmbeddedError::TooOld { found }),
    }
}

/// `<debian>/<version>/bin`, highest version first.
fn newest_first(debian: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(debian) else { return Vec::new() };
    let mut versions: Vec<u32> =
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    versions.sort_unstable_by(|a, b| b.cmp(a));
    versions.iter().map(|version| debian.join(version.to_string()).join("bin")).collect()
}

fn programs_in(directory: &Path) -> Option<Programs> {
    let (initdb, postgres) = (directory.join("initdb"), directory.join("postgres"));
    if !initdb.is_file() || !postgres.is_file() {
        return None;
    }
    let output = Command::new(&postgres).arg("--version").output().ok()?;
    let version = parse_version(&String::from_utf8_lossy(&output.stdout))?;
    Some(Programs { initdb, postgres, version })
}

/// The major version in `postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)`.
fn parse_version(line: &str) -> Option<u32> {
    let version = line.split("(PostgreSQL)").nth(1)?.trim_start();
    let digits = version.find(|c: char| !c.is_ascii_digit()).unwrap_or(version.len());
    version[..digits].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    /// A directory of programs that say they are of `version`.
    fn install(directory: &Path, version: &str) {
        std::fs::create_dir_all(directory).expect("directory");
        for name in ["initdb", "postgres"] {
            let path = directory.join(name);
            std::fs::write(&path, format!("#!/bin/sh\necho 'postgres (PostgreSQL) {version}'\n"))
                .expect("script");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("mode");
        }
    }

    #[test]
    fn every_spelling_of_a_version_is_read() {
        for (line, version) in [
            ("postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)\n", Some(15)),
            ("postgres (PostgreSQL) 17.2\n", Some(17)),
            ("postgres (PostgreSQL) 19devel\n", Some(19)),
            ("sh: not found", None),
        ] {
            assert_eq!(parse_version(line), version, "{line}");
        }
    }

    #[test]
    fn the_newest_version_of_debian_is_taken_and_ten_is_newer_than_nine() {
        let root = tempfile::tempdir().expect("directory");
        for version in ["9", "16", "100"] {
            install(&root.path().join(version).join("bin"), &format!("{version}.1"));
        }
        let found = find_in(None, None, root.path(), None).expect("found");
        assert_eq!(found.version, 100);
        let same = find_in(None, None, root.path(), Some(16)).expect("found");
        assert_eq!(same.postgres, root.path().join("16/bin/postgres"));
    }

    #[test]
    fn the_variable_comes_before_path_and_path_before_debian() {
        let root = tempfile::tempdir().expect("directory");
        let [chosen, on_path, debian] = ["chosen", "path", "debian"].map(|n| root.path().join(n));
        install(&chosen, "15.1");
        install(&on_path, "16.1");
        install(&debian.join("17/bin"), "17.1");
        let path = on_path.as_os_str();
        let find = |chosen: Option<&Path>, path| {
            find_in(chosen.map(Path::as_os_str), path, &debian, None).expect("found").version
        };
        assert_eq!(find(Some(&chosen), Some(path)), 15);
        assert_eq!(find(None, Some(path)), 16);
        assert_eq!(find(None, None), 17);
    }

    #[test]
    fn nothing_found_says_in_one_line_what_to_install() {
        let empty = tempfile::tempdir().expect("directory");
        let error = find_in(None, None, empty.path(), None).expect_err("nothing there");
        let message = error.to_string();
        assert!(message.contains("apt-get install postgresql"), "{message}");
        assert!(message.contains(PROGRAMS_VARIABLE), "{message}");
        assert_eq!(message.lines().count(), 1, "{message}");
    }

    #[test]
    fn a_version_that_is_too_old_or_not_the_clusters_is_named() {
        let root = tempfile::tempdir().expect("directory");
        install(&root.path().join("14/bin"), "14.9");
        let old = find_in(None, None, root.path(), None).expect_err("too old");
        assert!(matches!(old, EmbeddedError::TooOld { found: 14 }), "{old}");
        let other = find_in(None, None, root.path(), Some(15)).expect_err("another version");
        assert!(matches!(other, EmbeddedError::OtherVersion { version: 15, found: 14 }), "{other}");
    }
}
