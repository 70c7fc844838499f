#!/usr/bin/env bash
# What the tests need beyond the repository: the real models as Hugging Face directories under
# target/test-models, made by our own importer, and a Python environment with the OpenAI SDK and
# PEFT, kept in the cache. Prints the environment's python, and nothing else, on standard output.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/test-model.sh SmolLM2-135M-Instruct scripts/fetch-smollm2.sh
scripts/test-model.sh gemma-3-270m scripts/fetch-gemma3.sh

exec scripts/test-python.sh
