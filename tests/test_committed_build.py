"""What is built and committed is built from the sources beside it."""

import subprocess

from harness import ROOT


def test_the_committed_dashboard_is_built_from_its_sources():
    digest = subprocess.run([ROOT / "scripts/dashboard-digest.sh"], check=True, capture_output=True, text=True)
    built = (ROOT / "dashboard/dist/sources.sha256").read_text()
    assert built == digest.stdout, "run `make dashboard` and commit dashboard/dist"
