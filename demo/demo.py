#!/usr/bin/env python3
"""The whole service in one go: a real model learns real data on this machine's CPU.

Run it with `make demo`, which first installs what is missing. KEEP=1 leaves the server running.
Ends with exit code 0 only if the loss on rows that were never trained on fell by at least 20 %.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "target/demo"
# Where cargo builds, which the environment may say.
TUNESMITH = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve() / "release/tunesmith"
MODEL = "SmolLM2-135M-Instruct"
TRAINING, VALIDATION = ROOT / "demo/support.jsonl", ROOT / "demo/support-validation.jsonl"
HYPERPARAMETERS = {
    "n_epochs": 12,
    "batch_size": 4,
    "learning_rate": 4e-4,
    "lr_scheduler": "cosine",
    "eval_steps": 6,
    "adapter": {"type": "lora", "r": 16},
}
REQUIRED_FALL = 0.20
STAGES = 6


class DemoError(Exception):
    """Ends the demo with a message for a person."""


def stage(number, text):
    line = f"[{number}/{STAGES}] {text}"
    print(f"\n\033[1m{line}\033[0m" if sys.stdout.isatty() else f"\n{line}", flush=True)


def build():
    stage(1, "Building tunesmith in release: about twelve minutes the first time, then seconds.")
    subprocess.run(["cargo", "build", "--release", "-p", "tunesmith"], cwd=ROOT, check=True)


def fetch_model():
    stage(2, f"Fetching {MODEL}: 93 MB the first time, then it is in the cache.")
    done = subprocess.run([ROOT / "scripts/fetch-smollm2.sh"], check=True, stdout=subprocess.PIPE, text=True)
    print(done.stdout.strip())
    return done.stdout.strip()


class Server:
    """`tunesmith up` on a free port, in a fresh directory."""

    def __init__(self):
        stage(3, "Starting the service on a free port: PostgreSQL, object store, API and a worker, a few seconds.")
        self.directory = Path(tempfile.mkdtemp(prefix="run-", dir=DEMO))
        self.data_dir = self.directory / "data"
        self.log = self.directory / "up.log"
        with self.log.open("wb") as log:
            # In a session of its own: with KEEP=1 it outlives this script and its terminal.
            self.process = subprocess.Popen(
                [TUNESMITH, "up", "--listen", "127.0.0.1:0", "--data-dir", self.data_dir],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self.base_url = self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        self.key = (self.data_dir / "api-key").read_text().strip()

    def wait_until_ready(self):
        marker = "tunesmith is ready at "
        while True:
            ended = self.process.poll() is not None
            text = self.log.read_text(errors="replace")
            for line in text.splitlines():
                if line.startswith(marker):
                    print(line)
                    return line.removeprefix(marker)
            if ended:
                raise DemoError(f"the service did not start:\n{text[-2000:]}")
            time.sleep(0.05)

    def run(self, *arguments, **options):
        """Runs a tunesmith command against this server."""
        environment = os.environ | {"TUNESMITH_BASE_URL": self.base_url, "TUNESMITH_API_KEY": self.key}
        return subprocess.run([TUNESMITH, *map(str, arguments)], env=environment, **options)

    def read(self, *arguments):
        """The command's standard output."""
        return self.run(*arguments, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    def call(self, path, body=None):
        """One REST call."""
        request = urllib.request.Request(
            self.base_url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait()
        # Where PostgreSQL's user cannot reach this directory, the cluster lies elsewhere.
        note = self.data_dir / "postgres.json"
        cluster = json.loads(note.read_text())["cluster"] if note.exists() else None
        if cluster:
            shutil.rmtree(cluster, ignore_errors=True)
        shutil.rmtree(self.directory, ignore_errors=True)


def train(server, gguf):
    stage(4, f"Importing the model and uploading {TRAINING.name} and {VALIDATION.name}: seconds.")
    server.run("models", "import", gguf, "--name", MODEL, "--data-dir", server.data_dir, check=True)
    training = server.read("files", "upload", TRAINING)
    validation = server.read("files", "upload", VALIDATION)

    stage(5, "Training a LoRA adapter on 48 support answers: about four minutes on 2 cores.")
    job = server.call(
        "/fine_tuning/jobs",
        {
            "model": MODEL,
            "training_file": training,
            "validation_file": validation,
            "suffix": "fernhill",
            "seed": 1,
            "method": {"type": "supervised", "supervised": {"hyperparameters": HYPERPARAMETERS}},
        },
    )
    print(f"The live page: {page_url(server, job['id'])}", flush=True)
    if server.run("jobs", "follow", job["id"]).returncode != 0:
        raise DemoError(f"the job did not succeed; the service said last:\n{server.log.read_text()[-2000:]}")
    return server.call(f"/fine_tuning/jobs/{job['id']}")


def page_url(server, job_id):
    return f"{server.base_url.removesuffix('/v1')}/jobs/{job_id}#key={server.key}"


def sparkline(values, width=64):
    """The values in one line of bars, averaged where there are more than fit."""
    bars = "▁▂▃▄▅▆▇█"
    size = max(1, -(-len(values) // width))
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    low, high = min(means), max(means)
    return "".join(bars[round((v - low) / ((high - low) or 1) * (len(bars) - 1))] for v in means)


def side_by_side(left, right, width=46):
    """Two texts in two columns, each a (title, text)."""
    columns = [[title, "─" * width, *textwrap.wrap(text, width)] for title, text in (left, right)]
    height = max(map(len, columns))
    for column in columns:
        column += [""] * (height - len(column))
    return "\n".join(f"  {a:<{width}}  {b}".rstrip() for a, b in zip(*columns))


def keep(source, target):
    """Hard links of a directory's files outside of the server's, which goes at the end."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=os.link)


def report(server, job):
    """Prints what was learned; gives whether it is enough."""
    stage(6, "What it learned: downloading the adapter and asking both models, a few seconds.")
    curve = server.call(f"/fine_tuning/jobs/{job['id']}/metrics")
    metrics, before = curve["data"], curve["initial_valid_loss"]
    after = metrics[-1]["valid_loss"]
    fall = 1 - after / before
    base, adapter = DEMO / MODEL, DEMO / "adapter"
    (config,) = (server.data_dir / "cache/models").glob("*/config.json")
    keep(config.parent, base)
    shutil.rmtree(adapter, ignore_errors=True)
    server.read("models", "weights", job["fine_tuned_model"], "--output", adapter)

    system, question, _ = (m["content"] for m in json.loads(VALIDATION.open().readline())["messages"])
    ask = ["generate", "--model", base, "--system", system, "--prompt", question, "--max-new-tokens", 96]
    answers = [server.read(*ask), server.read(*ask, "--adapter", adapter)]

    print(f"""
Question that was not trained on: {question}

{side_by_side((MODEL, answers[0]), ("The same, tuned", answers[1]))}

Training loss, step 1 to {len(metrics)}: {sparkline([row["train_loss"] for row in metrics])}
Held-out loss, 10 questions: {before:.3f} → {after:.3f} ({fall:.0%} lower)

The adapter lies in {adapter.relative_to(ROOT)}, the base model beside it. In Hugging Face PEFT:

  from transformers import AutoModelForCausalLM; from peft import PeftModel
  base = AutoModelForCausalLM.from_pretrained("{base.relative_to(ROOT)}")
  model = PeftModel.from_pretrained(base, "{adapter.relative_to(ROOT)}")
""")
    return fall >= REQUIRED_FALL


def main():
    keep_running = os.environ.get("KEEP", "") not in ("", "0")
    DEMO.mkdir(parents=True, exist_ok=True)
    build()
    gguf = fetch_model()
    server = Server()
    try:
        job = train(server, gguf)
        learned = report(server, job)
    except BaseException:
        server.stop()
        raise
    if keep_running:
        print(f"The server goes on: {page_url(server, job['id'])}")
        print(f"  stop it:  kill {server.process.pid}        its data: {server.directory.relative_to(ROOT)}")
    else:
        server.stop()
    if not learned:
        raise DemoError(f"the held-out loss did not fall by {REQUIRED_FALL:.0%}")


if __name__ == "__main__":
    try:
        main()
    except DemoError as error:
        sys.exit(f"demo: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"demo: {' '.join(map(str, error.cmd))} failed with exit code {error.returncode}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted")
