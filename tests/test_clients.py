"""Other clients drive a whole job: OpenAI's SDK for Node, and the last Python package with the old
command line."""

import csv
import json
import os
import subprocess

import pytest
from conftest import TINY
from harness import PATIENCE_SECONDS, ROOT
from rows import sums


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sums(10)))
    return path


def run(service, *command, **environment):
    """Runs a client to its end; gives what it printed."""
    where = {"OPENAI_BASE_URL": service.base_url, "OPENAI_API_KEY": service.key}
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env=os.environ | where | environment,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_sdk_for_node_drives_a_whole_job(service, clients, rows):
    printed = run(
        service, "node", ROOT / "tests/clients/job.cjs", TINY, rows, NODE_PATH=str(clients / "node_modules")
    )
    seen = json.loads(printed)
    job = seen["job"]
    assert job["status"] == "succeeded", job["error"]
    assert job["fine_tuned_model"].split(":")[3] == "node"
    assert seen["file"]["bytes"] == rows.stat().st_size
    # Every page of the events, the last event first.
    assert [event["message"] for event in seen["events"]] == service.messages(job["id"])[::-1]
    assert len(seen["events"]) > 2
    assert [checkpoint["step_number"] for checkpoint in seen["checkpoints"]] == [2, 1]
    assert [row["step"] for row in csv.DictReader(seen["result"].splitlines())] == ["1", "2"]
    assert seen["answer"]["end"] in ("stop", "length") and seen["answer"]["tokens"] <= 8
    assert seen["tuned"]["id"] == job["fine_tuned_model"] and seen["deleted"]["deleted"] is True


def test_the_old_command_line_drives_a_whole_job(service, clients, rows):
    def openai(command, *arguments):
        return json.loads(run(service, clients / "python/bin/openai", "api", command, *arguments))

    file = openai("files.create", "-f", rows, "-p", "fine-tune")
    assert file["bytes"] == rows.stat().st_size
    hyperparameters = json.dumps({"n_epochs": 2, "batch_size": 10})
    made = openai("fine_tuning.jobs.create", "-m", TINY, "-F", file["id"], "-s", "old", "-H", hyperparameters)
    assert made["hyperparameters"] == {"n_epochs": 2, "batch_size": 10, "learning_rate_multiplier": "auto"}
    service.finish(made["id"])
    (job,) = [job for job in openai("fine_tuning.jobs.list")["data"] if job["id"] == made["id"]]
    assert job["status"] == "succeeded" and job["fine_tuned_model"].split(":")[3] == "old"
    events = openai("fine_tuning.jobs.list_events", "-i", made["id"])["data"]
    assert [event["message"] for event in events] == service.messages(made["id"])[::-1]
    assert openai("models.delete", "-i", job["fine_tuned_model"])["deleted"] is True
