"""What is given out was reloaded and compared with what is served, and is refused where it differs."""

import http.client
import json
import shutil
from urllib.request import quote

import numpy as np
import pytest
import torch
from conftest import TINY
from harness import Up, wait_for
from peft import PeftModel
from rows import sums
from safetensors.torch import load_file, save_file
from test_peft import base_model, our_logits, their_logits, token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

SETTINGS = {"n_epochs": 3, "batch_size": 4, "learning_rate": 1e-2}


def path_of(model, weights_format, storage=None, check=None):
    options = {"format": weights_format, "type": storage, "check": check}
    query = "&".join(f"{name}={value}" for name, value in options.items() if value)
    return f"/models/{quote(model, safe='')}/weights?{query}"


def check_of(directory):
    return json.loads((directory / "manifest.json").read_text())["check"]


def relative_error(found, served):
    """‖e − s‖ / ‖s‖ around the mean of each position."""
    found, served = (x - x.mean(axis=-1, keepdims=True) for x in (found.astype(float), served.astype(float)))
    return np.linalg.norm(found - served) / np.linalg.norm(served)


@pytest.mark.parametrize(
    ("weights_format", "storage"),
    # The other types of GGUF are opened in test_llama_cpp.py.
    [("adapter", None), ("merged", None), ("gguf", "q8_0")],
)
def test_an_export_s_manifest_has_its_error_which_others_find_too(service, tiny_dir, tmp_path, tuned, weights_format, storage):
    model, served_dir = tuned
    directory = service.weights(model, tmp_path / "export", weights_format=weights_format, storage=storage)
    check = check_of(directory)
    assert check["checked"] and check["positions"] > 100 and check["texts"] == 4, check
    [(measure, bound)] = check["bound"].items()
    assert check[measure] <= bound, check

    ids = token_ids(tiny_dir, sums(1, start=77)[0])
    served = our_logits(tiny_dir, served_dir, ids)
    if weights_format == "adapter":
        found = PeftModel.from_pretrained(base_model(tiny_dir), directory)
    elif weights_format == "merged":
        found = base_model(directory)
    else:
        found = AutoModelForCausalLM.from_pretrained(directory, gguf_file=f"model-{storage}.gguf", dtype=torch.float32)
    found = their_logits(found, ids)
    assert np.abs(found - their_logits(base_model(tiny_dir), ids)).max() > 0.1, "the export is no base model"
    errors = {"max_abs_error": np.abs(found - served).max(), "relative_error": relative_error(found, served)}
    assert errors[measure] <= bound, (errors, check)
    if storage:
        # Another text, so another error, but of the same size.
        assert check[measure] / 3 < errors[measure] < check[measure] * 3, (errors, check)


@pytest.mark.parametrize(
    ("dtype", "bytes_each", "max_shard_size"),
    [("f32", 4, None), ("f16", 2, "100KB"), ("bf16", 2, None), (None, 4, "1MB")],
)
def test_a_merged_model_of_any_type_and_in_several_files_opens_in_transformers_and_says_what_is_served(
    service, client, tiny_dir, tmp_path, tuned, dtype, bytes_each, max_shard_size
):
    model, served_dir = tuned
    directory = service.weights(
        model, tmp_path / "export", weights_format="merged", dtype=dtype, max_shard_size=max_shard_size
    )
    config = json.loads((directory / "config.json").read_text())
    torch_name = {"f16": "float16", "bf16": "bfloat16"}.get(dtype, "float32")
    assert {config[key] for key in ("dtype", "torch_dtype") if key in config} == {torch_name}
    # As a stranger opens it: config.json says which type the numbers have.
    opened, loading = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert opened.dtype == getattr(torch, torch_name)
    assert not any(loading.values()), loading

    files = sorted(directory.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {opened.dtype}
    # The head is the embedding, which lies there once.
    assert opened.lm_head.weight is opened.model.embed_tokens.weight and "lm_head.weight" not in tensors
    size = sum(tensor.numel() for tensor in tensors.values()) * bytes_each
    if max_shard_size:
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == size
        assert set(index["weight_map"]) == set(tensors) and len(files) > 1
        assert {file.name for file in files} == set(index["weight_map"].values())
    else:
        assert [file.name for file in files] == ["model.safetensors"]

    check = check_of(directory)
    assert check["checked"] and check["numbers"] == (dtype or "f32"), check
    [(measure, bound)] = check["bound"].items()
    assert measure == ("max_abs_error" if bytes_each == 4 else "relative_error")
    ids = token_ids(tiny_dir, sums(1, start=77)[0])
    served = our_logits(tiny_dir, served_dir, ids)
    # What the weights have lost, and not what arithmetic in half precision would lose beside it.
    found = their_logits(base_model(directory), ids)
    errors = {"max_abs_error": np.abs(found - served).max(), "relative_error": relative_error(found, served)}
    assert errors[measure] <= bound, (errors, check)
    if bytes_each == 2:
        assert check[measure] / 3 < errors[measure] < check[measure] * 3, (errors, check)

    if dtype == "f32":
        question = sums(1, start=77)[0]["messages"][:-1]
        answer = client.chat.completions.create(model=model, messages=question, max_tokens=8, temperature=0)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        prompt = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        reply = opened.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(reply, skip_special_tokens=True) == answer.choices[0].message.content


@pytest.fixture(scope="module")
def tuned(service, tmp_path_factory):
    """A tuned model, and its adapter as it was stored."""
    job = service.finish(service.create_job(sums(20), TINY, **SETTINGS).id)
    return job.fine_tuned_model, service.weights(job.fine_tuned_model, tmp_path_factory.mktemp("stored") / "adapter")


def flip(file, tensor):
    """Flips the sign of every number of a tensor in a safetensors file; gives the old bytes."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    info = json.loads(content[8 : 8 + length])[tensor]
    assert info["dtype"] == "F32"
    start, end = (8 + length + offset for offset in info["data_offsets"])
    damaged = bytearray(content)
    for sign in range(start + 3, end, 4):
        damaged[sign] ^= 0x80
    file.write_bytes(damaged)
    return content


def test_an_export_of_damaged_weights_is_refused_with_the_numbers_until_they_are_restored(tmp_path, tiny_dir):
    with Up(tmp_path / "up") as server:
        server.import_model(tiny_dir, TINY)
        service = server.service
        model = service.finish(service.create_job(sums(20), TINY, **SETTINGS).id).fine_tuned_model
        whole = service.weights(model, tmp_path / "whole", weights_format="merged")
        assert check_of(whole)["checked"]

        # The base model rots in the object store, while workers and samplers keep a good copy.
        stored = next(server.data_dir.glob("objects/models/*/model.safetensors"))
        content = flip(stored, "model.layers.1.self_attn.v_proj.weight")
        # What was checked is never replaced by something else: the download breaks off, and is
        # checked anew.
        with pytest.raises((http.client.IncompleteRead, ConnectionError, http.client.RemoteDisconnected)):
            service.request("GET", path_of(model, "merged"))

        def refused():
            status, _, body = service.request("GET", path_of(model, "merged"))
            return status == 400 and json.loads(body)["error"]

        error = wait_for("the damaged export to be refused", refused)
        assert error["code"] == "export_check_failed", error
        found, bound = (float(part.split()[0].rstrip(",")) for part in error["message"].split("differ by up to ")[1].split(", and ")[:2])
        assert found > bound == 1e-3, error
        for part in (model, "positions of 4 texts", "damaged in the object store", "check=none"):
            assert part in error["message"], error

        status, _, body = service.request("GET", path_of(model, "gguf"))
        assert status == 400 and "of their spread" in json.loads(body)["error"]["message"], body
        # The adapter is whole, and is for the base model that the client has.
        assert check_of(service.weights(model, tmp_path / "adapter"))["checked"]
        cli = service.cli("models", "weights", model, "--format", "merged", "--output", tmp_path / "cli", check=False)
        assert cli.returncode != 0 and "is not given out" in cli.stderr, cli.stderr
        cli = service.cli("models", "weights", model, "--format", "merged", "--check", "none", "--output", tmp_path / "cli")
        assert "Not compared with the served model: The download asked for no check." in cli.stdout
        assert not check_of(tmp_path / "cli")["checked"]

        stored.write_bytes(content)
        cli = service.cli("models", "weights", model, "--format", "merged", "--check", "required", "--output", tmp_path / "again")
        assert "Checked: the logits are those of the served model" in cli.stdout
        restored, first = (load_file(directory / "model.safetensors") for directory in (tmp_path / "again", whole))
        assert all(torch.equal(restored[name], first[name]) for name in first)


def test_a_gguf_with_a_number_beyond_half_precision_is_refused_before_its_first_byte(up, service, tiny_dir, tmp_path):
    directory, name = tmp_path / "beyond", "model.layers.1.mlp.down_proj.weight"
    shutil.copytree(tiny_dir, directory)
    weights = load_file(directory / "model.safetensors")
    weights[name][0, 0] = 1e5
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    up.import_model(directory, "beyond")
    job = service.create_job(sums(10), "beyond", n_epochs=1, batch_size=10, adapter={"r": 1, "target_modules": ["q_proj"]})
    model = service.finish(job.id).fine_tuned_model
    for check in ("none", "auto"):
        status, _, body = service.request("GET", path_of(model, "gguf", "f16", check))
        error = json.loads(body)["error"]
        assert (status, error["code"], error["param"]) == (400, "weights_not_available", "type"), error
        assert name in error["message"] and "100000 is beyond" in error["message"], error
    # A block's scale is a 127th of its greatest number.
    service.weights(model, tmp_path / "blocks", weights_format="gguf", storage="q8_0", check="none")
