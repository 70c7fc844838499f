"""Times TRL's SFTTrainer on chat rows, in the order of the file, as its user runs it.

LoRA of rank 16 and alpha 32 on all seven projections, four rows a step, loss on every token (TRL's
default), a constant learning rate. Prints one line of JSON with the seconds of each step and epoch.
"""

import argparse
import importlib
import json
import os
import tempfile
import time
from pathlib import Path

began = time.perf_counter()

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model_dir")
parser.add_argument("rows", help="a JSON Lines file of conversations")
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--max-steps", type=int, default=-1)
parser.add_argument(
    "--precision",
    choices=["f32", "amp", "bf16"],
    default="f32",
    help="amp is f32 weights under bf16 autocast; bf16 is bf16 weights",
)
parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, TRL's default")
parser.add_argument("--unsloth", action="store_true", help="the model and its adapter by unsloth")
options = parser.parse_args()

# unsloth wants to be imported before what it changes.
unsloth = importlib.import_module("unsloth") if options.unsloth else None

import datasets
import peft
import torch
import transformers
import trl


def peak_mib():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return None


class Clock(transformers.TrainerCallback):
    """Notes when steps and epochs begin and end."""

    def __init__(self):
        self.steps, self.epochs = [], []

    def on_epoch_begin(self, *_, **__):
        self.epoch_began = time.perf_counter()

    def on_epoch_end(self, *_, **__):
        self.epochs.append(time.perf_counter() - self.epoch_began)

    def on_step_begin(self, *_, **__):
        self.step_began = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.steps.append(time.perf_counter() - self.step_began)


def torch_model(dtype):
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model_dir)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model_dir, dtype=dtype)
    lora = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
    )
    return model, tokenizer, lora


def unsloth_model(dtype):
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        options.model_dir, max_seq_length=1024, load_in_4bit=False, dtype=dtype
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules=PROJECTIONS,
        use_gradient_checkpointing=options.checkpointing,
    )
    return model, tokenizer, None


def main():
    threads = os.cpu_count()
    torch.set_num_threads(threads)
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    model, tokenizer, lora = (unsloth_model if options.unsloth else torch_model)(dtype)
    rows = datasets.load_dataset("json", data_files=options.rows, split="train")
    clock = Clock()
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = trl.SFTTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=rows,
            peft_config=lora,
            callbacks=[clock],
            args=trl.SFTConfig(
                output_dir=output_dir,
                num_train_epochs=options.epochs,
                max_steps=options.max_steps,
                per_device_train_batch_size=4,
                learning_rate=2e-4,
                lr_scheduler_type="constant",
                train_sampling_strategy="sequential",
                weight_decay=0.0,
                max_length=1024,
                packing=False,
                bf16=options.precision == "amp",
                gradient_checkpointing=options.checkpointing,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
        )
        startup_seconds = time.perf_counter() - began
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    modules = [torch, transformers, peft, trl] + ([unsloth] if unsloth else [])
    print(
        json.dumps(
            {
                "precision": options.precision,
                "checkpointing": trainer.args.gradient_checkpointing,
                "threads": threads,
                "tokens": sum(map(len, trainer.train_dataset["input_ids"])),
                "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
                "startup_seconds": startup_seconds,
                "step_seconds": clock.steps,
                "epoch_seconds": clock.epochs,
                "losses": losses,
                "peak_mib": peak_mib(),
                "versions": {m.__name__: m.__version__ for m in modules},
            }
        ),
        flush=True,
    )


main()
