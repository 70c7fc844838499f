"""A pytest plugin for the official SDK's own tests: they run unchanged against a tunesmith with the
objects that they ask for (`api/examples/fixture_mode.rs`), put back as they were before each test.

What cannot pass is listed in docs/compatibility.md, and must fail: a test that begins to pass is to
be taken from the list.
"""

import collections
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve() / "debug"
COMPATIBILITY = ROOT / "docs/compatibility.md"
# A row of the list: | `file` | `test` | why |
ROW = re.compile(r"^\| `(?P<file>[\w/]+\.py)` \| `(?P<test>\w+)` \| (?P<why>.+) \|$")


class Server:
    def __init__(self):
        self.process = subprocess.Popen(
            [TARGET / "examples/fixture_mode"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url = self.process.stdout.readline().strip()
        assert self.url, "the server did not start"

    def reset(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "ready\n", "the server is gone"

    def stop(self):
        self.process.stdin.close()
        assert self.process.wait(30) == 0


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
    reasons = {(row["file"], row["test"]): row["why"] for row in rows if row}
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
