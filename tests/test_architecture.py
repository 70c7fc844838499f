"""Dependencies run one way, and what is built is committed as built."""

import subprocess

import pytest
from harness import ROOT


def crates_below(package):
    tree = subprocess.run(
        ["cargo", "tree", "--offline", "--package", package, "--edges", "normal", "--prefix", "none", "--format", "{p}"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return {line.split()[0] for line in tree.splitlines() if line}


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("tunesmith-core", {"burn", "sqlx", "object_store", "tokio", "actix-web", "reqwest", "tunesmith-store"}),
        ("tunesmith-store", {"burn", "actix-web", "tunesmith-engine"}),
        ("tunesmith-api", {"burn", "tunesmith-engine", "tunesmith-worker"}),
        ("tunesmith-worker", {"burn", "tunesmith-engine", "tunesmith-api", "actix-web"}),
        ("tunesmith-engine", {"sqlx", "object_store", "actix-web", "reqwest", "tunesmith-store"}),
    ],
)
def test_dependencies_run_one_way(package, forbidden):
    assert crates_below(package) & forbidden == set()


def test_the_committed_dashboard_is_built_from_its_sources():
    digest = subprocess.run([ROOT / "scripts/dashboard-digest.sh"], check=True, capture_output=True, text=True)
    built = (ROOT / "dashboard/dist/sources.sha256").read_text()
    assert built == digest.stdout, "run `make dashboard` and commit dashboard/dist"
