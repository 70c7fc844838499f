#!/usr/bin/env bash
# What the tests need beyond the repository: the real model as a Hugging Face directory under
# target/test-models, made by our own importer, and a Python environment with the OpenAI SDK and
# PEFT, kept in the cache. Prints the environment's python, and nothing else, on standard output.
set -euo pipefail
cd "$(dirname "$0")/.."

model=target/test-models/SmolLM2-135M-Instruct
if [ ! -f "$model/model.safetensors" ]; then
  echo "Importing SmolLM2-135M-Instruct for the tests ..." >&2
  gguf=$(scripts/fetch-smollm2.sh)
  rm -rf "$model.part"
  mkdir -p "$(dirname "$model")"
  # The tests' own selection of packages, so that nothing is built twice with other features.
  cargo build --quiet --workspace --bins --examples >&2
  target/debug/examples/import_model "$gguf" "$model.part" >&2
  rm -rf "$model"
  mv "$model.part" "$model"
fi

requirements=tests/requirements.txt
hash=$(cat "$requirements" <(python3 --version) | sha256sum | cut -c1-12)
venv=${XDG_CACHE_HOME:-$HOME/.cache}/tunesmith/test-venv-$hash
if [ ! -f "$venv/complete" ]; then
  echo "Installing the tests' Python packages (5.7 GB with PyTorch, about two minutes) ..." >&2
  rm -rf "$venv"
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$requirements" >&2
  touch "$venv/complete"
fi
echo "$venv/bin/python"
