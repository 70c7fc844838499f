"""Starts and stops the real program, and speaks to it where the OpenAI SDK has no words for it."""

import http.server
import json
import os
import pwd
import shutil
import signal
import subprocess
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai

ROOT = Path(__file__).resolve().parent.parent
# Where cargo builds, which the environment may say.
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve()
TUNESMITH = Path(os.environ.get("TUNESMITH_BIN", TARGET / "debug/tunesmith"))
SMOLLM2_DIR = ROOT / "target/test-models/SmolLM2-135M-Instruct"

# Generous, since the machine may be busy: no test depends on how long anything takes.
PATIENCE_SECONDS = 240
TERMINAL = {"succeeded", "failed", "cancelled"}
# Columns of the metrics that tell of time and not of numbers.
CLOCK_COLUMNS = {"tokens_per_second", "elapsed_seconds"}


def wait_for(what, condition, patience=PATIENCE_SECONDS):
    """The first truthy value of `condition()`; fails, naming `what`, when there is none in time."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited {patience} s in vain for {what}")


def clean_environment(**extra):
    """The environment without settings of the person who runs the tests."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TUNESMITH_", "DATABASE_URL", "OBJECT_STORE"))}
    if "TUNESMITH_PG_BIN" in os.environ:
        kept["TUNESMITH_PG_BIN"] = os.environ["TUNESMITH_PG_BIN"]
    return kept | extra


def valid(thing):
    """`thing` itself, once it has passed its SDK type's own validation, which the SDK leaves out."""
    type(thing).model_validate(thing.to_dict())
    return thing


class Process:
    """One running `tunesmith` with its output in a file."""

    def __init__(self, log, *arguments, **environment):
        self.log = Path(log)
        self.arguments = [str(argument) for argument in arguments]
        with self.log.open("ab") as output:
            self.child = subprocess.Popen(
                [TUNESMITH, *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=clean_environment(**environment),
            )

    @property
    def pid(self):
        return self.child.pid

    def output(self):
        return self.log.read_text(errors="replace")

    def wait_for_line(self, marker):
        """The first output line that holds `marker`."""

        def find():
            for line in self.output().splitlines():
                if marker in line:
                    return line
            assert self.child.poll() is None, f"{self.arguments} ended:\n{self.output()[-4000:]}"
            return None

        return wait_for(f"{marker!r} from tunesmith {self.arguments}", find)

    def stop(self):
        """SIGTERM; gives the exit code."""
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
        return self.child.wait(timeout=PATIENCE_SECONDS)

    def kill(self):
        self.child.kill()
        self.child.wait(timeout=PATIENCE_SECONDS)


def trainers_of(pid):
    """Process ids of the `tunesmith train` children of `pid`."""
    children = Path(f"/proc/{pid}/task")
    ids = [int(c) for task in children.iterdir() for c in (task / "children").read_text().split()]
    return [i for i in ids if b"train" in Path(f"/proc/{i}/cmdline").read_bytes().split(b"\0")]


def run_cli(*arguments, check=True, **environment):
    """Runs one command to its end; gives the completed process with its text."""
    done = subprocess.run(
        [TUNESMITH, *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=clean_environment(**environment),
        timeout=PATIENCE_SECONDS,
    )
    if check:
        assert done.returncode == 0, f"tunesmith {arguments}: {done.stdout}\n{done.stderr}"
    return done


class Service:
    """A server's address and a key for it."""

    def __init__(self, base_url, key):
        self.base_url = base_url
        self.key = key
        self.sdk = openai.OpenAI(base_url=base_url, api_key=key)

    def with_key(self, key):
        return Service(self.base_url, key)

    def cli(self, *arguments, check=True):
        return run_cli(
            *arguments, check=check, TUNESMITH_BASE_URL=self.base_url, TUNESMITH_API_KEY=self.key
        )

    def request(self, method, path, body=None, headers=None):
        """A raw request, with a body of bytes or of JSON: (status, headers, body in bytes)."""
        request = urllib.request.Request(self.base_url + path, method=method)
        request.add_header("Authorization", f"Bearer {self.key}")
        if body is not None:
            request.add_header("Content-Type", "application/json")
            request.data = body if isinstance(body, bytes) else json.dumps(body).encode()
        for name, value in (headers or {}).items():
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as reply:
                return reply.status, reply.headers, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def get(self, path):
        status, _, body = self.request("GET", path)
        assert status == 200, (status, body)
        return json.loads(body)

    def upload(self, content, name="rows.jsonl", purpose="fine-tune"):
        """Uploads rows, text or bytes; gives the file's id."""
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        if isinstance(content, str):
            content = content.encode()
        return self.sdk.files.create(file=(name, content), purpose=purpose).id

    def create_job(self, training, model, validation=None, seed=7, **hyperparameters):
        """Creates a job on rows or on an uploaded file."""
        if not (isinstance(training, str) and training.startswith("file-")):
            training = self.upload(training)
        if validation is not None and not isinstance(validation, str):
            validation = self.upload(validation)
        return self.sdk.fine_tuning.jobs.create(
            model=model,
            training_file=training,
            seed=seed,
            method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
            **({} if validation is None else {"validation_file": validation}),
        )

    def job(self, job_id):
        return self.sdk.fine_tuning.jobs.retrieve(job_id)

    def wait_for_status(self, job_id, *statuses):
        """Waits until the job has one of the statuses; a terminal one among others fails."""

        def reached():
            job = self.job(job_id)
            if job.status in statuses:
                return job
            assert job.status not in TERMINAL, f"{job.status}: {job.error}"
            return None

        return wait_for(f"job {job_id} to be {statuses}", reached)

    def finish(self, job_id):
        """Waits for success."""
        return self.wait_for_status(job_id, "succeeded")

    def fail(self, job_id):
        """Waits for failure; gives the job's error."""
        return self.wait_for_status(job_id, "failed").error

    def metrics(self, job_id):
        """The whole curve."""
        rows = []
        while True:
            after = rows[-1]["step"] if rows else 0
            page = self.get(f"/fine_tuning/jobs/{job_id}/metrics?after={after}")
            rows += page["data"]
            if not page["has_more"]:
                return rows

    def curve(self, job_id):
        """The curve without the columns that tell of time."""
        return [
            {name: value for name, value in row.items() if name not in CLOCK_COLUMNS}
            for row in self.metrics(job_id)
        ]

    def wait_for_step(self, job_id, step):
        """Waits until the job has reported `step`, and must not have ended by then."""

        def reached():
            assert self.job(job_id).status not in TERMINAL, "the job ended too soon for this test"
            return any(row["step"] >= step for row in self.get(f"/fine_tuning/jobs/{job_id}/metrics?after={step - 1}")["data"])

        wait_for(f"step {step} of job {job_id}", reached)

    def events(self, job_id):
        """All events, oldest first."""
        return list(self.sdk.fine_tuning.jobs.list_events(job_id, limit=100))[::-1]

    def messages(self, job_id):
        return [event.message for event in self.events(job_id)]

    def weights(self, model, directory, weights_format="adapter", storage=None, check=None, dtype=None, max_shard_size=None):
        """Downloads and unpacks a model's weights; gives the directory."""
        path = f"/models/{urllib.request.quote(model, safe='')}/weights?format={weights_format}"
        path += f"&type={storage}" if storage else ""
        path += f"&check={check}" if check else ""
        path += f"&dtype={dtype}" if dtype else ""
        path += f"&max_shard_size={max_shard_size}" if max_shard_size else ""

        def reply():
            status, _, body = self.request("GET", path)
            # It goes on whether or not anybody waits for it.
            return None if status == 503 and b"export_being_checked" in body else (status, body)

        status, body = wait_for(f"the weights of {model}", reply)
        assert status == 200, (status, body[:500])
        directory.mkdir(parents=True)
        archive = directory / "weights.tar"
        archive.write_bytes(body)
        with tarfile.open(archive) as tar:
            tar.extractall(directory, filter="data")
        archive.unlink()
        return directory


class Up:
    """`tunesmith up` on a free port, in a directory of its own."""

    def __init__(self, directory, *arguments):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.arguments = arguments
        self.data_dir = self.directory / "data"
        self.start()

    def start(self):
        log = self.directory / f"up-{len(list(self.directory.glob('up-*.log')))}.log"
        self.process = Process(log, "up", "--listen", "127.0.0.1:0", "--data-dir", self.data_dir, *self.arguments)
        try:
            line = self.process.wait_for_line("tunesmith is ready at ")
        except AssertionError:
            self.process.kill()
            raise
        self.service = Service(line.rsplit(" ", 1)[1], (self.data_dir / "api-key").read_text().strip())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stop()
        # Where PostgreSQL's user cannot reach the data directory, the cluster lies elsewhere.
        note = json.loads((self.data_dir / "postgres.json").read_text())
        if note["cluster"]:
            shutil.rmtree(note["cluster"])

    def import_model(self, source, name):
        return run_cli("models", "import", source, "--name", name, "--data-dir", self.data_dir)


def postgres_bin():
    """Where initdb lies: as tunesmith itself looks for it."""
    named = os.environ.get("TUNESMITH_PG_BIN")
    on_path = shutil.which("initdb")
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name))
    return Path(named or (on_path and Path(on_path).parent) or debian[-1])


class PostgreSQL:
    """A private cluster on a unix socket, for the parts run apart."""

    def __init__(self):
        self.directory = Path(tempfile.mkdtemp(prefix="tunesmith-pg-", dir="/tmp"))
        self.user = []
        if os.geteuid() == 0:
            owner = pwd.getpwnam("postgres")
            os.chown(self.directory, owner.pw_uid, owner.pw_gid)
            self.user = ["runuser", "-u", "postgres", "--"]
        data = self.directory / "data"
        self.run("initdb", "-D", data, "-U", "postgres", "-A", "trust", "-N", "-E", "UTF8", "--no-instructions")
        options = f"-c listen_addresses='' -c unix_socket_directories={self.directory} -c fsync=off"
        self.run("pg_ctl", "-D", data, "-w", "-l", self.directory / "log", "-o", options, "start")
        self.url = f"postgres://postgres@localhost/postgres?host={self.directory}"

    def run(self, program, *arguments):
        subprocess.run(
            [*self.user, postgres_bin() / program, *arguments],
            check=True,
            cwd="/",
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )

    def stop(self):
        self.run("pg_ctl", "-D", self.directory / "data", "-m", "immediate", "-w", "stop")
        shutil.rmtree(self.directory)


class Parts:
    """Migrated database, `tunesmith api`, and any number of `tunesmith worker`."""

    def __init__(self, directory, **environment):
        self.directory = Path(directory)
        self.database = PostgreSQL()
        self.environment = {
            "DATABASE_URL": self.database.url,
            "OBJECT_STORE_URL": f"file://{self.directory / 'objects'}",
            **environment,
        }
        (self.directory / "objects").mkdir()
        self.workers = []
        self.api = None

    def __enter__(self):
        self.run("migrate")
        key = self.run("keys", "create", "--project", "first").stdout.split()[-1]
        self.api = Process(
            self.directory / "api.log", "api", "--listen", "127.0.0.1:0", **self.environment
        )
        line = self.api.wait_for_line("tunesmith is ready at ")
        self.service = Service(line.rsplit(" ", 1)[1], key)
        return self

    def __exit__(self, *_):
        self.stop_workers()
        if self.api is not None:
            self.api.stop()
        self.database.stop()

    def run(self, *arguments):
        return run_cli(*arguments, **self.environment)

    def start_worker(self):
        name = f"worker-{len(self.workers)}"
        worker = Process(
            self.directory / f"{name}.log",
            "worker",
            "--cache-dir",
            self.directory / "cache",
            "--work-dir",
            self.directory / name,
            **self.environment,
        )
        self.workers.append(worker)
        return worker

    def worker_of_running_job(self):
        """The worker that has a trainer, and that trainer's process id."""

        def find():
            for worker in self.workers:
                if worker.child.poll() is None:
                    for trainer in trainers_of(worker.pid):
                        return worker, trainer
            return None

        return wait_for("a worker with a trainer", find)

    def stop_workers(self):
        for worker in self.workers:
            worker.stop()
        self.workers.clear()


class Receiver:
    """A server on this machine that keeps what it is sent and answers with `statuses`, then 200."""

    def __init__(self, port=0, statuses=()):
        received, answers = [], list(statuses)
        self.received = received

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.append((body, dict(self.headers)))
                self.send_response(answers.pop(0) if answers else 200)
                self.send_header("Content-Length", "0")
                self.end_headers()

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def wait_for(self, count):
        wait_for(f"{count} deliveries", lambda: len(self.received) >= count)
        return self.received
