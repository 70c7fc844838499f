"""Times training steps of transformers + PEFT on fixed token ids, as a user of PyTorch writes them.

A step is forward, backward, fused AdamW without clipping and zero_grad; every token of a row but
the first is a target. LoRA is of rank 16 and alpha 32 on all seven projections. Prints one line of
JSON.
"""

import argparse
import contextlib
import json
import os
import time
from pathlib import Path

began = time.perf_counter()

import peft
import torch
import transformers

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peak_mib():
    """Peak resident memory since the process started, or since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return None


def reset_peak():
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir")
    parser.add_argument("mode", choices=["lora", "full"])
    parser.add_argument("ids", type=Path, help="a JSON list of rows of token ids")
    parser.add_argument("warmup", type=int)
    parser.add_argument("steps", type=int)
    parser.add_argument(
        "--precision",
        choices=["f32", "amp", "bf16"],
        default="f32",
        help="amp is f32 weights under bf16 autocast; bf16 is bf16 weights",
    )
    options = parser.parse_args()

    threads = os.cpu_count()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    ids = torch.tensor(json.loads(options.ids.read_text()))
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.model_dir, dtype=dtype, attn_implementation="sdpa"
    )
    model.train()
    if options.mode == "lora":
        lora = peft.LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.0, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, lora)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0, fused=True)
    load_seconds = time.perf_counter() - began

    losses, seconds = [], []

    def step():
        start = time.perf_counter()
        autocast = (
            torch.autocast("cpu", dtype=torch.bfloat16)
            if options.precision == "amp"
            else contextlib.nullcontext()
        )
        with autocast:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        return time.perf_counter() - start

    for _ in range(options.warmup):
        step()
    warm_peak = peak_mib()
    reset_peak()
    seconds = [step() for _ in range(options.steps)]
    steady_peak = peak_mib()
    print(
        json.dumps(
            {
                "mode": options.mode,
                "precision": options.precision,
                "threads": threads,
                "tokens": ids.numel(),
                "trainable": sum(p.numel() for p in parameters),
                "load_seconds": load_seconds,
                "step_seconds": seconds,
                "first_loss": losses[0],
                "last_loss": losses[-1],
                "peak_mib": max(warm_peak, steady_peak),
                "steady_peak_mib": steady_peak,
                "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
            }
        )
    )


main()
