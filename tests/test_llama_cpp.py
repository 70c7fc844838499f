"""A GGUF says in llama.cpp what the model says here: weights, tokenizer, template and end tokens."""

import json
import subprocess
from pathlib import Path

import gguf
import pytest
from conftest import TINY, random_model
from harness import PATIENCE_SECONDS
from rows import chat
from transformers import AutoConfig

SCRIPT = Path(__file__).resolve().parent / "clients/llama_cpp.py"
ANSWER = "The code word is heliotrope, and the price is 17.50 €."


def in_llama_cpp(clients, path, chats):
    """What llama.cpp's server answers, or why it does not."""
    done = subprocess.run(
        [clients / "python/bin/python", SCRIPT, path],
        input=json.dumps(chats), capture_output=True, text=True, timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def answers(client, model, chats):
    replies = [
        client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=24)
        for messages in chats
    ]
    return [reply.choices[0].message.content for reply in replies]


@pytest.fixture(scope="module")
def model(service):
    """Learns its answer so well that no rounding changes a token."""
    rows = [chat(f"What is the code word of day {n}?", ANSWER) for n in range(10)]
    job = service.create_job(rows, TINY, n_epochs=20, batch_size=5, learning_rate=1e-2)
    return service.finish(job.id).fine_tuned_model


@pytest.mark.parametrize("storage", ["f16", "q4_k_m"])
def test_a_gguf_answers_in_llama_cpp_as_its_model_does_here(service, client, clients, model, tmp_path, storage):
    chats = [[{"role": "user", "content": f"What is the code word of day {n}?"}] for n in (3, 77)]
    served = answers(client, model, chats)
    assert served == [ANSWER] * 2, "it has learned its answer"
    directory = service.weights(model, tmp_path / "gguf", weights_format="gguf", storage=storage)
    check = json.loads((directory / "manifest.json").read_text())["check"]
    assert check["checked"] and 0 < check["relative_error"] <= check["bound"]["relative_error"], check
    assert in_llama_cpp(clients, directory / f"model-{storage}.gguf", chats) == served


SHAPE = {
    "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}
SLIDING, FULL = "sliding_attention", "full_attention"
# model_type, what no known model of the family has, and the key that says so. Weights are wide enough
# that what a token sees changes what is said.
UNUSUAL = {
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": 6, "layer_types": [SLIDING, FULL, SLIDING, FULL], "query_pre_attn_scalar": 4,
            "initializer_range": 0.1,
        },
        "gemma3.attention.sliding_window_pattern",
    ),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": 6, "layer_types": [FULL, SLIDING, SLIDING, FULL], "query_pre_attn_scalar": 4,
            "initializer_range": 0.1,
        },
        "gemma2.attention.sliding_window_pattern",
    ),
    "yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "attention_factor": 2.0,
                "original_max_position_embeddings": 64,
            },
            "initializer_range": 0.1,
        },
        "llama.rope.scaling.attn_factor",
    ),
}


def exported(service, name, tmp_path):
    """The GGUF of a tuned model of the base `name`, and the model's name."""
    rows = [chat(f"What is the code word of day {n}?", ANSWER) for n in range(10)]
    job = service.create_job(rows, name, n_epochs=1, batch_size=5, learning_rate=1e-5)
    model = service.finish(job.id).fine_tuned_model
    directory = service.weights(model, tmp_path / "gguf", weights_format="gguf", storage="f16")
    return model, directory / "model-f16.gguf"


def without(path, key):
    """The same file but for `key`."""
    reader = gguf.GGUFReader(path)
    less = path.with_name("less.gguf")
    writer = gguf.GGUFWriter(less, reader.fields["general.architecture"].contents())
    assert key in reader.fields
    for name, field in reader.fields.items():
        if name not in (key, "general.architecture") and not name.startswith("GGUF."):
            kind, *of = field.types
            writer.add_key_value(name, field.contents(), kind, sub_type=of[-1] if of else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return less


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_windows_divisors_and_scalings_are_computed_in_llama_cpp_as_here(
    up, service, client, clients, tmp_path, name
):
    model_type, settings, key = UNUSUAL[name]
    config = AutoConfig.for_model(model_type, **SHAPE, **settings)
    up.import_model(random_model(tmp_path / name, config), f"unusual-{name}")
    model, path = exported(service, f"unusual-{name}", tmp_path)
    chats = [[{"role": "user", "content": f"What is the code word of day {n}?"}] for n in (3, 77)]
    served = answers(client, model, chats)
    assert in_llama_cpp(clients, path, chats) == served
    assert in_llama_cpp(clients, without(path, key), chats) != served, "what the key says counts"


def test_a_gguf_of_a_mistral_reads_what_fits_into_its_window(up, service, client, clients, tmp_path):
    """llama.cpp computes no windows in this family: it is to read nothing that they would hide."""
    window = 96
    config = AutoConfig.for_model("mistral", **SHAPE, sliding_window=window, initializer_range=0.1)
    up.import_model(random_model(tmp_path / "mistral", config), "windowed-mistral")
    model, path = exported(service, "windowed-mistral", tmp_path)
    assert gguf.GGUFReader(path).fields["llama.context_length"].contents() == window
    short = [{"role": "user", "content": "What is it?"}]
    long = [{"role": "user", "content": "What is it? " * 30}]
    [served] = answers(client, model, [short])
    assert served
    assert in_llama_cpp(clients, path, [short, long]) == [served, None]
