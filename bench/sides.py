"""The two sides of every comparison, each a program that prints one line of JSON."""

import json
import math
import os
import platform
import re
import resource
import signal
import struct
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# `debug` only to try the benchmarks themselves.
PROFILE = os.environ.get("BENCH_PROFILE", "release")
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve() / PROFILE
MODEL = ROOT / "target/test-models/SmolLM2-135M-Instruct"
PEERS = ROOT / "bench/peers"
OUT = ROOT / "bench/out"
# Nothing here takes this long; a program that hangs must not stop the run for ever.
PATIENCE_SECONDS = 900

# A setting of PyTorch with this behind its precision has MKL believe that the processor is Intel's.
MKL = "-mkl"

# What is trained on the chat rows, on both sides.
HYPERPARAMETERS = {
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-4,
    "lr_scheduler": "constant",
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "max_seq_length": 1024,
    "prompt_loss_weight": 1.0,
    "eval_steps": 1_000_000,
    "checkpoint_steps": 1_000_000,
    "validation_split": 0.0,
    "adapter": {"type": "lora", "r": 16, "alpha": 32.0, "dropout": 0.0},
}


class Failed(Exception):
    """A program that did not end as it should; says how."""


def environment():
    """Both sides' environment: no network, no kernels chosen by hand."""
    kept = dict(os.environ)
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        kept.pop(name, None)
    return kept | {"HF_HUB_OFFLINE": "1", "RUST_LOG": "warn"}


def trainer_environment():
    """What a worker starts its trainer with (`TRAINER_MEMORY` in core/src/protocol.rs)."""
    source = (ROOT / "core/src/protocol.rs").read_text()
    found = re.search(r'TRAINER_MEMORY[^(]*\(&str, &str\) = \(\s*"(\w+)",\s*"([^"]+)"', source)
    return {found[1]: re.sub(r"\\\n\s*", "", found[2])}


class Runner:
    """Starts programs one after another, with real-time priority where asked for."""

    def __init__(self, realtime):
        self.prefix = ["chrt", "-f", "50"] if realtime else []

    def json(self, command, stdin=None, **variables):
        """Runs a program to its end; gives the last line of JSON that it printed, and under
        `foreign` which share of one core other programs used meanwhile."""
        command = [*self.prefix, *map(str, command)]
        busy, own, began = busy_seconds(), own_seconds(), time.monotonic()
        try:
            done = subprocess.run(
                command,
                input=stdin,
                capture_output=True,
                text=True,
                env=environment() | variables,
                timeout=PATIENCE_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"took over {PATIENCE_SECONDS} s") from None
        wall = time.monotonic() - began
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            last = (done.stderr.strip().splitlines() or ["no word"])[-1]
            raise Failed(f"ended with {done.returncode}: {last}")
        foreign = (busy_seconds() - busy - (own_seconds() - own)) / wall
        return json.loads(lines[-1]) | {"foreign": round(max(foreign, 0.0), 3)}

    def first_step(self, request):
        """Seconds from the start of `tunesmith train` to the report of its first step."""
        body = json.dumps({"type": "train", **request}).encode()
        began = time.monotonic()
        with subprocess.Popen(
            [*self.prefix, TARGET / "tunesmith", "train"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment() | trainer_environment(),
        ) as child:
            child.stdin.write(struct.pack(">I", len(body)) + body)
            child.stdin.flush()
            try:
                while True:
                    length = child.stdout.read(4)
                    if len(length) < 4:
                        raise Failed("the trainer ended before its first step")
                    frame = json.loads(child.stdout.read(struct.unpack(">I", length)[0]))
                    if frame["type"] == "failed":
                        raise Failed(frame["message"])
                    if frame["type"] == "step":
                        return time.monotonic() - began
            finally:
                child.send_signal(signal.SIGKILL)


def train_request(rows, output_dir, **hyperparameters):
    """A worker's words to its trainer."""
    return {
        "job_id": "ftjob-bench",
        "spec": {
            "model": MODEL.name,
            "seed": 0,
            "hyperparameters": HYPERPARAMETERS | hyperparameters,
        },
        "base_model_dir": str(MODEL),
        "training_file": str(rows),
        "validation_file": None,
        "resume_from": None,
        "output_dir": str(output_dir),
        "device": "cpu",
    }


def our_step(runner, mode, ids, warmup, steps):
    """Steps on fixed token ids."""
    command = [TARGET / "examples/bench_step", MODEL, mode, ids, warmup, steps]
    return runner.json(command, **trainer_environment())


def our_answers(runner, prompt, new_tokens, precision, adapters):
    """Greedy answers by the engine of the sampler."""
    command = [TARGET / "examples/bench_serving", MODEL, precision, json.dumps(prompt), new_tokens]
    return runner.json([*command, *adapters], **trainer_environment())


def llama_cpp_answers(runner, python, gguf, prompt, new_tokens):
    """Answers by llama.cpp."""
    command = [python, PEERS / "llama_cpp.py", gguf, json.dumps(prompt), new_tokens]
    return runner.json(command)


def write_gguf(path):
    """The model in half precision, as the front-end gives it away."""
    subprocess.run([TARGET / "examples/write_gguf", MODEL, path], check=True)


def their_answers(runner, python, prompt, new_tokens, precision, adapters=None):
    """Greedy answers by transformers, which may write (directory, count) adapters as well."""
    flags = ["--adapters", *adapters] if adapters else []
    command = [python, PEERS / "generate.py", MODEL, json.dumps(prompt), new_tokens]
    return runner.json([*command, "--precision", precision, *flags])


def their_step(runner, python, mode, ids, warmup, steps, setting):
    """The same by transformers and PEFT."""
    flags, variables = peer_setting(setting)
    command = [python, PEERS / "step.py", MODEL, mode, ids, warmup, steps, *flags]
    return runner.json(command, **variables)


def our_chats(runner, rows):
    """One epoch of chat rows."""
    with tempfile.TemporaryDirectory() as output_dir:
        request = train_request(rows, output_dir, n_epochs=1, max_steps=0)
        result = runner.json(
            [TARGET / "examples/bench_chats"], stdin=json.dumps(request), **trainer_environment()
        )
        adapter = next(Path(output_dir).rglob("adapter_model.safetensors"))
        return result | {"trainable": parameters(adapter)}


def parameters(safetensors):
    """How many numbers a file of weights holds."""
    with safetensors.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")


def their_chats(runner, python, rows, setting, max_steps=-1):
    """The same by TRL, or by unsloth."""
    flags, variables = peer_setting(setting)
    command = [python, PEERS / "sft.py", MODEL, rows, "--max-steps", max_steps, *flags]
    return runner.json(command, **variables)


def peer_setting(setting):
    """A setting such as `f32-mkl --checkpointing` as flags and environment variables."""
    precision, *flags = setting.split()
    variables = {}
    if precision.endswith(MKL):
        precision = precision.removesuffix(MKL)
        variables["LD_PRELOAD"] = str(OUT / "mkl_intel.so")
    return ["--precision", precision, *flags], variables


def machine():
    """What the numbers depend on."""
    cpu = Path("/proc/cpuinfo").read_text()
    field = lambda name: next(
        (line.split(":", 1)[1].strip() for line in cpu.splitlines() if line.startswith(name)), ""
    )
    known = ["avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16"]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": field("model name") or platform.machine(),
        "cpu_family": field("cpu family"),
        "cores": os.cpu_count(),
        "instruction_sets": [name for name in known if name in field("flags").split()],
        "memory_gib": round(pages / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "rustc": output(["rustc", "--version"]),
        "commit": output(["git", "-C", ROOT, "describe", "--always", "--dirty"]),
    }


def output(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def busy_seconds():
    """CPU time of the whole machine."""
    user, nice, system, _, _, irq, soft = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:8]
    )
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def own_seconds():
    """CPU time of this process and of the children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def show_ratios(bench):
    """Prints what each figure was made of, and then the figures, a line each."""
    if bench.noisy:
        print(f"{bench.noisy} turns had other programs beside them: the figures are not quiet ones")
    for entry in bench.ratios:
        facts = {k: v for k, v in entry.items() if k not in ("name", "value", "mark")}
        print(f"  {entry['name']}: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
    print()
    for entry in bench.ratios:
        value = entry["value"]
        shown = value if isinstance(value, str) else f"{value:.2f}"
        print(f"ratio {entry['name']} {shown} mark {entry['mark']}")
