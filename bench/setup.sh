#!/usr/bin/env bash
# What the benchmarks need beyond a release build: the model as a Hugging Face directory, and the
# peers in virtual environments of their own, kept in the cache (6 GB each for PyTorch's, a few
# minutes).
# Prints one environment a line, `NAME PYTHON`, and nothing else, on standard output. An environment
# that cannot be installed is reported on standard error and left out: its lines then say `not run`.
set -euo pipefail
cd "$(dirname "$0")/.."

# One at a time: a second one would empty an environment that the first is still filling.
mkdir -p bench/out
exec 9>bench/out/setup.lock
flock 9

scripts/test-model.sh SmolLM2-135M-Instruct scripts/fetch-smollm2.sh release

cache=${XDG_CACHE_HOME:-$HOME/.cache}/tunesmith
# environment NAME REQUIREMENTS
environment() {
  local name=$1 requirements=bench/peers/$2 hash venv
  hash=$(cat "$requirements" <(python3 --version) | sha256sum | cut -c1-12)
  venv=$cache/bench-$name-$hash
  if [ ! -f "$venv/complete" ]; then
    echo "Installing the peers of $requirements ..." >&2
    rm -rf "$venv"
    python3 -m venv "$venv"
    if ! "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$requirements" >&2; then
      echo "$requirements cannot be installed here: what needs it is left out." >&2
      rm -rf "$venv"
      return
    fi
    touch "$venv/complete"
  fi
  echo "$name $venv/bin/python"
}

environment torch requirements.txt
environment unsloth requirements-unsloth.txt
environment llama requirements-llama.txt

shim=bench/out/mkl_intel.so
cc -O2 -shared -fPIC -o "$shim" bench/peers/mkl_intel.c >&2
