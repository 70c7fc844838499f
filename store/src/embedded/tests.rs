use super::*;
use crate::{Store, StoreConfig};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use tempfile::TempDir;

/// Names the data directory of the process that [`hold_a_cluster`] is.
const HELD_DIR: &str = "TUNESMITH_TEST_HELD_DIR";

/// A data directory that every user may pass through.
fn open_dir() -> TempDir {
    let directory = tempfile::tempdir().expect("directory");
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755))
        .expect("mode");
    directory
}

async fn start(data_dir: &Path) -> Embedded {
    Embedded::start(data_dir).await.expect("start")
}

async fn run(cluster: &Embedded, sql: &'static str) {
    let mut connection = connect(cluster.url()).await.expect("connect");
    sqlx::query(sql).execute(&mut connection).await.expect(sql);
}

async fn ask<T>(cluster: &Embedded, sql: &'static str) -> T
where
    T: Send + Unpin + for<'r> sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
{
    let mut connection = connect(cluster.url()).await.expect("connect");
    sqlx::query_scalar(sql).fetch_one(&mut connection).await.expect(sql)
}

/// Leaves something in the cluster that [`assert_remembers`] looks for.
async fn remember(cluster: &Embedded) {
    run(cluster, "CREATE TABLE memory AS SELECT 42 AS answer").await;
}

async fn assert_remembers(cluster: &Embedded) {
    assert_eq!(ask::<i32>(cluster, "SELECT answer FROM memory").await, 42);
}

#[tokio::test]
async fn a_second_start_finds_everything_as_it_was() {
    let root = open_dir();
    // The data directory itself is made.
    let data_dir = root.path().join("new/data");
    let first = start(&data_dir).await;
    remember(&first).await;
    first.stop().await.expect("stop");
    let second = start(&data_dir).await;
    assert_remembers(&second).await;
    assert_eq!(ask::<String>(&second, "SHOW fsync").await, "on");
    assert_eq!(ask::<String>(&second, "SHOW server_encoding").await, "UTF8");
    second.stop().await.expect("stop");
}

#[tokio::test]
async fn a_whole_store_runs_on_it() {
    let root = open_dir();
    let cluster = start(root.path()).await;
    let config = StoreConfig {
        database_url: cluster.url().to_owned(),
        object_store_url: "memory:///".to_owned(),
    };
    let store = Store::connect(&config).await.expect("connect");
    store.migrate().await.expect("migrate");
    store.migrate().await.expect("a second time");
    store.ping().await.expect("ping");
    store.close().await;
    cluster.stop().await.expect("stop");
}

#[tokio::test]
async fn it_speaks_over_a_private_socket_only_and_not_as_root() {
    let root = open_dir();
    let cluster = start(root.path()).await;
    assert_eq!(ask::<String>(&cluster, "SHOW listen_addresses").await, "");
    let socket_dir = cluster.socket_dir().expect("ours").to_owned();
    let metadata = std::fs::metadata(&socket_dir).expect("socket directory");
    assert_eq!(metadata.mode() & 0o777, 0o700);
    let socket = std::fs::metadata(place::socket_file(&socket_dir)).expect("socket");
    assert_eq!(socket.mode() & 0o777, 0o700);
    let process = format!("/proc/{}", cluster.pid().expect("ours").as_raw_nonzero());
    let server = std::fs::metadata(process).expect("server");
    assert_ne!(server.uid(), 0);
    assert_eq!(server.uid(), metadata.uid());
    cluster.stop().await.expect("stop");
    assert!(!socket_dir.exists(), "the socket's directory stays behind");
}

#[tokio::test]
async fn a_ctrl_c_in_the_terminal_does_not_reach_it() {
    let root = open_dir();
    let cluster = start(root.path()).await;
    let group = rustix::process::getpgid(cluster.pid()).expect("group");
    assert_ne!(group, rustix::process::getpgrp());
    cluster.stop().await.expect("stop");
}

#[tokio::test]
async fn the_environments_own_database_settings_do_not_matter() {
    // They are of the kind that libpq reads, and sqlx with it; the URL has an answer to each.
    let url = url(Path::new("/tmp/a b"), "postgres");
    let options: PgConnectOptions = url.parse().expect("url");
    assert_eq!(options.get_socket(), Some(&PathBuf::from("/tmp/a b")));
    assert_eq!((options.get_port(), options.get_username()), (PORT, NAME));
    assert!(matches!(options.get_ssl_mode(), sqlx::postgres::PgSslMode::Disable));
    let command = bare_command(Path::new("postgres"), Account::choose().expect("account"));
    let names: Vec<_> = command.get_envs().map(|(name, _)| name.to_owned()).collect();
    assert_eq!(names, ["LC_ALL", "PATH", "TZ"]);
}

#[tokio::test]
async fn a_data_directory_with_a_very_long_path_works() {
    let root = open_dir();
    let data_dir = root.path().join("long".repeat(50));
    assert!(place::socket_file(&data_dir).as_os_str().len() > 107);
    let cluster = start(&data_dir).await;
    cluster.stop().await.expect("stop");
}

#[tokio::test]
async fn a_data_directory_that_the_database_user_cannot_reach_works() {
    if !rustix::process::geteuid().is_root() {
        // Then the database user is this one, and reaches what this one does.
        return;
    }
    let root = tempfile::tempdir().expect("directory");
    // For root alone, as /root is.
    std::fs::set_permissions(root.path(), std::fs::Permissions::from_mode(0o700)).expect("mode");
    let first = start(root.path()).await;
    remember(&first).await;
    let elsewhere = DataDir::open(root.path()).expect("open").note().expect("note");
    let elsewhere = elsewhere.cluster.expect("a cluster elsewhere");
    assert!(!elsewhere.starts_with(root.path()));
    first.stop().await.expect("stop");
    let second = start(root.path()).await;
    assert_remembers(&second).await;
    second.stop().await.expect("stop");

    // A note of a cluster that is gone is no reason to begin with an empty one.
    std::fs::remove_dir_all(&elsewhere).expect("remove");
    let error = Embedded::start(root.path()).await.expect_err("the cluster is gone");
    assert!(error.to_string().contains(&*elsewhere.to_string_lossy()), "{error}");
}

#[tokio::test]
async fn a_data_directory_that_was_moved_takes_its_cluster_along() {
    let root = open_dir();
    let [here, there] = ["here", "there"].map(|name| root.path().join(name));
    let first = start(&here).await;
    remember(&first).await;
    first.stop().await.expect("stop");
    std::fs::rename(&here, &there).expect("move");
    let second = start(&there).await;
    assert_remembers(&second).await;
    second.stop().await.expect("stop");
}

#[tokio::test]
async fn a_cluster_in_use_is_refused_to_a_second_owner_and_open_to_a_guest() {
    let root = open_dir();
    let owner = start(root.path()).await;
    remember(&owner).await;
    let error = Embedded::start(root.path()).await.expect_err("in use");
    assert!(matches!(error, EmbeddedError::InUse { .. }), "{error}");

    let guest = Embedded::attach(root.path()).await.expect("attach");
    assert_remembers(&guest).await;
    guest.stop().await.expect("a guest stops nothing");
    assert_remembers(&owner).await;
    owner.stop().await.expect("stop");

    // With nobody there, who attaches becomes the owner.
    let alone = Embedded::attach(root.path()).await.expect("attach");
    assert_remembers(&alone).await;
    assert!(alone.pid().is_some());
    alone.stop().await.expect("stop");
}

#[tokio::test]
async fn a_guest_that_comes_during_the_start_waits_for_its_end() {
    let root = open_dir();
    let (owner, guest) = tokio::join!(Embedded::start(root.path()), Embedded::attach(root.path()));
    let (owner, guest) = (owner.expect("owner"), guest.expect("guest"));
    assert_eq!(owner.url(), guest.url());
    assert_eq!(ask::<i32>(&guest, "SELECT 1").await, 1);
    owner.stop().await.expect("stop");
}

#[tokio::test]
async fn a_stale_pid_file_is_survived_even_if_the_pid_lives_on_as_something_else() {
    let root = open_dir();
    let first = start(root.path()).await;
    remember(&first).await;
    let pid_file = root.path().join("postgres/postmaster.pid");
    let text = std::fs::read_to_string(&pid_file).expect("pid file");
    first.stop().await.expect("stop");
    assert!(!pid_file.exists());

    let mut other = Command::new("sleep");
    other.arg("1000");
    // PostgreSQL takes a process of its own user for its server.
    let account = Account::choose().expect("account");
    account.apply(&mut other);
    let mut other = other.spawn().expect("sleep");
    let (_, rest) = text.split_once('\n').expect("lines");
    std::fs::write(&pid_file, format!("{}\n{rest}", other.id())).expect("stale file");
    account.own(&pid_file).expect("own");

    let second = start(root.path()).await;
    assert_remembers(&second).await;
    assert_eq!(other.try_wait().expect("wait"), None, "the other process was harmed");
    second.stop().await.expect("stop");
    other.kill().and_then(|()| other.wait()).expect("end");
}

#[tokio::test]
async fn what_a_killed_initdb_left_is_made_anew() {
    let root = open_dir();
    let unfinished = root.path().join("postgres.unfinished");
    std::fs::create_dir(&unfinished).expect("directory");
    std::fs::write(unfinished.join("PG_VERSION"), "15\n").expect("half a cluster");
    let cluster = start(root.path()).await;
    assert!(!unfinished.exists());
    cluster.stop().await.expect("stop");
}

#[tokio::test]
async fn a_server_that_was_killed_is_noticed_and_recovers_at_the_next_start() {
    let root = open_dir();
    let first = start(root.path()).await;
    remember(&first).await;
    kill_process(first.pid().expect("ours"), Signal::KILL).expect("kill");
    let status = first.exited().await.expect("exited");
    assert!(!status.success());
    drop(first);
    let second = start(root.path()).await;
    assert_remembers(&second).await;
    second.stop().await.expect("stop");
}

#[tokio::test]
async fn a_server_that_cannot_start_says_why() {
    let root = open_dir();
    start(root.path()).await.stop().await.expect("stop");
    let settings = root.path().join("postgres/postgresql.conf");
    std::fs::write(&settings, "shared_buffers = plenty\n").expect("settings");
    let error = Embedded::start(root.path()).await.expect_err("bad settings");
    assert!(matches!(error, EmbeddedError::NotStarted { .. }), "{error}");
    assert!(error.to_string().contains("shared_buffers"), "{error}");
}

#[test]
fn it_outlives_the_thread_and_the_runtime_that_started_it() {
    let root = open_dir();
    let data_dir = root.path().to_owned();
    let cluster = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().expect("runtime");
        runtime.block_on(start(&data_dir))
    })
    .join()
    .expect("thread");
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    runtime.block_on(async {
        assert_eq!(ask::<i32>(&cluster, "SELECT 1").await, 1);
        cluster.stop().await.expect("stop");
    });
}

/// This program once more, as a process that runs the cluster of `data_dir`, and its server.
fn spawn_owner(data_dir: &Path) -> (std::process::Child, Pid) {
    use std::io::BufRead as _;
    let mut owner = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "embedded::tests::hold_a_cluster", "--ignored", "--nocapture"])
        .env(HELD_DIR, data_dir)
        .stdout(Stdio::piped())
        .spawn()
        .expect("owner");
    let output = std::io::BufReader::new(owner.stdout.take().expect("output"));
    let pid = output
        .lines()
        .map(|line| line.expect("line"))
        // The test harness writes its own words before ours, on the same line.
        .find_map(|line| line.split_once("holding ")?.1.trim().parse().ok())
        .and_then(Pid::from_raw)
        .expect("the owner says its server's id");
    (owner, pid)
}

#[tokio::test]
async fn it_dies_with_a_parent_that_is_killed() {
    let root = open_dir();
    let (mut owner, pid) = spawn_owner(root.path());
    let cluster = root.path().join("postgres").canonicalize().expect("cluster");
    assert!(serves(pid, &cluster));
    let guest = Embedded::attach(root.path()).await.expect("attach");
    assert_remembers(&guest).await;
    owner.kill().and_then(|()| owner.wait()).expect("kill -9");
    let server_is_gone = async {
        while serves(pid, &cluster) {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    tokio::time::timeout(STOP_LIMIT, server_is_gone).await.expect("the server lives on");
    assert!(connect(guest.url()).await.is_err());
    // The next start would remove it.
    let note = DataDir::open(root.path()).expect("open").note().expect("note");
    place::remove_stale_socket_dir(&note.socket_dir.expect("noted"));
}

#[tokio::test]
async fn a_start_right_after_the_owner_was_killed_waits_for_its_server_to_go() {
    let root = open_dir();
    let (mut owner, pid) = spawn_owner(root.path());
    let cluster = root.path().join("postgres").canonicalize().expect("cluster");
    owner.kill().and_then(|()| owner.wait()).expect("kill -9");
    let next = start(root.path()).await;
    assert!(!serves(pid, &cluster), "two servers on one cluster");
    assert_remembers(&next).await;
    next.stop().await.expect("stop");
}

#[tokio::test]
#[ignore = "run by other tests, as a process that they kill"]
async fn hold_a_cluster() {
    let data_dir = std::env::var_os(HELD_DIR).expect("run by another test");
    let cluster = start(Path::new(&data_dir)).await;
    remember(&cluster).await;
    println!("holding {}", cluster.pid().expect("ours").as_raw_nonzero());
    std::future::pending::<()>().await;
}
