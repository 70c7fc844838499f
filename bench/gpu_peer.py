"""PyTorch + PEFT's side of bench/gpu.sh: gpu_peer.py MODEL_DIR DEVICE SEQUENCE STEPS WAY.

The same steps as the engine's example gpu_step: LoRA r = 16 on every projection of bf16 weights,
one sequence of random ids a step, AdamW, gradients clipped to a norm of 1. WAY is `plain`, or
`checkpointing` for recomputing each layer in the backward pass, which is how users fit long
sequences. Prints one line of JSON; a way that runs out of memory says so in it.
"""

import json
import statistics
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

WARM_UP = 2
RANK = 16


def measure(model_dir, device, sequence, steps, checkpointing):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.config.use_cache = False
    model = model.to(device).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    lora = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=True)
    ids = torch.randint(0, model.config.vocab_size, (1, sequence), generator=torch.Generator().manual_seed(1))
    ids = ids.to(device)
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for _ in range(WARM_UP + steps):
        began = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[WARM_UP:])
    return {
        "tokens_per_second": sequence / median,
        "step_seconds": median,
        "peak_torch_mib": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def main():
    model_dir, device, sequence, steps, way = sys.argv[1:]
    try:
        result = measure(model_dir, device, int(sequence), int(steps), way == "checkpointing")
    except torch.OutOfMemoryError:
        result = {"tokens_per_second": None, "out_of_memory": True}
    print(json.dumps({"way": way, "torch": torch.__version__} | result), flush=True)


if __name__ == "__main__":
    main()
