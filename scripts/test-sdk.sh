#!/usr/bin/env bash
# The official SDK's own tests of our part of the API, unchanged, against a running server. They
# come from its source distribution, which is fetched once; so do the packages that they need.
set -euo pipefail
cd "$(dirname "$0")/.."

version=3.57.0
requirements=("openai[aiohttp]==$version" "pytest==9.2.0" "pytest-asyncio==1.4.0" "rich==14.2.0" "trio==0.33.0")
digest=$(printf '%s\n' "${requirements[@]}" | sha256sum | cut -c1-12)
home=${XDG_CACHE_HOME:-$HOME/.cache}/tunesmith/sdk-$digest
if [ ! -e "$home/ready" ]; then
    rm -rf "$home"
    mkdir -p "$home"
    python3 -m venv "$home/venv"
    "$home/venv/bin/pip" install --quiet "${requirements[@]}"
    "$home/venv/bin/pip" download --quiet --no-deps --no-binary :all: --dest "$home" "openai==$version"
    tar -xzf "$home/openai-$version.tar.gz" -C "$home"
    touch "$home/ready"
fi

root=$PWD
scripts/test-model.sh SmolLM2-135M-Instruct scripts/fetch-smollm2.sh
cd "$home/openai-$version"
ours=(fine_tuning test_files.py test_uploads.py uploads test_models.py test_batches.py webhooks
    test_completions.py chat)
# `-o addopts=`: the distribution's own options are for its own runner.
PYTHONPATH="$root/tests/sdk" exec "$home/venv/bin/python" -m pytest -p fixture_mode -o addopts= -q \
    --tb=short -p no:cacheprovider "${ours[@]/#/tests/api_resources/}" "$@"
