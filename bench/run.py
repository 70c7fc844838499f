#!/usr/bin/env python3
"""Measures tunesmith beside PyTorch, TRL, unsloth and llama.cpp, in turns, and prints ratios of medians.

Needs a release build and the environments of bench/setup.sh: `make bench` sees to both. See
bench/README.md for what is compared and by which rules.

  BENCH_ONLY=lora,startup   parts to run, of: lora full chats prefix startup serving
  BENCH_ROUNDS=2            how often each side gets its turn
  BENCH_STEPS=3             steps timed in a turn
  --realtime                real-time priority for both sides, for a machine that is not quiet
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sides
from sides import OUT, ROOT, Failed

CHATS = ROOT / "engine/tests/reference/chat32.jsonl"
OURS = "tunesmith"
SYSTEM_PROMPT = ROOT / "bench/data/system-prompt.txt"
PARTS = ("lora", "full", "chats", "prefix", "startup", "serving")
TORCH_SETTINGS = ("f32", "f32-mkl", "amp", "bf16")
BATCH, SEQUENCE = 4, 256
MEMORY_LINE = f"peak-memory-lora-{BATCH}x{SEQUENCE}-vs-torch-bf16"
# The shape on which PyTorch's settings are first tried: without instructions for bf16 a whole step
# in bf16 takes minutes.
SHORT = (1, 64)
STARTUP_RUNS = 5
# What is answered in a turn of serving, and over how many adapters.
PROMPT_TOKENS, NEW_TOKENS, ADAPTERS = 64, 128, 8
# A peer's setting that was slower than the best by this factor in a first short run gets no turns.
HOPELESS = 2
# Whole epochs take long: so many settings at most get turns there.
EPOCH_SETTINGS = 2
# Two first losses may differ by this much and still be of the same work.
LOSS_TOLERANCE = {"f32": 1e-3, "amp": 2e-2, "bf16": 2e-2}
# Other programs' share of one core above which a turn was not quiet.
QUIET = 0.1


class Bench:
    """What was measured so far."""

    def __init__(self, options, pythons):
        self.runner = sides.Runner(options.realtime)
        self.pythons = pythons
        self.rounds = int(os.environ.get("BENCH_ROUNDS", 2))
        self.steps = int(os.environ.get("BENCH_STEPS", 3))
        self.ratios, self.measured, self.versions, self.noisy = [], {}, {}, 0
        # By peer, for whole epochs.
        self.best_settings = {}
        self.torch_settings = None

    def note(self, part, side, result):
        """Keeps a raw result and says what it was."""
        self.measured.setdefault(part, {}).setdefault(side, []).append(result)
        self.versions |= result.get("versions", {})
        self.noisy += result["foreign"] > QUIET and "short" not in side
        seconds = result["step_seconds"]
        print(
            f"  {part:8}{side:26}{statistics.median(seconds):9.3f} s a step  "
            f"{sum(seconds):8.2f} s in all {result['peak_mib']:7.0f} MiB"
            f"  foreign {result['foreign']:.2f}",
            flush=True,
        )
        return result

    def ratio(self, name, value, sense, mark, **facts):
        """Keeps one of the figures of the summary; a `value` that is a text says why there is none."""
        self.ratios.append({"name": name, "value": value, "mark": f"{sense}{mark}", **facts})

    def scout(self, part, settings, run):
        """A first short run of each of a peer's settings; those that may be the best, best first."""
        seconds, reasons = {}, {}
        for setting in settings:
            try:
                result = self.note(part, f"{setting} (short)", run(setting))
                seconds[setting] = statistics.median(result["step_seconds"])
            except Failed as error:
                reasons[str(error)] = setting
                print(f"  {part:8}{setting:26} not run: {error}", flush=True)
        if not seconds:
            raise Failed("; ".join(f"{setting}: {error}" for error, setting in reasons.items()))
        best = min(seconds.values())
        ranked = sorted(seconds, key=seconds.get)
        return [setting for setting in ranked if seconds[setting] <= HOPELESS * best]

    def seconds(self, part, side):
        """Median seconds of a step over all turns of a side."""
        return statistics.median(
            second for result in self.measured[part][side] for second in result["step_seconds"]
        )

    def precision(self, part):
        """What ours computed in."""
        return self.measured[part][OURS][0]["precision"]

    def epoch(self, part, side):
        """Median seconds of an epoch over all turns of a side."""
        seconds = lambda result: result.get("epoch_seconds") or [sum(result["step_seconds"])]
        return statistics.median(seconds(result)[0] for result in self.measured[part][side])


def check_equal_work(ours, theirs, first_loss):
    """Both sides train the same number of parameters on the same tokens from the same loss."""
    for what in ("trainable", "tokens"):
        if ours.get(what, theirs[what]) != theirs[what]:
            sys.exit(f"unequal work: {what} is {ours[what]} here and {theirs[what]} there")
    tolerance = max(LOSS_TOLERANCE[ours["precision"]], LOSS_TOLERANCE[theirs["precision"]])
    here, there = first_loss(ours), first_loss(theirs)
    if abs(here - there) > tolerance:
        sys.exit(f"unequal work: the first loss is {here} here and {there} there")


def torch_settings(bench):
    """The settings of PyTorch that may be its best on this processor, tried once a run."""
    if bench.torch_settings is None:
        python, ids = bench.pythons["torch"], random_ids(*SHORT)
        bench.torch_settings = bench.scout(
            "lora",
            TORCH_SETTINGS,
            lambda setting: sides.their_step(bench.runner, python, "lora", ids, 1, 1, setting),
        )
    return bench.torch_settings


def steps_part(bench, mode):
    """Training steps on random tokens, every token with loss: LoRA or full fine-tuning."""
    python, kept = bench.pythons["torch"], torch_settings(bench)
    ids, tokens = random_ids(BATCH, SEQUENCE), BATCH * SEQUENCE
    theirs = lambda setting, *shape: sides.their_step(bench.runner, python, mode, *shape, setting)
    # The line against f32 wants its turns whatever is best.
    wanted = kept + ["f32"] * (mode == "lora" and "f32" not in kept)
    for _ in range(bench.rounds):
        for setting in wanted:
            ours = bench.note(
                mode, OURS, sides.our_step(bench.runner, mode, ids, 1, bench.steps)
            )
            peer = bench.note(mode, setting, theirs(setting, ids, 1, bench.steps))
            check_equal_work(ours, peer, lambda result: result["first_loss"])
    ours, speeds = bench.seconds(mode, OURS), {p: bench.seconds(mode, p) for p in wanted}

    def line(name, setting, mark):
        bench.ratio(
            f"{mode}-{BATCH}x{SEQUENCE}-vs-{name}", speeds[setting] / ours, ">=", mark,
            tokens_per_second=round(tokens / ours, 1), precision=bench.precision(mode),
            peer=setting, peer_tokens_per_second=round(tokens / speeds[setting], 1),
        )

    line("best-torch", min(kept, key=speeds.get), {"lora": 2.0, "full": 1.5}[mode])
    if mode == "lora":
        line("torch-f32", "f32", 4.0)
        if "bf16" not in wanted:
            # Slow here, and still what the peak of memory is compared with: one step shows it.
            try:
                bench.note(mode, "bf16", theirs("bf16", ids, 0, 1))
            except Failed as error:
                bench.ratio(MEMORY_LINE, f"not run ({error})", "<=", 0.4)
                return
        memory_line(bench, mode)


def memory_line(bench, mode):
    """Peak memory beside PyTorch with bf16 weights."""
    peak = lambda side, key: max(result[key] for result in bench.measured[mode][side])
    ours, theirs = peak(OURS, "peak_mib"), peak("bf16", "peak_mib")
    bench.ratio(
        MEMORY_LINE, ours / theirs, "<=", 0.4,
        mib=round(ours), peer_mib=round(theirs), precision=bench.precision(mode),
        steady_mib=round(peak(OURS, "steady_peak_mib")),
        peer_steady_mib=round(peak("bf16", "steady_peak_mib")),
    )


def chats_part(bench, part, rows, peer, environment, mark, flags=""):
    """One epoch of chat rows by whole trainers, ours and a peer's."""
    python = bench.pythons.get(environment)
    line = f"{part}-epoch-vs-{peer}"
    theirs = lambda setting, steps=-1: sides.their_chats(bench.runner, python, rows, setting, steps)
    try:
        if python is None:
            raise Failed("its environment could not be installed")
        if peer not in bench.best_settings:
            bench.best_settings[peer] = best_chat_settings(bench, part, flags, theirs)
        for _ in range(bench.rounds):
            for setting in bench.best_settings[peer]:
                ours = bench.note(part, OURS, sides.our_chats(bench.runner, rows))
                theirs_now = bench.note(part, setting, theirs(setting))
                check_equal_work(ours, theirs_now, lambda result: result["losses"][0])
    except Failed as error:
        bench.ratio(line, f"not run ({error})", ">=", mark)
        return
    ours = bench.epoch(part, OURS)
    speeds = {setting: bench.epoch(part, setting) for setting in bench.best_settings[peer]}
    best = min(speeds, key=speeds.get)
    bench.ratio(
        line, speeds[best] / ours, ">=", mark,
        epoch_seconds=round(ours, 3), precision=bench.precision(part),
        peer=best, peer_epoch_seconds=round(speeds[best], 3),
        tokens=bench.measured[part][OURS][0]["tokens"],
    )


def best_chat_settings(bench, part, flags, theirs):
    """The settings of a trainer that may be its best: PyTorch's, and the first of them with
    gradient checkpointing too."""
    run = lambda setting: theirs(setting, 1)
    kept = bench.scout(part, [f"{setting}{flags}" for setting in torch_settings(bench)], run)
    kept += bench.scout(part, [f"{kept[0]} --checkpointing"], run)
    seconds = lambda setting: bench.seconds(part, f"{setting} (short)")
    return sorted(kept, key=seconds)[:EPOCH_SETTINGS]


def startup_part(bench):
    """From the start of the trainer's process to the report of its first step, on the chat rows."""
    seconds = []
    for _ in range(STARTUP_RUNS):
        with tempfile.TemporaryDirectory() as output_dir:
            request = sides.train_request(CHATS, output_dir, n_epochs=1, max_steps=1)
            seconds.append(bench.runner.first_step(request))
    print(f"  startup {OURS:26}" + "".join(f"{second:8.3f}" for second in seconds) + " s")
    bench.measured["startup"] = {OURS: seconds}
    bench.ratio("start-to-first-step-seconds", statistics.median(seconds), "<=", 1.5)


def serving_part(bench):
    """Answering: one stream beside transformers and llama.cpp, and many requests over adapters beside
    one by one. Weights are f32, as the model has them, and bf16, as most models come."""
    prompt = json.loads(random_ids(1, PROMPT_TOKENS).read_text())[0]
    turns = {}

    def note(side, result):
        turns.setdefault(side, []).append(result)
        speed = result["decode_tokens_per_s"]
        print(f"  serving  {side:26}{speed:9.1f} tokens/s", flush=True)
        bench.versions |= result.get("versions", {})

    def transformers(setting, adapters=None):
        return sides.their_answers(
            bench.runner, bench.pythons["torch"], prompt, NEW_TOKENS, setting, adapters
        )

    with tempfile.TemporaryDirectory() as directory:
        adapters = [f"{directory}/{index}" for index in range(ADAPTERS)]
        gguf = f"{directory}/model.gguf"
        sides.write_gguf(gguf)
        # What bf16 weights answer when nothing else is rounded.
        rounded = transformers("rounded")
        for turn in range(bench.rounds):
            note("f32", transformers("f32", (directory, ADAPTERS) if turn == 0 else None))
            note("bf16", transformers("bf16"))
            expected = {"fp32": turns["f32"][0], "bf16": rounded}
            if "llama" in bench.pythons:
                python = bench.pythons["llama"]
                note("llama.cpp", sides.llama_cpp_answers(bench.runner, python, gguf, prompt, NEW_TOKENS))
            for precision in ("fp32", "bf16"):
                ours = sides.our_answers(bench.runner, prompt, NEW_TOKENS, precision, adapters)
                note(f"{OURS} {precision}", ours)
                bench.noisy += ours["foreign"] > QUIET
                if ours["ids"] != expected[precision]["ids"]:
                    sys.exit("unequal work: the greedy answers differ")
    bench.measured["serving"] = turns
    middle = lambda side, key: statistics.median(turn[key] for turn in turns[side])
    speeds = {side: middle(side, "decode_tokens_per_s") for side in turns}
    fp32, bf16 = (f"{OURS} {precision}" for precision in ("fp32", "bf16"))
    best, ours = max(("f32", "bf16"), key=speeds.get), max((fp32, bf16), key=speeds.get)
    bench.ratio(
        "decode-vs-transformers", speeds[ours] / speeds[best], ">=", 1.5,
        side=ours, tokens_per_second=round(speeds[ours], 1),
        peer=best, peer_tokens_per_second=round(speeds[best], 1),
    )
    llama = speeds.get("llama.cpp")
    bench.ratio(
        "decode-vs-llama-cpp", speeds[bf16] / llama if llama else "not run: not installed", ">=", 0.5,
        tokens_per_second=round(speeds[bf16], 1), peer_tokens_per_second=llama and round(llama, 1),
    )
    for side, suffix in ((fp32, ""), (bf16, "-bf16")):
        name = f"16-requests-8-adapters-vs-one-by-one{suffix}"
        apart, together = (middle(side, key) for key in ("one_after_the_other_s", "together_s"))
        bench.ratio(
            name, apart / together, ">=", 6, one_by_one_seconds=round(apart, 2),
            seconds=round(together, 2), peak_mib=round(middle(side, "peak_mib")),
        )
    bench.ratio("first-token-seconds-64-tokens", middle(ours, "first_token_s"), "<=", 0.25)
    bench.ratio("adapter-load-seconds", middle(ours, "load_adapters_s") / ADAPTERS, "<=", 1)


def prefixed_rows():
    """The chats, each with one long system prompt before it."""
    prompt = SYSTEM_PROMPT.read_text().strip()
    path = OUT / "chats-with-system-prompt.jsonl"
    with path.open("w") as file:
        for line in CHATS.read_text().splitlines():
            messages = json.loads(line)["messages"]
            content = prompt
            if messages[0]["role"] == "system":
                content += "\n\n" + messages.pop(0)["content"]
            messages.insert(0, {"role": "system", "content": content})
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def random_ids(rows, tokens):
    """A file with rows of random ordinary tokens, the same ones for both sides."""
    vocabulary = json.loads((sides.MODEL / "config.json").read_text())["vocab_size"]
    generator = random.Random(1)
    ids = [[generator.randrange(17, vocabulary) for _ in range(tokens)] for _ in range(rows)]
    path = OUT / f"ids-{rows}x{tokens}.json"
    path.write_text(json.dumps(ids))
    return path


def summary(bench, facts):
    """Prints the figures, and writes them with everything that they came from."""
    report = {"machine": facts, "ratios": bench.ratios, "measured": bench.measured}
    report["machine"]["versions"] = bench.versions
    (OUT / "latest.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{facts['cpu']}, {facts['cores']} cores, {' '.join(facts['instruction_sets'])}")
    print(" ".join(f"{name} {version}" for name, version in bench.versions.items()))
    sides.show_ratios(bench)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--realtime", action="store_true")
    options = parser.parse_args()
    wanted = os.environ.get("BENCH_ONLY", ",".join(PARTS)).split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"BENCH_ONLY has {', '.join(unknown)}: choose among {', '.join(PARTS)}")
    OUT.mkdir(parents=True, exist_ok=True)
    setup = subprocess.run(
        [ROOT / "bench/setup.sh"], stdout=subprocess.PIPE, text=True, check=True
    )
    pythons = dict(line.split() for line in setup.stdout.splitlines())
    began = time.monotonic()
    bench = Bench(options, pythons)
    for part in PARTS:
        if part not in wanted:
            continue
        if part in ("lora", "full"):
            steps_part(bench, part)
        elif part == "chats":
            chats_part(bench, part, CHATS, "trl", "torch", 4.0)
            chats_part(bench, part, CHATS, "unsloth", "unsloth", 2.5, " --unsloth")
        elif part == "prefix":
            chats_part(bench, part, prefixed_rows(), "trl", "torch", 8.0)
        elif part == "startup":
            startup_part(bench)
        else:
            serving_part(bench)
    summary(bench, sides.machine())
    print(f"\n{time.monotonic() - began:.0f} s; raw numbers in {OUT / 'latest.json'}")


if __name__ == "__main__":
    main()
