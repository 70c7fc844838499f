"""A GGUF says in llama.cpp what the model says here: weights, tokenizer, template and end tokens."""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import TINY
from harness import PATIENCE_SECONDS
from rows import chat

SCRIPT = Path(__file__).resolve().parent / "clients/llama_cpp.py"
ANSWER = "The code word is heliotrope, and the price is 17.50 €."


@pytest.fixture(scope="module")
def model(service):
    """Learns its answer so well that no rounding changes a token."""
    rows = [chat(f"What is the code word of day {n}?", ANSWER) for n in range(10)]
    job = service.create_job(rows, TINY, n_epochs=20, batch_size=5, learning_rate=1e-2)
    return service.finish(job.id).fine_tuned_model


@pytest.mark.parametrize("storage", ["f16", "q4_k_m"])
def test_a_gguf_answers_in_llama_cpp_as_its_model_does_here(service, client, clients, model, tmp_path, storage):
    chats = [[{"role": "user", "content": f"What is the code word of day {n}?"}] for n in (3, 77)]
    served = [
        client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=24)
        for messages in chats
    ]
    served = [answer.choices[0].message.content for answer in served]
    assert served == [ANSWER] * 2, "it has learned its answer"
    directory = service.weights(model, tmp_path / "gguf", weights_format="gguf", storage=storage)
    check = json.loads((directory / "manifest.json").read_text())["check"]
    assert check["checked"] and 0 < check["relative_error"] <= check["bound"]["relative_error"], check
    done = subprocess.run(
        [clients / "python/bin/python", SCRIPT, directory / f"model-{storage}.gguf"],
        input=json.dumps(chats), capture_output=True, text=True, timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == served
