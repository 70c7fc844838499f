#!/usr/bin/env bash
# What the tests need beyond the repository: the real models as Hugging Face directories under
# target/test-models, made by our own importer, and a Python environment with the OpenAI SDK and
# PEFT, kept in the cache. Prints the environment's python, and nothing else, on standard output.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/test-model.sh SmolLM2-135M-Instruct scripts/fetch-smollm2.sh
scripts/test-model.sh gemma-3-270m scripts/fetch-gemma3.sh

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
