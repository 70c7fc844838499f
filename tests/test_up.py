"""`tunesmith up`: one command, nothing else needed, and everything is there again after a stop."""

import os
import signal
import stat
import subprocess
from pathlib import Path

import pytest
from conftest import TINY
from harness import TUNESMITH, Up, clean_environment, run_cli
from rows import sums


def children_of(pid):
    return {int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()}


def test_a_second_start_finds_everything_as_it_was(tmp_path, tiny_dir):
    with Up(tmp_path / "up") as server:
        key_file = server.data_dir / "api-key"
        assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
        server.import_model(tiny_dir, TINY)
        job = server.service.finish(server.service.create_job(sums(10), TINY, n_epochs=1, batch_size=5).id)
        curve, key = server.service.curve(job.id), server.service.key
        assert server.process.stop() == 0

        server.start()
        assert server.service.key == key
        assert server.service.job(job.id) == job
        assert server.service.curve(job.id) == curve
        assert TINY in run_cli("models", "list", "--data-dir", server.data_dir).stdout
        server.process.child.send_signal(signal.SIGINT)
        assert server.process.child.wait(timeout=60) == 0


def test_a_killed_up_takes_its_postgres_along_and_starts_again(tmp_path):
    with Up(tmp_path / "up") as server:
        file = server.service.upload(b"kept", name="kept.txt", purpose="user_data")
        children = children_of(server.process.pid)
        assert children, "PostgreSQL runs as a child"
        server.process.kill()
        server.start()
        assert server.service.sdk.files.content(file).read() == b"kept"
        assert not any(os.path.exists(f"/proc/{child}/exe") and "postgres" in os.readlink(f"/proc/{child}/exe") for child in children)
        assert server.process.stop() == 0


def test_a_long_path_that_postgres_cannot_enter_works_all_the_same(tmp_path):
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    with Up(private / ("long" * 30)) as server:
        assert list(server.service.sdk.files.list()) == []
        assert server.process.stop() == 0


def test_missing_postgres_is_one_line_that_says_what_to_install(tmp_path):
    environment = clean_environment(TUNESMITH_PG_BIN=str(tmp_path / "nowhere"))
    done = subprocess.run(
        [TUNESMITH, "up", "--listen", "127.0.0.1:0", "--data-dir", tmp_path / "data"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "postgresql" in errors[0].lower(), done.stderr


def test_the_commands_drive_a_job_over_rest(up, service, tmp_path):
    training = tmp_path / "rows.jsonl"
    training.write_bytes(service.sdk.files.content(service.upload(sums(10))).read())
    file = service.cli("files", "upload", training).stdout.strip()
    assert file in service.cli("files", "list").stdout
    job = service.create_job(file, TINY, n_epochs=2, batch_size=5)
    followed = service.cli("jobs", "follow", job.id).stdout
    assert "succeeded" in followed
    assert job.id in service.cli("jobs", "list").stdout
    assert job.id in service.cli("jobs", "get", job.id).stdout
    model = service.job(job.id).fine_tuned_model
    service.cli("models", "weights", model, "--output", tmp_path / "adapter")
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()
    refused = service.cli("jobs", "cancel", job.id, check=False)
    assert refused.returncode != 0 and refused.stderr.startswith("error:")


def test_follow_of_a_failed_job_shows_the_reason_and_fails(service):
    job = service.create_job(sums(9), TINY)
    followed = service.cli("jobs", "follow", job.id, check=False)
    assert followed.returncode != 0
    assert "must have at least 10 examples" in followed.stderr


@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_device_that_is_not_there_is_a_clear_line(device, tmp_path, tiny_dir):
    done = run_cli(
        "generate", "--model", tiny_dir, "--prompt", "Hello", "--device", device, check=False
    )
    assert done.returncode != 0
    assert done.stderr.startswith("error:") and "cuda" in done.stderr.lower()
    assert "panicked" not in done.stderr
