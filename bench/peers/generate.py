"""Times greedy decoding by transformers' `generate`, one sequence, with its cache, as its users call it.

`generate.py MODEL_DIR PROMPT NEW_TOKENS --precision f32|bf16|rounded` prints one line of
JSON; `rounded` is arithmetic in f32 with weights of bf16. With `--adapters DIR COUNT` it writes that
many LoRA adapters of rank 16 beside, as PEFT saves them.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import peft
import torch
import transformers

TURNS = 3


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir")
    parser.add_argument("prompt", type=json.loads, help="a JSON list of token ids")
    parser.add_argument("new_tokens", type=int)
    parser.add_argument("--precision", choices=["f32", "bf16", "rounded"], default="f32")
    parser.add_argument("--adapters", nargs=2, metavar=("DIR", "COUNT"))
    options = parser.parse_args()

    torch.set_num_threads(os.cpu_count())
    transformers.logging.disable_progress_bar()
    dtype = torch.float32 if options.precision == "f32" else torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model_dir, dtype=dtype)
    if options.precision == "rounded":
        model = model.float()
    model.generation_config.eos_token_id = None
    prompt = torch.tensor([options.prompt])

    def seconds(new_tokens):
        began = time.perf_counter()
        with torch.inference_mode():
            ids = model.generate(prompt, max_new_tokens=new_tokens, do_sample=False)
        return time.perf_counter() - began, ids[0, len(options.prompt) :].tolist()

    seconds(2)
    first = [seconds(1)[0] for _ in range(TURNS)]
    whole = [seconds(options.new_tokens) for _ in range(TURNS)]
    first, ids = statistics.median(first), whole[0][1]
    total = statistics.median(turn for turn, _ in whole)
    if options.adapters:
        write_adapters(model, *options.adapters)
    print(
        json.dumps(
            {
                "first_token_s": first,
                "decode_tokens_per_s": (len(ids) - 1) / (total - first),
                "ids": ids,
                "precision": options.precision,
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            }
        )
    )


def write_adapters(model, directory, count):
    """B is drawn too, so that each adapter answers in its own way."""
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    for index in range(int(count)):
        torch.manual_seed(index)
        adapted = peft.get_peft_model(model, config)
        adapted.save_pretrained(Path(directory) / str(index))
        model = adapted.unload()


if __name__ == "__main__":
    main()
