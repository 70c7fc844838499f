//! Why there is no private PostgreSQL, and what to do about it.

use super::programs;
use std::path::{Path, PathBuf};

/// Why there is no private PostgreSQL.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// No programs.
    #[error(
        "PostgreSQL is not installed: run `apt-get install postgresql` ({oldest} or newer), or set \
         {variable} to the directory of initdb and postgres",
        oldest = programs::OLDEST_VERSION,
        variable = programs::PROGRAMS_VARIABLE
    )]
    NotInstalled,
    /// Programs, but of a version that the schema does not run on.
    #[error(
        "PostgreSQL {found} is installed, but {oldest} or newer is needed: run `apt-get install \
         postgresql`, or set {variable} to the directory of a newer initdb and postgres",
        oldest = programs::OLDEST_VERSION,
        variable = programs::PROGRAMS_VARIABLE
    )]
    TooOld {
        /// The newest there is.
        found: u32,
    },
    /// The cluster is of a version whose programs are gone.
    #[error(
        "the data directory holds a cluster of PostgreSQL {version}, but {found} is installed: run \
         `apt-get install postgresql-{version}`, or upgrade the cluster with pg_upgradecluster"
    )]
    OtherVersion {
        /// The cluster's.
        version: u32,
        /// The newest there is.
        found: u32,
    },
    /// PostgreSQL refuses root, and there is nobody else.
    #[error(
        "PostgreSQL refuses to run as root, and there is no user postgres or nobody to run it as: \
         run `useradd --system postgres`, or start tunesmith as another user"
    )]
    NoAccount,
    /// The user that PostgreSQL runs as may not get there.
    #[error(
        "the user that PostgreSQL runs as cannot use {path}: let it pass through every directory \
         above (chmod o+x)"
    )]
    Unreachable {
        /// Where it cannot get.
        path: PathBuf,
    },
    /// Another process runs the cluster.
    #[error("another tunesmith runs on {path}: stop it, or choose another --data-dir")]
    InUse {
        /// The data directory.
        path: PathBuf,
    },
    /// No directory is short enough for a socket.
    #[error("the socket path {path} is too long for the kernel: set TMPDIR to a shorter directory")]
    SocketPath {
        /// The shortest that was found.
        path: PathBuf,
    },
    /// `initdb` failed.
    #[error("initdb failed:\n{output}")]
    Initdb {
        /// What it said.
        output: String,
    },
    /// `postgres` ended, or does not answer.
    #[error("PostgreSQL did not start; {log} ends with:\n{tail}")]
    NotStarted {
        /// Its log.
        log: PathBuf,
        /// The log's last lines.
        tail: String,
    },
    /// A file could not be read or written, or a program not run.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The cluster answers, and says no.
    #[error("database: {0}")]
    Database(#[from] sqlx::Error),
}

impl EmbeddedError {
    pub(super) fn file(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::File { path: path.to_owned(), source }
    }
}
