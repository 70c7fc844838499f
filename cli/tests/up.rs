//! `tunesmith up` from its first start to its end, with a real PostgreSQL.

mod support;

use rustix::process::Signal;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use support::{Up, error_lines, run, stdout_of, tunesmith, wait_until_gone};

#[test]
fn a_first_start_makes_a_key_and_a_second_one_finds_everything_as_it_was() {
    let dir = tempfile::tempdir().expect("temp dir");
    let data_dir = dir.path().join("data");
    let up = Up::start(&data_dir);
    let key_file = fs::metadata(data_dir.join("api-key")).expect("api-key");
    assert_eq!(key_file.permissions().mode() & 0o777, 0o600);
    let key = up.api_key();
    assert!(key.starts_with("sk-") && key.trim() == key, "{} characters", key.len());
    let rows = dir.path().join("rows.jsonl");
    fs::write(&rows, "{\"text\": \"one\"}\n").expect("write");
    let rows = rows.to_str().expect("text");
    let file_id = stdout_of(up.client(&key, &["files", "upload", rows]));
    let family = up.descendants();
    assert!(family.iter().any(|process| process.name == "postgres"), "{family:?}");

    up.signal(Signal::TERM);
    let (status, printed) = up.wait();
    assert_eq!(status.code(), Some(0));
    assert_eq!(printed, Vec::<String>::new(), "the ready line is the only one");
    wait_until_gone(&family);

    let up = Up::start(&data_dir);
    assert_eq!(up.api_key(), key);
    let files = stdout_of(up.client(&key, &["files", "list"]));
    assert!(files.contains(file_id.trim()) && files.contains("rows.jsonl"), "{files}");
    up.signal_group(Signal::INT);
    assert_eq!(up.wait().0.code(), Some(0), "Ctrl-C reaches the children as well");
}

#[test]
fn a_killed_up_leaves_no_postgres_behind_and_starts_again() {
    let dir = tempfile::tempdir().expect("temp dir");
    let up = Up::start(dir.path());
    let key = up.api_key();
    let family = up.descendants();
    assert!(family.iter().any(|process| process.name == "postgres"), "{family:?}");
    up.signal(Signal::KILL);
    up.wait();
    wait_until_gone(&family);

    let up = Up::start(dir.path());
    stdout_of(up.client(&key, &["jobs", "list"]));
}

#[test]
fn a_data_directory_that_others_cannot_reach_works() {
    let dir = tempfile::tempdir().expect("temp dir");
    let private = dir.path().join("private");
    fs::create_dir(&private).expect("create");
    fs::set_permissions(&private, fs::Permissions::from_mode(0o700)).expect("mode");
    let up = Up::start(&private.join("data"));
    stdout_of(up.client(&up.api_key(), &["files", "list"]));
    let mode = fs::metadata(&private).expect("still there").permissions().mode();
    assert_eq!(mode & 0o777, 0o700, "the directory is nobody else's business");
}

#[test]
fn a_data_directory_with_a_path_too_long_for_a_socket_works() {
    let dir = tempfile::tempdir().expect("temp dir");
    let data_dir = dir.path().join("d".repeat(120)).join("e".repeat(120));
    let up = Up::start(&data_dir);
    stdout_of(up.client(&up.api_key(), &["files", "list"]));
}

#[test]
fn keys_to_two_projects_see_nothing_of_each_other() {
    let dir = tempfile::tempdir().expect("temp dir");
    let data_dir = dir.path().join("data");
    let data_dir_arg = data_dir.to_str().expect("text");
    let create = ["keys", "create", "--project", "other", "--data-dir", data_dir_arg];
    let before = stdout_of(run(&create));

    let up = Up::start(&data_dir);
    let meanwhile = stdout_of(run(&create));
    let rows = dir.path().join("rows.jsonl");
    fs::write(&rows, "{\"text\": \"one\"}\n").expect("write");
    let uploaded =
        stdout_of(up.client(&before, &["files", "upload", rows.to_str().expect("text")]));
    for (key, sees) in [(&before, true), (&meanwhile, true), (&up.api_key(), false)] {
        let files = stdout_of(up.client(key, &["files", "list"]));
        assert_eq!(files.contains(uploaded.trim()), sees, "{files}");
    }
    let lines = error_lines(&up.client("sk-wrong", &["files", "list"]));
    assert_eq!(lines.len(), 1, "{lines:?}");
    let lines = error_lines(&up.client(&before, &["jobs", "get", "ftjob-none"]));
    assert_eq!(lines, ["error: Could not find fine tune: ftjob-none"]);
}

#[test]
fn a_second_up_on_the_same_directory_is_refused_in_one_line_and_the_first_goes_on() {
    let dir = tempfile::tempdir().expect("temp dir");
    let up = Up::start(dir.path());
    let data_dir = dir.path().to_str().expect("text");
    let second = run(&["up", "--listen", "127.0.0.1:0", "--data-dir", data_dir]);
    let lines = error_lines(&second);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains(data_dir), "{lines:?}");
    stdout_of(up.client(&up.api_key(), &["files", "list"]));
}

#[test]
fn a_port_in_use_is_one_line_that_names_it() {
    let dir = tempfile::tempdir().expect("temp dir");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = taken.local_addr().expect("address").to_string();
    let data_dir = dir.path().to_str().expect("text");
    let lines = error_lines(&run(&["up", "--listen", &address, "--data-dir", data_dir]));
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains(&address) && lines[0].contains("--listen"), "{lines:?}");
}

#[test]
fn a_gpu_that_is_not_there_is_one_line_before_anything_starts() {
    let dir = tempfile::tempdir().expect("temp dir");
    let data_dir = dir.path().join("data");
    let lines = error_lines(&run(&[
        "up",
        "--device",
        "cuda:63",
        "--listen",
        "127.0.0.1:0",
        "--data-dir",
        data_dir.to_str().expect("text"),
    ]));
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("cuda:63"), "{lines:?}");
    assert!(!data_dir.exists());
}

#[test]
fn missing_postgresql_programs_are_one_line_that_says_what_to_install() {
    let dir = tempfile::tempdir().expect("temp dir");
    let output = tunesmith()
        .args(["up", "--listen", "127.0.0.1:0", "--data-dir"])
        .arg(dir.path().join("data"))
        .env("TUNESMITH_PG_BIN", dir.path())
        .output()
        .expect("the program runs");
    let lines = error_lines(&output);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("TUNESMITH_PG_BIN"), "{lines:?}");
}

#[test]
fn a_device_that_is_not_there_is_one_line_and_nothing_is_started() {
    let dir = tempfile::tempdir().expect("temp dir");
    let data_dir = dir.path().join("data");
    let data_dir_arg = data_dir.to_str().expect("text");
    let database = ["--database-url", "postgres://127.0.0.1:1/none"];
    let worker = [&["worker", "--object-store-url", "memory:///"], &database[..]].concat();
    // No machine has 64 GPUs, and without CUDA in the build every GPU is missing.
    for (device, word) in
        [("cuda:63", "cuda:63"), ("cpu,cuda:63", "cuda:63"), ("tpu", "auto, cpu, cuda or cuda:N")]
    {
        for command in [&["up", "--data-dir", data_dir_arg], &worker[..]] {
            let lines = error_lines(&run(&[command, &["--device", device]].concat()));
            let [line] = &lines[..] else { panic!("{command:?}: {lines:?}") };
            assert!(line.starts_with("error: device ") && line.contains(word), "{line}");
        }
    }
    assert!(!data_dir.exists());
}
