"""A pytest plugin for the official SDK's own tests: they run unchanged against a tunesmith with the
objects that they ask for (`api/examples/fixture_mode.rs`), put back as they were before each test,
and a sampler that answers with a real model.

What cannot pass is listed in docs/compatibility.md, and must fail: a test that begins to pass is to
be taken from the list.
"""

import collections
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve() / "debug"
MODEL = TARGET.parent / "test-models/SmolLM2-135M-Instruct"
COMPATIBILITY = ROOT / "docs/compatibility.md"
# A row of the list: | `file` | `test`, `test` … | why |
ROW = re.compile(r"^\| `(?P<file>[\w/]+\.py)` \| (?P<tests>`[^|]+`) \| (?P<why>.+) \|$")


class Server:
    def __init__(self):
        self.directory = Path(tempfile.mkdtemp(prefix="tunesmith-sdk-"))
        objects = self.directory / "objects"
        objects.mkdir()
        self.process = subprocess.Popen(
            [TARGET / "examples/fixture_mode", objects],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url, database = (self.process.stdout.readline().strip() for _ in range(2))
        assert database, "the server did not start"
        self.environment = os.environ | {
            "DATABASE_URL": database,
            "OBJECT_STORE_URL": f"file://{objects}",
        }
        self.import_model()
        self.sampler = self.start(
            "sampler", "--cache-dir", self.directory / "cache", "--work-dir", self.directory / "work"
        )
        self.wait_for_sampler()

    def start(self, *arguments):
        return subprocess.Popen([TARGET / "tunesmith", *arguments], env=self.environment)

    def import_model(self):
        """A model whose context ends soon, since the tests ask for answers of any length."""
        short = self.directory / "short"
        shutil.copytree(MODEL, short, copy_function=os.symlink)
        config = json.loads((MODEL / "config.json").read_text())
        (short / "config.json").unlink()
        (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
        assert self.start("models", "import", short, "--name", "gpt-6-astra").wait() == 0

    def wait_for_sampler(self):
        """Its first answer, for which it loads the model."""
        request = urllib.request.Request(
            f"{self.url}/completions",
            data=json.dumps({"model": "gpt-6-astra", "prompt": "a", "max_tokens": 1}).encode(),
            headers={"Content-Type": "application/json", "Authorization": "Bearer My API Key"},
        )
        while True:
            try:
                return urllib.request.urlopen(request, timeout=60).read()
            except urllib.error.HTTPError as error:
                assert error.code == 503 and self.sampler.poll() is None, error.read()
                time.sleep(0.1)

    def reset(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "ready\n", "the server is gone"

    def stop(self):
        self.sampler.terminate()
        assert self.sampler.wait(60) == 0
        self.process.stdin.close()
        assert self.process.wait(30) == 0
        shutil.rmtree(self.directory)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config):
    early_config.server = Server()
    # Read when the tests' own conftest.py is imported.
    os.environ["TEST_API_BASE_URL"] = early_config.server.url


def pytest_unconfigure(config):
    config.server.stop()


def file_of(nodeid):
    return nodeid.split("::")[0].removeprefix("tests/api_resources/")


def pytest_collection_modifyitems(items):
    rows = [ROW.match(line) for line in COMPATIBILITY.read_text().splitlines()]
    reasons = {
        (row["file"], test): row["why"]
        for row in rows
        if row
        for test in re.findall(r"\w+", row["tests"])
    }
    met = set()
    for item in items:
        key = (file_of(item.nodeid), item.originalname)
        if key in reasons:
            met.add(key)
            item.add_marker(pytest.mark.xfail(reason=reasons[key], strict=True))
    unknown = sorted(reasons.keys() - met)
    assert not unknown, f"docs/compatibility.md lists tests that there are not: {unknown}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    item.config.server.reset()


def pytest_terminal_summary(terminalreporter):
    counts = collections.defaultdict(collections.Counter)
    for outcome in ("passed", "failed", "error", "skipped", "xfailed"):
        for report in terminalreporter.stats.get(outcome, []):
            counts[file_of(report.nodeid)][outcome] += 1
    terminalreporter.section("by file")
    for file, count in sorted(counts.items()):
        failed = count["failed"] + count["error"]
        terminalreporter.write_line(
            f"{file:48} passed {count['passed']:4}  failed {failed:3}"
            f"  skipped {count['skipped']:3}  known {count['xfailed']:3}"
        )
