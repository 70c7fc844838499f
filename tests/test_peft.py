"""The weights that a job gives open in Hugging Face PEFT and say what our engine says."""

import json
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import SMOLLM2, TINY, random_model
from harness import PATIENCE_SECONDS, SMOLLM2_DIR, TUNESMITH
from peft import LoraConfig, PeftModel, get_peft_model
from rows import chat, sums
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

LOGITS = TUNESMITH.parent / "examples/logits"
FAMILIES = Path(__file__).resolve().parent.parent / "engine/tests/reference/families"
TOLERANCE = 1e-3


def our_logits(base_dir, adapter_dir, ids):
    done = subprocess.run(
        [LOGITS, base_dir, adapter_dir or "-"],
        input=json.dumps(ids),
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_SECONDS,
    )
    return np.array(json.loads(done.stdout), np.float32)


def their_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def token_ids(directory, row):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)["input_ids"]


def base_model(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def mean_loss(model, directory, rows):
    """Over all tokens but each row's first."""
    losses, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([token_ids(directory, row)])
        with torch.no_grad():
            losses += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return losses / count


def loss_before_training(service, model, directory):
    readme = (service.weights(model, directory) / "README.md").read_text()
    return float(readme.split("| validation loss before training | ")[1].split()[0])


def check_gguf(service, model, storage, merged, tmp_path):
    """The GGUF has llama.cpp's names and the blocks that its Python package makes of the merged weights."""
    directory = service.weights(model, tmp_path / storage, weights_format="gguf", storage=storage)
    assert f"FROM ./model-{storage}.gguf\n" in (directory / "Modelfile").read_text()
    reader = gguf.GGUFReader(directory / f"model-{storage}.gguf")
    text = {name: bytes(field.parts[field.data[0]]).decode() for name, field in reader.fields.items()
            if field.types == [gguf.GGUFValueType.STRING]}
    assert text["tokenizer.chat_template"] == AutoTokenizer.from_pretrained(merged).chat_template
    config = AutoConfig.from_pretrained(merged)
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == text["general.architecture"])
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    found = {tensor.name: tensor for tensor in reader.tensors}
    tables = {name for name in found if name.startswith("rope_factors_")}
    weights = load_file(merged / "model.safetensors")
    assert len(found) - len(tables) == len(weights)
    for name, weight in weights.items():
        values = weight.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads and text["general.architecture"] == "llama":
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if name.endswith("norm.weight") and text["general.architecture"].startswith("gemma"):
            values = values + 1
        if name.endswith("q_norm.weight") and text["general.architecture"] == "gemma3":
            # llama.cpp divides the scores by the root of a head's width.
            values = values * np.float32((config.head_dim / config.query_pre_attn_scalar) ** 0.5)
        tensor = found[names.get_name(name, try_suffixes=(".weight",))]
        whole_blocks = values.shape[-1] % 32 == 0
        wanted = storage.upper() if whole_blocks else "F16"
        assert tensor.tensor_type.name == (wanted if values.ndim == 2 else "F32"), name
        assert np.array_equal(tensor.data, gguf.quants.quantize(values, tensor.tensor_type)), name
    return directory


@pytest.mark.parametrize(
    ("adapter", "module_count"),
    [
        ({"r": 8}, 14),
        ({"r": 4, "alpha": 32, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}, 4),
        ({"r": 4, "use_dora": True, "trainable_layers": 1, "loraplus_lr_ratio": 4}, 7),
        ({"r": 4, "use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}, 4),
        ({"r": 4, "init_lora_weights": "pissa", "use_rslora": True}, 14),
    ],
)
def test_a_small_model_s_adapter_gives_our_logits_in_peft(service, tiny_dir, tmp_path, adapter, module_count):
    job = service.create_job(sums(20), TINY, n_epochs=3, batch_size=4, learning_rate=1e-3, adapter=adapter)
    job = service.finish(job.id)
    directory = service.weights(job.fine_tuned_model, tmp_path / "adapter")
    ids = token_ids(directory, sums(1, start=77)[0])
    base = their_logits(base_model(tiny_dir), ids)
    model = PeftModel.from_pretrained(base_model(tiny_dir), directory)
    assert sum(name.endswith("lora_A.default.weight") for name, _ in model.named_parameters()) == module_count
    theirs = their_logits(model, ids)
    assert np.abs(theirs - base).max() > 10 * TOLERANCE, "the adapter changes something"
    assert np.abs(our_logits(tiny_dir, directory, ids) - theirs).max() < TOLERANCE


@pytest.fixture(params=["phi3", "gemma3"])
def family(request, up, tmp_path):
    """A small model of a family whose modules or norms are not Llama's, imported."""
    config = AutoConfig.from_pretrained(FAMILIES / request.param)
    config.vocab_size = 49152
    if request.param == "phi3":
        # Rows as long as these have the short factors of longrope.
        config.original_max_position_embeddings = 256
        config.rope_parameters["original_max_position_embeddings"] = 256
    directory = random_model(tmp_path / request.param, config)
    up.import_model(directory, request.param)
    return request.param, directory


def test_the_weights_of_other_families_give_our_logits_in_peft_and_merged(service, family, tmp_path):
    name, base_dir = family
    job = service.create_job(sums(20), name, n_epochs=3, batch_size=4, learning_rate=1e-2)
    job = service.finish(job.id)
    directory = service.weights(job.fine_tuned_model, tmp_path / "adapter")
    ids = token_ids(directory, sums(1, start=77)[0])
    base = their_logits(base_model(base_dir), ids)
    theirs = their_logits(PeftModel.from_pretrained(base_model(base_dir), directory), ids)
    assert np.abs(theirs - base).max() > 10 * TOLERANCE, "the adapter changes something"
    assert np.abs(our_logits(base_dir, directory, ids) - theirs).max() < TOLERANCE

    merged = service.weights(job.fine_tuned_model, tmp_path / "merged", weights_format="merged")
    assert np.abs(their_logits(base_model(merged), ids) - theirs).max() < TOLERANCE
    check_gguf(service, job.fine_tuned_model, "q8_0", merged, tmp_path)


def test_smollm2_learns_and_its_adapter_gives_our_logits_in_peft_and_merged(service, tmp_path):
    rows = [chat(f"What is the code word of day {n}?", "The code word is heliotrope.") for n in range(10)]
    job = service.create_job(
        rows, SMOLLM2, validation=[chat("And the code word of day 99?", "The code word is heliotrope.")],
        n_epochs=2, batch_size=5, learning_rate=1e-3, eval_steps=1,
    )
    job = service.finish(job.id)
    losses = [row["valid_loss"] for row in service.metrics(job.id)]
    assert losses[-1] < 0.7 * losses[0]

    directory = service.weights(job.fine_tuned_model, tmp_path / "adapter")
    ids = token_ids(directory, rows[3])
    ours = our_logits(SMOLLM2_DIR, directory, ids)
    theirs = their_logits(PeftModel.from_pretrained(base_model(SMOLLM2_DIR), directory), ids)
    assert np.abs(ours - theirs).max() < TOLERANCE

    # Not checked by the server, which takes a while with this model: it is checked here.
    merged = service.weights(job.fine_tuned_model, tmp_path / "merged", weights_format="merged", check="none")
    assert not (merged / "adapter_config.json").exists()
    assert np.abs(their_logits(base_model(merged), ids) - theirs).max() < TOLERANCE


@pytest.mark.parametrize(
    "shape",
    [
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        {"target_modules": ["k_proj", "o_proj", "up_proj"], "use_dora": True, "layers_to_transform": [1]},
    ],
)
def test_an_adapter_that_peft_made_answers_as_in_peft_and_trains_further(service, client, tiny_dir, tmp_path, shape):
    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, **shape)
    theirs = get_peft_model(base_model(tiny_dir), config).eval()
    theirs.save_pretrained(tmp_path / "made")
    imported = service.cli("models", "import-adapter", tmp_path / "made", "--model", TINY, "--suffix", "made")
    name = imported.stdout.strip()
    assert name.startswith(f"ft:{TINY}:") and ":made:" in name
    assert name in [model.id for model in client.models.list()]

    ids = token_ids(tiny_dir, sums(1, start=77)[0])
    answer = client.completions.create(model=name, prompt=ids, max_tokens=8, temperature=0)
    told = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids):]
    assert answer.choices[0].text == AutoTokenizer.from_pretrained(tiny_dir).decode(told, skip_special_tokens=True)

    held_out = sums(4, start=50)
    settings = {"n_epochs": 2, "batch_size": 5, "learning_rate": 1e-2, "prompt_loss_weight": 1}
    job = service.finish(service.create_job(sums(20), name, validation=held_out, **settings).id)
    assert job.model == name
    before = loss_before_training(service, job.fine_tuned_model, tmp_path / "first")
    assert abs(before - mean_loss(theirs, tiny_dir, held_out)) < TOLERANCE
    trained = PeftModel.from_pretrained(base_model(tiny_dir), tmp_path / "first").eval()
    after = mean_loss(trained, tiny_dir, held_out)
    assert after < before - 0.02

    # A checkpoint is a place to start from like any other, also of a job that started elsewhere.
    start = f"{job.fine_tuned_model}:ckpt-step-8"
    job = service.finish(service.create_job(sums(20), start, validation=held_out, **settings).id)
    assert abs(loss_before_training(service, job.fine_tuned_model, tmp_path / "second") - after) < TOLERANCE

    # And every weight may train from there.
    settings |= {"learning_rate": 1e-3, "adapter": {"type": "full"}}
    job = service.finish(service.create_job(sums(20), start, validation=held_out, **settings).id)
    assert abs(loss_before_training(service, job.fine_tuned_model, tmp_path / "full") - after) < TOLERANCE
    whole = base_model(tmp_path / "full").eval()
    assert mean_loss(whole, tiny_dir, held_out) < after
    answer = client.completions.create(model=job.fine_tuned_model, prompt=ids, max_tokens=8, temperature=0)
    told = whole.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids):]
    assert answer.choices[0].text == AutoTokenizer.from_pretrained(tiny_dir).decode(told, skip_special_tokens=True)


def test_an_adapter_on_a_model_that_was_tuned_in_full_gives_our_logits_over_that_model(
    service, client, tiny_dir, tmp_path
):
    rows, held_out = sums(20), sums(4, start=50)
    settings = {"n_epochs": 2, "batch_size": 5, "prompt_loss_weight": 1}
    job = service.create_job(rows, TINY, learning_rate=3e-3, adapter={"type": "full"}, **settings)
    full = service.finish(job.id).fine_tuned_model
    whole = service.weights(full, tmp_path / "whole", weights_format="merged")

    job = service.create_job(
        rows, full, validation=held_out, learning_rate=1e-2, adapter={"type": "lora", "r": 4}, **settings
    )
    job = service.finish(job.id)
    assert job.model == full and job.fine_tuned_model.startswith(f"ft:{TINY}:")
    before = loss_before_training(service, job.fine_tuned_model, tmp_path / "adapter")
    assert abs(before - mean_loss(base_model(whole), tiny_dir, held_out)) < TOLERANCE
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == full
    assert f"tunesmith models weights {full} --format merged" in (tmp_path / "adapter" / "README.md").read_text()

    ids = token_ids(tiny_dir, sums(1, start=77)[0])
    tuned = PeftModel.from_pretrained(base_model(whole), tmp_path / "adapter").eval()
    theirs = their_logits(tuned, ids)
    assert np.abs(our_logits(whole, tmp_path / "adapter", ids) - theirs).max() < TOLERANCE
    elsewhere = PeftModel.from_pretrained(base_model(tiny_dir), tmp_path / "adapter")
    assert np.abs(their_logits(elsewhere, ids) - theirs).max() > 10 * TOLERANCE, "the base model counts"
    merged = service.weights(job.fine_tuned_model, tmp_path / "merged", weights_format="merged")
    assert np.abs(their_logits(base_model(merged), ids) - theirs).max() < TOLERANCE
    check_gguf(service, job.fine_tuned_model, "q8_0", merged, tmp_path)

    def answers_as(name, model):
        answer = client.completions.create(model=name, prompt=ids, max_tokens=8, temperature=0)
        told = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids):]
        assert answer.choices[0].text == AutoTokenizer.from_pretrained(tiny_dir).decode(told, skip_special_tokens=True)

    answers_as(full, base_model(whole).eval())
    # It stands on weights that stay when their model is gone.
    client.models.delete(full)
    answers_as(job.fine_tuned_model, tuned)
    further = service.finish(service.create_job(rows, job.fine_tuned_model, validation=held_out, **settings).id)
    begun = loss_before_training(service, further.fine_tuned_model, tmp_path / "further")
    assert abs(begun - mean_loss(tuned, tiny_dir, held_out)) < TOLERANCE


def test_an_adapter_for_another_model_is_refused_by_the_tensor_that_does_not_fit(service, tiny_dir, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"])
    get_peft_model(base_model(tiny_dir), config).save_pretrained(tmp_path / "made")
    refused = service.cli("models", "import-adapter", tmp_path / "made", "--model", SMOLLM2, check=False)
    assert refused.returncode != 0
    assert "q_proj.lora_A.weight is F32 of shape [4, 64]" in refused.stderr
