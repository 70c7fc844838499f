//! The test program run again, with an environment of its own.

use std::process::Command;

/// Runs the named tests of this very program, ignored ones too, with `environment`; returns what
/// they printed.
///
/// # Panics
/// When one of them fails, or when there is none of that name.
pub(crate) fn rerun(tests: &[&str], environment: &[(&str, &str)]) -> String {
    let program = std::env::current_exe().unwrap();
    let output = Command::new(program)
        .args(["--exact", "--include-ignored", "--nocapture"])
        .args(tests)
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{environment:?}:\n{stdout}\n{stderr}");
    let passed = format!("{} passed", tests.len());
    assert!(stdout.contains(&passed), "not all of {tests:?} ran:\n{stdout}");
    stdout
}
