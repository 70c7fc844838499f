#!/usr/bin/env python3
"""Measures the front-end beside what it stands on, in turns, and prints ratios of medians.

Needs release builds of the examples of the crates api and core: `make bench-api` sees to them. See
bench/README.md for what is compared.

  BENCH_ONLY=get,files   parts to run, of: get streams create files validation
  BENCH_ROUNDS=3         how often each side gets its turn
  BENCH_SECONDS=8        how long a turn of requests lasts
  BENCH_CLIENTS=16       connections at a time, on both sides
  BENCH_MIB=1024         the size of the file that is uploaded
"""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import sides
from sides import MODEL, OUT, ROOT, TARGET, Failed

PARTS = ("get", "streams", "create", "files", "validation")
ROUNDS = int(os.environ.get("BENCH_ROUNDS", 3))
SECONDS = int(os.environ.get("BENCH_SECONDS", 8))
CLIENTS = int(os.environ.get("BENCH_CLIENTS", 16))
MIB = int(os.environ.get("BENCH_MIB", 1024))
# Open streams, and the jobs that they are spread over.
STREAMS, STREAM_JOBS, STREAM_SECONDS = 1000, 100, 10
SCRIPTS = ROOT / "bench/peers"
# Of a model the front-end reads no weights.
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Other programs' share of one core above which a turn was not quiet.
QUIET = 0.1
PATIENCE_SECONDS = 600


class Bench:
    """The server, and what was measured so far."""

    def __init__(self, server, facts, directory):
        self.server, self.directory = server, directory
        self.address, self.bare, self.key = facts["address"], facts["bare"], facts["key"]
        self.database, self.project, self.model = (
            facts["database_url"], facts["project"], facts["model"],
        )
        self.ratios, self.measured, self.noisy = [], {}, 0

    def turn(self, part, side, run):
        """One side's turn; what it measured, with the share of a core that others used."""
        busy, own, began = sides.busy_seconds(), family_seconds(), time.monotonic()
        result = run()
        wall = time.monotonic() - began
        foreign = (sides.busy_seconds() - busy - (family_seconds() - own)) / wall
        result["foreign"] = round(max(foreign, 0.0), 3)
        self.noisy += foreign > QUIET
        self.measured.setdefault(part, {}).setdefault(side, []).append(result)
        print(f"  {part:9}{side:12}{json.dumps(result)}", flush=True)
        return result

    def median(self, part, side, key):
        return statistics.median(result[key] for result in self.measured[part][side])

    def note(self, name, value, sense, mark, **facts):
        """Keeps one of the figures of the summary."""
        self.ratios.append({"name": name, "value": value, "mark": f"{sense}{mark}", **facts})

    def request(self, method, path, body=None, headers=()):
        """A request that is not measured; gives the reply's JSON."""
        request = urllib.request.Request(
            f"http://{self.address}{path}",
            method=method,
            data=body,
            headers={"Authorization": f"Bearer {self.key}", **dict(headers)},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as reply:
            return json.loads(reply.read()), reply.status

    def load(self, command, *args, address=None):
        """Runs the clients; gives their line of JSON."""
        program = TARGET / "examples/bench_load"
        return json.loads(output_of([program, command, address or self.address, self.key, *args]))

    def sql(self, statement):
        return output_of([postgres("psql"), self.database, "-qAt", "-c", statement])

    def pgbench(self, script, **variables):
        """Transactions a second of a script, with as many clients as the API gets."""
        flags = [flag for name, value in variables.items() for flag in ("-D", f"{name}={value}")]
        return self.run_pgbench("-f", script, *flags)

    def run_pgbench(self, *what):
        """Transactions a second of what the flags say."""
        text = output_of(
            [
                postgres("pgbench"), "-n", "-M", "prepared", "-c", CLIENTS, "-j", os.cpu_count(),
                "-T", SECONDS, *what, self.database,
            ]
        )
        if found := re.search(r"number of failed transactions: ([1-9]\d*)", text):
            raise Failed(f"{found[1]} transactions of {what} failed")
        return {"per_second": float(re.search(r"tps = ([\d.]+)", text)[1])}

    def memory(self, field):
        """A line of the server's memory, in MiB."""
        status = Path(f"/proc/{self.server.pid}/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024

    def memory_mark(self):
        """Begins the peak of the server's memory anew; what it has now."""
        Path(f"/proc/{self.server.pid}/clear_refs").write_text("5")
        return self.memory("VmHWM")

    def upload(self, path, purpose):
        return self.load("upload", path, purpose)

    def create_job(self, file, number):
        body = json.dumps(job_body(self.model, file) | {"seed": number}).encode()
        reply, _ = self.request(
            "POST", "/v1/fine_tuning/jobs", body, {"Content-Type": "application/json"}
        )
        return reply["id"]

    def wait_until_queued(self):
        """Until no job waits for its files to be read."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.sql("SELECT count(*) FROM jobs WHERE status = 'validating_files'").strip() != "0":
            if time.monotonic() > deadline:
                raise Failed("the jobs' files are not read")
            time.sleep(0.2)


@contextlib.contextmanager
def running_server():
    """The front-end with everything that it needs, in a directory that goes when it ends."""
    # On the disk that is to be measured, and not in a file system of memory.
    with tempfile.TemporaryDirectory(prefix="api-", dir=OUT) as directory:
        directory = Path(directory)
        directory.chmod(0o755)
        model = directory / "model"
        model.mkdir()
        for name in MODEL_FILES:
            if (MODEL / name).exists():
                shutil.copy(MODEL / name, model)
        with (directory / "server.log").open("w") as log, subprocess.Popen(
            [TARGET / "examples/bench_server", directory, model],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        ) as server:
            try:
                line = server.stdout.readline()
                if not line:
                    server.wait()
                    raise Failed((directory / "server.log").read_text()[-2000:])
                yield Bench(server, json.loads(line), directory)
            finally:
                server.stdin.close()
                server.wait()


def get_part(bench):
    """Looking at a job, the same statement by pgbench, and pgbench's own look-up of four columns."""
    output_of([postgres("pgbench"), "-i", "-q", bench.database])
    file = bench.upload(rows_file(bench.directory / "few.jsonl", 20), "fine-tune")["id"]
    job = bench.create_job(file, 0)
    bench.wait_until_queued()
    script = bench.directory / "get_job.sql"
    script.write_text(job_statement())
    path = f"/v1/fine_tuning/jobs/{job}"
    for _ in range(ROUNDS):
        bench.turn("get", "pgbench", lambda: bench.pgbench(script, id=job, project=bench.project))
        bench.turn("get", "api", lambda: bench.load("requests", CLIENTS, SECONDS, "GET", path))
        bench.turn("get", "pgbench -S", lambda: bench.run_pgbench("-S"))
    note_beside_pgbench(bench, "get", "get-job-vs-pgbench", 0.35)
    note_beside_pgbench(bench, "get", "get-job-vs-pgbench-S", 0.35, "pgbench -S")


def note_beside_pgbench(bench, part, name, mark, peer="pgbench"):
    """How many requests a second stand beside how many transactions of pgbench."""
    ours, theirs = (bench.median(part, side, "per_second") for side in ("api", peer))
    bench.note(
        name, ours / theirs, ">=", mark,
        requests_per_second=round(ours), pgbench_per_second=round(theirs), clients=CLIENTS,
    )


def create_part(bench):
    """Making jobs, and the same rows by pgbench."""
    file = bench.upload(rows_file(bench.directory / "few.jsonl", 20), "fine-tune")["id"]
    body = json.dumps(job_body(bench.model, file) | {"metadata": {"number": "{n}"}})
    caller = dict(
        file=file,
        project=bench.project,
        api_key=bench.sql("SELECT id FROM api_keys LIMIT 1").strip(),
        base_model=bench.sql("SELECT id FROM base_models LIMIT 1").strip(),
    )
    for _ in range(ROUNDS):
        script = SCRIPTS / "create_job.sql"
        bench.turn("create", "pgbench", lambda: bench.pgbench(script, **caller))
        arguments = ("requests", CLIENTS, SECONDS, "POST", "/v1/fine_tuning/jobs", body)
        bench.turn("create", "api", lambda: bench.load(*arguments))
        # What no validator has come to yet must not be read in the other side's turn.
        bench.sql("UPDATE jobs SET validate_after = 'infinity' WHERE status = 'validating_files'")
    note_beside_pgbench(bench, "create", "create-job-vs-pgbench", 0.5)


def streams_part(bench):
    """An event's way from its transaction to all who watch."""
    file = bench.upload(rows_file(bench.directory / "few.jsonl", 20), "fine-tune")["id"]
    for side, count in (("many-jobs", STREAM_JOBS), ("one-job", 1)):
        jobs = [bench.create_job(file, number) for number in range(count)]
        bench.wait_until_queued()
        arguments = ("streams", bench.database, STREAMS, STREAM_SECONDS, *jobs)
        result = bench.turn("streams", side, lambda: bench.load(*arguments))
        bench.note(
            f"stream-p99-ms-{STREAMS}-streams-{side}", result["milliseconds"]["p99"], "<", 250,
            jobs=count, arrivals=result["arrivals"],
            median_ms=round(result["milliseconds"]["p50"], 2),
            longest_ms=round(result["milliseconds"]["max"], 2),
        )


def files_part(bench):
    """A large file there and back, beside the least that must be done with it."""
    path = rows_file(bench.directory / "rows.jsonl", size=MIB << 20)
    megabytes = path.stat().st_size / 1e6
    # Loads the tokenizer, which stays.
    wait_for_report(bench, bench.upload(rows_file(bench.directory / "few.jsonl", 20), "fine-tune")["id"])
    copy = bench.directory / "copy"

    def hash_and_copy():
        began = time.monotonic()
        output_of(["sha256sum", path])
        hashed = time.monotonic()
        output_of(["dd", f"if={path}", f"of={copy}", "bs=1M", "conv=fsync"])
        ended = time.monotonic()
        copy.unlink()
        return {"sha256sum": hashed - began, "dd": ended - hashed, "seconds": ended - began}

    growth = []
    for _ in range(ROUNDS):
        bench.turn("upload", "bare", hash_and_copy)
        before = bench.memory_mark()
        file = bench.turn("upload", "api", lambda: bench.upload(path, "user_data"))["id"]
        growth.append(bench.memory("VmHWM") - before)
        bare = lambda: bench.load("download", str(path), address=bench.bare)
        bench.turn("download", "bare", bare)
        bench.turn("download", "sendfile", lambda: sendfile_download(bench, path))
        content = f"/v1/files/{file}/content"
        bench.turn("download", "api", lambda: bench.load("download", content))
        bench.request("DELETE", f"/v1/files/{file}")
    ours, theirs = (bench.median("upload", side, "seconds") for side in ("api", "bare"))
    bench.note(
        "upload-vs-sha256sum-and-dd", theirs / ours, ">=", 0.5,
        mb_per_second=round(megabytes / ours), peer_mb_per_second=round(megabytes / theirs),
        megabytes=round(megabytes),
    )
    bench.note("upload-memory-growth-mib", max(growth), "<", 64)
    ours, theirs = (bench.median("download", side, "seconds") for side in ("api", "bare"))
    bench.note(
        "download-vs-bare-stream", theirs / ours, ">=", 0.8,
        mb_per_second=round(megabytes / ours), peer_mb_per_second=round(megabytes / theirs),
        sendfile_mb_per_second=round(megabytes / bench.median("download", "sendfile", "seconds")),
    )
    report_memory(bench, path)


def sendfile_download(bench, path):
    """The file by the kernel alone, from its cache to a socket."""
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {path.stat().st_size}\r\n\r\n".encode()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def serve():
            client, _ = server.accept()
            with client, path.open("rb") as file:
                client.recv(1 << 16)
                client.sendall(head)
                client.sendfile(file)

        thread = threading.Thread(target=serve)
        thread.start()
        result = bench.load("download", "/", address=address)
        thread.join()
        return result


def wait_for_report(bench, file):
    """The report on a file, once it is made."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        report, status = bench.request("GET", f"/v1/files/{file}/report")
        if status != 202:
            return report
        time.sleep(0.5)
    raise Failed("the report is not made")


def report_memory(bench, path):
    """Memory over an upload to train on and the report that is made of it."""
    before = bench.memory_mark()
    file = bench.upload(path, "fine-tune")["id"]
    began = time.monotonic()
    report = wait_for_report(bench, file)
    bench.request("DELETE", f"/v1/files/{file}")
    bench.note(
        "upload-and-report-memory-growth-mib", bench.memory("VmHWM") - before, "<", 64,
        rows=report["rows"], tokens=report["tokens"]["total"],
        report_seconds=round(time.monotonic() - began, 1),
    )


def validation_part(bench):
    """Reading rows and counting their tokens, on one core."""
    text = output_of([TARGET / "examples/validation_speed", MODEL])
    print("  validation " + text.replace("\n", "; "), flush=True)
    speed, mark = re.search(r"validation MB/s ([\d.]+) mark >=([\d.]+)", text).groups()
    bench.measured["validation"] = text.splitlines()
    bench.note("validation-mb-per-second", float(speed), ">=", float(mark))


def job_body(model, file):
    return {
        "model": model,
        "training_file": file,
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 3, "adapter": {"r": 16}}},
        },
    }


def job_statement():
    """The statement by which the store reads a job, with pgbench's variables."""
    source = (ROOT / "store/src/jobs/mod.rs").read_text()
    columns = re.search(r'macro_rules! job_columns \{\s*\(\) => \{\s*"([^"]+)"', source)[1]
    return (
        f"SELECT {' '.join(columns.split())} FROM jobs JOIN projects"
        " ON projects.id = jobs.project_id WHERE jobs.id = :id AND jobs.project_id = :project;\n"
    )


def rows_file(path, rows=None, size=None):
    """Chat rows of about a kilobyte, each another: so many, or as many as `size` holds."""
    generator = random.Random(1)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=2 + n % 7)) for n in range(5000)]
    texts = [" ".join(generator.choices(words, k=140)) for _ in range(200)]
    with path.open("w") as file:
        number = written = 0
        while (number < rows) if size is None else (written < size):
            message = [
                {"role": "user", "content": f"Question {number}"},
                {"role": "assistant", "content": texts[number % len(texts)]},
            ]
            written += file.write(json.dumps({"messages": message}) + "\n")
            number += 1
    return path


def postgres(program):
    """One of PostgreSQL's programs, where scripts/packages.sh looks for them."""
    places = [Path(os.environ.get("TUNESMITH_PG_BIN", "/nonexistent"))]
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = [place / program for place in places if (place / program).exists()]
    return found[0] if found else program


def output_of(command):
    """What a program prints; it must end well."""
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False,
    )
    if done.returncode:
        raise Failed(f"{Path(command[0]).name} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def family_seconds():
    """CPU time of this process and all of its descendants, those that have ended too."""
    parents, seconds = {}, {}
    tick = os.sysconf("SC_CLK_TCK")
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            parents[pid] = int(fields[1])
            seconds[pid] = sum(map(int, fields[11:15])) / tick

    def is_ours(pid):
        while pid > 1 and pid != os.getpid():
            pid = parents.get(pid, 0)
        return pid == os.getpid()

    return sum(used for pid, used in seconds.items() if is_ours(pid))


def summary(bench, facts):
    """Prints the figures, and writes them with everything that they came from."""
    report = {"machine": facts, "ratios": bench.ratios, "measured": bench.measured}
    (OUT / "api.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{facts['cpu']}, {facts['cores']} cores, {output_of([postgres('postgres'), '-V']).strip()}")
    sides.show_ratios(bench)


def main():
    wanted = os.environ.get("BENCH_ONLY", ",".join(PARTS)).split(",")
    if unknown := set(wanted) - set(PARTS):
        sys.exit(f"BENCH_ONLY has {', '.join(unknown)}: choose among {', '.join(PARTS)}")
    # Every open stream is a file here and in the server.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    OUT.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with running_server() as bench:
        for part in PARTS:
            if part in wanted:
                globals()[f"{part}_part"](bench)
        summary(bench, sides.machine())
    print(f"\n{time.monotonic() - began:.0f} s; raw numbers in {OUT / 'api.json'}")


if __name__ == "__main__":
    main()
