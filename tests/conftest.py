import os
import shutil
import subprocess
from pathlib import Path

# Nothing here may reach for a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
from harness import ROOT, SMOLLM2_DIR, TUNESMITH, Parts, Up  # noqa: E402

TINY = "tiny"
SMOLLM2 = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="session", autouse=True)
def program():
    assert TUNESMITH.exists(), f"{TUNESMITH} is missing: `make test` builds it"
    assert SMOLLM2_DIR.exists(), f"{SMOLLM2_DIR} is missing: `make test` makes it"


def random_model(directory, config):
    """A model of random weights with SmolLM2's tokenizer: quick, and real in every part."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (SMOLLM2_DIR / name).exists():
            shutil.copy(SMOLLM2_DIR / name, directory)
    return directory


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    """A Llama of two layers."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return random_model(tmp_path_factory.mktemp("models") / TINY, config)


@pytest.fixture(scope="session")
def up(tmp_path_factory, tiny_dir):
    """One `tunesmith up` with both models, shared by the tests that leave it as it is."""
    with Up(tmp_path_factory.mktemp("up")) as server:
        server.import_model(tiny_dir, TINY)
        server.import_model(SMOLLM2_DIR, SMOLLM2)
        yield server
        assert server.process.stop() == 0, server.process.output()[-4000:]


@pytest.fixture(scope="session")
def clients():
    """Where programs of others lie that are sent to a server (scripts/test-clients.sh)."""
    done = subprocess.run([ROOT / "scripts/test-clients.sh"], check=True, stdout=subprocess.PIPE, text=True)
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def service(up):
    return up.service


@pytest.fixture(scope="session")
def client(service):
    """The official SDK, unchanged but for base_url and key."""
    return service.sdk


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_dir):
    """The parts run apart, without a worker as yet."""
    with Parts(tmp_path_factory.mktemp("parts")) as running:
        running.run("models", "import", tiny_dir, "--name", TINY)
        yield running


@pytest.fixture(scope="session")
def inside(tmp_path_factory, tiny_dir):
    """A server whose operator lets webhooks reach this machine; a test may start it again."""
    with Up(tmp_path_factory.mktemp("inside"), "--webhook-range", "127.0.0.0/8") as server:
        server.import_model(tiny_dir, TINY)
        yield server
