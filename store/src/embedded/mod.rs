//! A private PostgreSQL for a machine that has none running.
//!
//! The cluster is made from the installed programs, speaks only over a unix socket that nobody
//! else can reach, runs as an unprivileged user, and stops when this process stops, however that
//! happens. Durability is PostgreSQL's own: `fsync` stays on.

mod account;
mod die_with_parent;
mod error;
mod place;
mod programs;
mod server;

pub use error::EmbeddedError;

use account::Account;
use place::{DataDir, Note, PORT};
use programs::Programs;
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use server::Server;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _, PgConnection};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The cluster's superuser, and the database that tunesmith lives in.
const NAME: &str = "tunesmith";
/// How long a cluster may take to answer. A first start takes well under a second; one after a
/// crash may have much to recover.
const START_LIMIT: Duration = Duration::from_secs(300);
/// How long a fast shutdown may take before the cluster is stopped at once.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// Between two looks at something that is about to happen.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A private PostgreSQL that answers.
#[derive(Debug)]
pub struct Embedded {
    url: String,
    running: Option<Running>,
}

/// A cluster that this process runs. The order of the fields is the order of their end.
#[derive(Debug)]
struct Running {
    server: Server,
    socket_dir: TempDir,
    /// Holds the lock on the data directory.
    _lock: File,
}

impl Drop for Running {
    /// For a process that fails on its way: the server is told to stop, and not waited for.
    fn drop(&mut self) {
        self.server.signal(Signal::INT);
    }
}

/// What tests change about a server.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    /// Whether commits survive a power failure.
    pub(crate) durable: bool,
}

impl Embedded {
    /// Starts the cluster of `data_dir`, making it on the first time.
    ///
    /// # Errors
    /// [`EmbeddedError::InUse`] if another process runs it; what is missing on this machine; what
    /// PostgreSQL says.
    pub async fn start(data_dir: &Path) -> Result<Self, EmbeddedError> {
        Self::start_with(data_dir, Settings { durable: true }).await
    }

    /// Uses the cluster of `data_dir` in the process that runs it, or else starts it here.
    ///
    /// # Errors
    /// As [`start`](Self::start), but for `InUse`.
    pub async fn attach(data_dir: &Path) -> Result<Self, EmbeddedError> {
        let begun = Instant::now();
        loop {
            match Self::start(data_dir).await {
                Err(EmbeddedError::InUse { .. }) if begun.elapsed() < START_LIMIT => {}
                started => return started,
            }
            // The other process may still be starting it.
            let note = DataDir::open(data_dir)?.note()?;
            if let Some(socket_dir) = note.socket_dir
                && database_exists(&socket_dir).await.unwrap_or(false)
            {
                return Ok(Self { url: url(&socket_dir, NAME), running: None });
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// What to connect to.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Waits until the server ends by itself, which it should not. Never returns for a cluster
    /// that another process runs.
    ///
    /// # Errors
    /// Its end cannot be told.
    pub async fn exited(&self) -> std::io::Result<ExitStatus> {
        match &self.running {
            Some(running) => running.server.exited().await,
            None => std::future::pending().await,
        }
    }

    /// Stops the server: open transactions are rolled back, everything committed is on disk. Does
    /// nothing to a cluster that another process runs.
    ///
    /// # Errors
    /// Its end cannot be told.
    pub async fn stop(self) -> std::io::Result<()> {
        let Some(running) = self.running else { return Ok(()) };
        running.server.signal(Signal::INT);
        if tokio::time::timeout(STOP_LIMIT, running.server.exited()).await.is_err() {
            tracing::warn!("PostgreSQL takes too long to stop and is stopped at once");
            running.server.signal(Signal::QUIT);
        }
        running.server.exited().await.map(drop)
    }

    pub(crate) async fn start_with(
        data_dir: &Path,
        settings: Settings,
    ) -> Result<Self, EmbeddedError> {
        let data_dir = DataDir::open(data_dir)?;
        let lock = lock(&data_dir)?;
        let account = Account::choose()?;
        let mut note = data_dir.note()?;
        let (cluster, programs) = match existing_cluster(&data_dir, &note)? {
            Some((cluster, version)) => (cluster, programs::find(Some(version))?),
            None => {
                let programs = programs::find(None)?;
                (create_cluster(&data_dir, &programs, account).await?, programs)
            }
        };
        if !place::can_run_in(&cluster, &programs.postgres, account) {
            return Err(EmbeddedError::Unreachable { path: cluster });
        }
        end_orphan(&cluster).await?;
        if let Some(stale) = note.socket_dir.take() {
            place::remove_stale_socket_dir(&stale);
        }
        let socket_dir = place::socket_dir(account)?;
        note.socket_dir = Some(socket_dir.path().to_owned());
        note.cluster = (cluster != data_dir.own_cluster()).then(|| cluster.clone());
        data_dir.write_note(&note)?;

        let log = data_dir.log_file();
        let log_file = File::options().append(true).create(true).open(&log);
        let log_file = log_file.map_err(EmbeddedError::file(&log))?;
        let log_offset = log_file.metadata().map_err(EmbeddedError::file(&log))?.len();
        let command =
            server_command(&programs, &cluster, socket_dir.path(), account, settings, log_file)?;
        let server =
            Server::spawn(command).await.map_err(EmbeddedError::file(&programs.postgres))?;
        let running = Running { server, socket_dir, _lock: lock };
        let not_started = || EmbeddedError::NotStarted {
            log: log.clone(),
            tail: place::log_tail(&log, log_offset),
        };
        let socket_dir = running.socket_dir.path();
        wait_until_ready(&running.server, socket_dir).await?.ok_or_else(not_started)?;
        let url = url(socket_dir, NAME);
        Ok(Self { url, running: Some(running) })
    }

    #[cfg(any(test, feature = "test-support"))]
    pub(crate) fn socket_dir(&self) -> Option<&Path> {
        self.running.as_ref().map(|running| running.socket_dir.path())
    }

    #[cfg(any(test, feature = "test-support"))]
    pub(crate) fn pid(&self) -> Option<Pid> {
        self.running.as_ref().map(|running| running.server.pid())
    }
}

/// Takes the data directory for this process. The kernel gives it back when the process ends.
fn lock(data_dir: &DataDir) -> Result<File, EmbeddedError> {
    let path = data_dir.lock_file();
    let file = File::options().write(true).create(true).truncate(false).open(&path);
    let file = file.map_err(EmbeddedError::file(&path))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            Err(EmbeddedError::InUse { path: data_dir.path().to_owned() })
        }
        Err(error) => Err(EmbeddedError::file(&path)(error.into())),
    }
}

/// The cluster that is there, and its version.
fn existing_cluster(
    data_dir: &DataDir,
    note: &Note,
) -> Result<Option<(PathBuf, u32)>, EmbeddedError> {
    let cluster = note.cluster.clone().unwrap_or_else(|| data_dir.own_cluster());
    let path = cluster.join("PG_VERSION");
    match std::fs::read_to_string(&path) {
        Ok(text) => match text.trim().parse() {
            Ok(version) => Ok(Some((cluster, version))),
            Err(_) => Err(EmbeddedError::file(&path)(std::io::ErrorKind::InvalidData.into())),
        },
        // A note of a cluster that is gone must not lead to an empty one in its place.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && note.cluster.is_none() => {
            Ok(None)
        }
        Err(error) => Err(EmbeddedError::file(&path)(error)),
    }
}

/// Makes a cluster in the first place that `account` can use. It gets its name only when it is
/// whole, so that an `initdb` that was killed leaves nothing that looks like one.
async fn create_cluster(
    data_dir: &DataDir,
    programs: &Programs,
    account: Account,
) -> Result<PathBuf, EmbeddedError> {
    if !place::can_run_in(Path::new("/"), &programs.postgres, account) {
        return Err(EmbeddedError::Unreachable { path: programs.postgres.clone() });
    }
    let mut last = EmbeddedError::Unreachable { path: data_dir.own_cluster() };
    for cluster in data_dir.places() {
        let unfinished = cluster.with_extension("unfinished");
        if unfinished.exists() {
            std::fs::remove_dir_all(&unfinished).map_err(EmbeddedError::file(&unfinished))?;
        }
        match place::private_dir(&unfinished, account) {
            Ok(()) if place::can_run_in(&unfinished, &programs.initdb, account) => {
                initdb(&unfinished, programs, account).await?;
                std::fs::rename(&unfinished, &cluster).map_err(EmbeddedError::file(&cluster))?;
                return Ok(cluster);
            }
            Ok(()) => {
                std::fs::remove_dir(&unfinished).map_err(EmbeddedError::file(&unfinished))?;
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn initdb(
    cluster: &Path,
    programs: &Programs,
    account: Account,
) -> Result<(), EmbeddedError> {
    let failed = || EmbeddedError::file(&programs.initdb);
    let output = tempfile::tempfile().map_err(failed())?;
    let mut command = bare_command(&programs.initdb, account);
    command
        .arg("--pgdata")
        .arg(cluster)
        .args(["--username", NAME, "--encoding", "UTF8", "--locale", "C"])
        // Whoever can reach the socket is let in, and only this program's users can.
        .args(["--auth", "trust"])
        // The server syncs what it writes; the first files are on disk long before they matter.
        .args(["--no-sync", "--no-instructions"])
        .current_dir(cluster)
        .stdout(output.try_clone().map_err(failed())?)
        .stderr(output.try_clone().map_err(failed())?);
    let initdb = Server::spawn(command).await.map_err(failed())?;
    if initdb.exited().await.map_err(failed())?.success() {
        return Ok(());
    }
    use std::io::{Read as _, Seek as _};
    let mut output = output;
    let mut text = String::new();
    output.rewind().and_then(|()| output.read_to_string(&mut text)).map_err(failed())?;
    Err(EmbeddedError::Initdb { output: text })
}

fn server_command(
    programs: &Programs,
    cluster: &Path,
    socket_dir: &Path,
    account: Account,
    settings: Settings,
    log: File,
) -> Result<Command, EmbeddedError> {
    let mut command = bare_command(&programs.postgres, account);
    command.arg("-D").arg(cluster).arg("-k").arg(socket_dir);
    command.args(["-p", &PORT.to_string(), "-c", "listen_addresses="]);
    // The directory is closed already; this closes the socket itself, too.
    command.args(["-c", "unix_socket_permissions=0700", "-c", "log_checkpoints=off"]);
    if !settings.durable {
        command.args(["-c", "fsync=off", "-c", "synchronous_commit=off"]);
        command.args(["-c", "full_page_writes=off"]);
    }
    command
        .current_dir(cluster)
        .stdout(log.try_clone().map_err(EmbeddedError::file(cluster))?)
        .stderr(log);
    Ok(command)
}

/// `program` as `account`, untouched by the environment's own `PG…` variables and by a Ctrl-C in
/// the terminal: whoever stops the process decides when the database stops.
fn bare_command(program: &Path, account: Account) -> Command {
    use std::os::unix::process::CommandExt as _;
    let mut command = Command::new(program);
    command.env_clear().env("LC_ALL", "C").env("TZ", "UTC").stdin(Stdio::null()).process_group(0);
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
    account.apply(&mut command);
    command
}

/// Sees to it that no server of an earlier process uses the cluster, and that none seems to.
///
/// The lock on the data directory is ours, so a server that still runs is one whose parent was
/// killed, about to stop. PostgreSQL itself takes any process of its user for that server if it
/// happens to have the process id that `postmaster.pid` names, which is common after a restart of
/// a container; so a file that names no server of this cluster goes.
async fn end_orphan(cluster: &Path) -> Result<(), EmbeddedError> {
    let file = cluster.join("postmaster.pid");
    let text = match std::fs::read_to_string(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(EmbeddedError::file(&file)(error)),
    };
    let pid = text.lines().next().and_then(|line| line.trim().parse().ok()).and_then(Pid::from_raw);
    if let Some(pid) = pid
        && serves(pid, cluster)
    {
        let begun = Instant::now();
        for signal in [Signal::INT, Signal::QUIT] {
            // A signal that finds nobody is not needed.
            let _ = kill_process(pid, signal);
            while serves(pid, cluster) && begun.elapsed() < STOP_LIMIT {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        }
        if serves(pid, cluster) {
            return Err(EmbeddedError::InUse { path: cluster.to_owned() });
        }
    }
    match std::fs::remove_file(&file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(EmbeddedError::file(&file)(error))
        }
        _ => Ok(()),
    }
}

/// Whether the process lives and works in `cluster`, as its server does.
fn serves(pid: Pid, cluster: &Path) -> bool {
    let cwd = format!("/proc/{}/cwd", pid.as_raw_nonzero());
    let Ok(cluster) = cluster.canonicalize() else { return false };
    test_kill_process(pid).is_ok() && std::fs::read_link(cwd).is_ok_and(|cwd| cwd == cluster)
}

/// Waits until the database is there. `None` if the server ends before, or takes too long.
async fn wait_until_ready(server: &Server, socket_dir: &Path) -> Result<Option<()>, EmbeddedError> {
    let begun = Instant::now();
    while server.status().is_none() && begun.elapsed() < START_LIMIT {
        match ensure_database(socket_dir).await {
            Ok(()) => return Ok(Some(())),
            Err(error) if is_not_yet(&error) => tokio::time::sleep(LOOK_AGAIN).await,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

/// Whether the server is not there yet, or says that it is starting up.
fn is_not_yet(error: &sqlx::Error) -> bool {
    const CANNOT_CONNECT_NOW: &str = "57P03";
    match error {
        sqlx::Error::Io(_) => true,
        sqlx::Error::Database(error) => error.code().as_deref() == Some(CANNOT_CONNECT_NOW),
        _ => false,
    }
}

async fn ensure_database(socket_dir: &Path) -> Result<(), sqlx::Error> {
    let mut connection = connect(&url(socket_dir, "postgres")).await?;
    let exists: bool =
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM pg_database WHERE datname = $1)")
            .bind(NAME)
            .fetch_one(&mut connection)
            .await?;
    if !exists {
        sqlx::query("CREATE DATABASE tunesmith").execute(&mut connection).await?;
    }
    connection.close().await
}

async fn database_exists(socket_dir: &Path) -> Result<bool, sqlx::Error> {
    let connection = connect(&url(socket_dir, NAME)).await?;
    connection.close().await?;
    Ok(true)
}

async fn connect(url: &str) -> Result<PgConnection, sqlx::Error> {
    url.parse::<PgConnectOptions>()?.connect().await
}

/// The port and the want of TLS are said aloud, because the environment's `PG…` variables would
/// speak for them otherwise.
fn url(socket_dir: &Path, database: &str) -> String {
    let host: String =
        url::form_urlencoded::byte_serialize(socket_dir.as_os_str().as_encoded_bytes()).collect();
    format!("postgres://{NAME}@localhost:{PORT}/{database}?host={host}&sslmode=disable")
}

#[cfg(test)]
mod tests;
