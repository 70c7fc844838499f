//! A running `tunesmith up`, and what the operating system knows of it.

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Longer than anything here takes on a busy machine; reached only when a test fails.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

/// The program, without the environment's own settings.
pub(crate) fn tunesmith() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith"));
    for name in ["DATABASE_URL", "OBJECT_STORE_URL", "RUST_LOG"] {
        command.env_remove(name);
    }
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TUNESMITH_")) {
        // Where PostgreSQL lies is the machine's business, not the test's.
        if name != "TUNESMITH_PG_BIN" {
            command.env_remove(name);
        }
    }
    command
}

/// Runs the program to its end.
pub(crate) fn run(args: &[&str]) -> Output {
    tunesmith().args(args).output().expect("the program runs")
}

/// What a successful run printed.
pub(crate) fn stdout_of(output: Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {stderr}", output.status);
    String::from_utf8(output.stdout).expect("text")
}

/// The lines that a failed run wrote to standard error.
pub(crate) fn error_lines(output: &Output) -> Vec<String> {
    assert!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8_lossy(&output.stderr).lines().map(str::to_owned).collect()
}

/// A `tunesmith up` in a process group of its own, as a shell starts it.
pub(crate) struct Up {
    child: Child,
    lines: Receiver<String>,
    data_dir: PathBuf,
    /// `http://127.0.0.1:PORT/v1`.
    pub(crate) base_url: String,
}

impl Up {
    /// Starts it on a free port and waits until it is ready.
    pub(crate) fn start(data_dir: &Path) -> Self {
        let mut child = tunesmith()
            .args(["up", "--listen", "127.0.0.1:0", "--device", "cpu", "--data-dir"])
            .arg(data_dir)
            .process_group(0)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let stdout = child.stdout.take().expect("a pipe");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // Nobody listens any more when the test is over.
                let _ = sender.send(line);
            }
        });
        let mut up = Self { child, lines, data_dir: data_dir.to_owned(), base_url: String::new() };
        let ready = up.lines.recv_timeout(DEADLINE).expect("a line on standard output");
        let url = ready.strip_prefix("tunesmith is ready at ").unwrap_or_else(|| panic!("{ready}"));
        assert!(url.starts_with("http://127.0.0.1:") && url.ends_with("/v1"), "{url}");
        up.base_url = url.to_owned();
        up
    }

    /// The first key.
    pub(crate) fn api_key(&self) -> String {
        fs::read_to_string(self.data_dir.join("api-key")).expect("api-key")
    }

    /// Runs a command that talks to this server.
    pub(crate) fn client(&self, key: &str, args: &[&str]) -> Output {
        tunesmith()
            .args(args)
            .env("TUNESMITH_BASE_URL", &self.base_url)
            .env("TUNESMITH_API_KEY", key)
            .output()
            .expect("the program runs")
    }

    /// Every process that descends from it, itself left out.
    pub(crate) fn descendants(&self) -> Vec<Process> {
        let all = processes();
        let mut family = vec![self.child.id()];
        let mut found = Vec::new();
        while let Some(parent) = family.pop() {
            for (&pid, process) in all.iter().filter(|(_, process)| process.parent == parent) {
                family.push(pid);
                found.push(process.clone());
            }
        }
        found
    }

    /// Sends `signal` to the process alone.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("it runs");
    }

    /// Sends `signal` to the whole group, as a terminal does for Ctrl-C.
    pub(crate) fn signal_group(&self, signal: Signal) {
        kill_process_group(self.pid(), signal).expect("it runs");
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Waits for its end; gives what it had printed after the first line, too.
    pub(crate) fn wait(mut self) -> (ExitStatus, Vec<String>) {
        let status = self.wait_for_exit();
        (status, self.lines.iter().collect())
    }

    fn wait_for_exit(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("its status") {
                return status;
            }
            assert!(start.elapsed() < DEADLINE, "it does not end");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        // A failed test must not leave a server behind; after `wait` there is none.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process, told from a later one of the same number by its start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    pid: u32,
    parent: u32,
    /// The executable's name.
    pub(crate) name: String,
    started: u64,
}

/// Waits until none of `gone` runs.
pub(crate) fn wait_until_gone(gone: &[Process]) {
    let start = Instant::now();
    loop {
        let all = processes();
        let left: Vec<_> = gone
            .iter()
            .filter(|process| {
                all.get(&process.pid).is_some_and(|now| now.started == process.started)
            })
            .collect();
        if left.is_empty() {
            return;
        }
        assert!(start.elapsed() < DEADLINE, "still there: {left:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// All processes but zombies, by number.
fn processes() -> BTreeMap<u32, Process> {
    fs::read_dir("/proc")
        .expect("/proc")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid: u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // `pid (name) state ppid …`; the name may hold anything, parentheses too.
            let (head, tail) = stat.rsplit_once(") ")?;
            let name = head.split_once('(')?.1.to_owned();
            let fields: Vec<&str> = tail.split(' ').collect();
            let process = Process {
                pid,
                parent: fields[1].parse().ok()?,
                name,
                started: fields[19].parse().ok()?,
            };
            (fields[0] != "Z").then_some((pid, process))
        })
        .collect()
}
