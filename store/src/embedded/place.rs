//! Where the cluster, its socket and its notes lie.
//!
//! The cluster lies in the data directory, unless the user that PostgreSQL runs as cannot get
//! there (a directory under /root, say); then elsewhere, and a note in the data directory says
//! where. The socket lies in a directory of its own, whose path is short: the kernel takes 107
//! bytes for it.

use super::EmbeddedError;
use super::account::Account;
use rand::rng;
use serde::{Deserialize, Serialize};
use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tempfile::TempDir;
use tunesmith_core::ids::random_text;

/// The most bytes in the path of a unix socket on Linux, its closing zero aside.
const MAX_SOCKET_PATH: usize = 107;
/// The port; a socket's name carries it.
pub(super) const PORT: u16 = 5432;
/// How the names of socket directories begin.
const SOCKET_DIR_PREFIX: &str = "tunesmith-";

/// What one process must tell the next about a data directory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    /// The cluster, if it is not in the data directory. What is in it moves along with it.
    pub(super) cluster: Option<PathBuf>,
    /// Where the socket is or was.
    pub(super) socket_dir: Option<PathBuf>,
}

/// A data directory.
#[derive(Debug, Clone)]
pub(super) struct DataDir {
    path: PathBuf,
}

impl DataDir {
    /// Makes the directory if it is not there.
    pub(super) fn open(path: &Path) -> Result<Self, EmbeddedError> {
        std::fs::create_dir_all(path).map_err(EmbeddedError::file(path))?;
        let path = path.canonicalize().map_err(EmbeddedError::file(path))?;
        Ok(Self { path })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Held, with a lock on it, by the process that runs the cluster.
    pub(super) fn lock_file(&self) -> PathBuf {
        self.path.join("postgres.lock")
    }

    pub(super) fn log_file(&self) -> PathBuf {
        self.path.join("postgres.log")
    }

    fn note_file(&self) -> PathBuf {
        self.path.join("postgres.json")
    }

    /// Where a cluster lies whose user can get into the data directory.
    pub(super) fn own_cluster(&self) -> PathBuf {
        self.path.join("postgres")
    }

    pub(super) fn note(&self) -> Result<Note, EmbeddedError> {
        let path = self.note_file();
        match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|error| EmbeddedError::file(&path)(error.into())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Note::default()),
            Err(error) => Err(EmbeddedError::file(&path)(error)),
        }
    }

    /// Replaces the note, whole or not at all.
    pub(super) fn write_note(&self, note: &Note) -> Result<(), EmbeddedError> {
        let path = self.note_file();
        let failed = || EmbeddedError::file(&path);
        let mut file = tempfile::NamedTempFile::new_in(&self.path).map_err(failed())?;
        serde_json::to_writer(&mut file, note).map_err(|error| failed()(error.into()))?;
        file.as_file().sync_all().map_err(failed())?;
        file.persist(&path).map_err(|error| failed()(error.error))?;
        Ok(())
    }

    /// Places for a new cluster, best first.
    pub(super) fn places(&self) -> [PathBuf; 3] {
        // The name is new each time: a data directory that was deleted and made again must not
        // find the cluster of its namesake.
        let name = random_text(&mut rng(), 12);
        [
            self.own_cluster(),
            Path::new("/var/lib/tunesmith").join(&name),
            PathBuf::from(format!("/var/tmp/tunesmith-{name}")),
        ]
    }
}

/// Makes an empty directory for `account` alone, with the parents it needs.
pub(super) fn private_dir(path: &Path, account: Account) -> Result<(), EmbeddedError> {
    let failed = || EmbeddedError::file(path);
    if let Some(parent) = path.parent()
        && !parent.is_dir()
    {
        std::fs::create_dir_all(parent).map_err(failed())?;
        // Everyone may pass, whatever the umask says.
        std::fs::set_permissions(parent, Permissions::from_mode(0o711)).map_err(failed())?;
    }
    std::fs::create_dir(path).map_err(failed())?;
    std::fs::set_permissions(path, Permissions::from_mode(0o700)).map_err(failed())?;
    account.own(path)
}

/// Whether `account` can run `program` in `directory`. It is tried, as nothing else knows of every
/// rule that a file system has.
pub(super) fn can_run_in(directory: &Path, program: &Path, account: Account) -> bool {
    let mut command = Command::new(program);
    command.arg("--version").current_dir(directory).stdout(Stdio::null()).stderr(Stdio::null());
    account.apply(&mut command);
    command.status().is_ok_and(|status| status.success())
}

/// A new directory for the socket that only `account` may enter, and root.
pub(super) fn socket_dir(account: Account) -> Result<TempDir, EmbeddedError> {
    let temporary = std::env::temp_dir();
    // A fresh random name, so nobody can have made it before us, and closed from its first moment.
    let mut builder = tempfile::Builder::new();
    builder.prefix(SOCKET_DIR_PREFIX).permissions(Permissions::from_mode(0o700));
    let mut error = None;
    for parent in [Path::new("/tmp"), &temporary] {
        match builder.tempdir_in(parent) {
            Ok(directory) if socket_file(directory.path()).as_os_str().len() <= MAX_SOCKET_PATH => {
                account.own(directory.path())?;
                return Ok(directory);
            }
            Ok(directory) => {
                error = Some(EmbeddedError::SocketPath { path: socket_file(directory.path()) });
            }
            Err(source) => error = Some(EmbeddedError::file(parent)(source)),
        }
    }
    Err(error.unwrap_or_else(|| EmbeddedError::SocketPath { path: temporary }))
}

/// Removes a socket directory that a process left behind as it was killed.
pub(super) fn remove_stale_socket_dir(path: &Path) {
    let is_ours = path
        .file_name()
        .is_some_and(|name| name.as_encoded_bytes().starts_with(SOCKET_DIR_PREFIX.as_bytes()));
    if is_ours && std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir()) {
        // Litter that stays hurts nobody.
        drop(std::fs::remove_dir_all(path));
    }
}

/// The socket in its directory, by PostgreSQL's rule.
pub(super) fn socket_file(directory: &Path) -> PathBuf {
    directory.join(format!(".s.PGSQL.{PORT}"))
}

/// The last lines of the log, from `offset` on.
pub(super) fn log_tail(path: &Path, offset: u64) -> String {
    const LINES: usize = 5;
    use std::io::{Read as _, Seek as _};
    let mut text = Vec::new();
    let read = File::open(path).and_then(|mut file| {
        file.seek(std::io::SeekFrom::Start(offset))?;
        file.read_to_end(&mut text)
    });
    if let Err(error) = read {
        return format!("{}: {error}", path.display());
    }
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}
