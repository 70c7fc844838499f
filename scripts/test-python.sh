#!/usr/bin/env bash
# The Python environment of the tests, with the OpenAI SDK and PEFT, kept in the cache. Prints its
# python, and nothing else, on standard output. Several may run at once: one installs, and the
# others wait for it.
set -euo pipefail
cd "$(dirname "$0")/.."

requirements=tests/requirements.txt
hash=$(cat "$requirements" <(python3 --version) | sha256sum | cut -c1-12)
venv=${XDG_CACHE_HOME:-$HOME/.cache}/tunesmith/test-venv-$hash
mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock"
flock 9
if [ ! -f "$venv/complete" ]; then
  echo "Installing the tests' Python packages (5.7 GB with PyTorch, about two minutes) ..." >&2
  rm -rf "$venv"
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check --no-cache-dir -r "$requirements" >&2
  touch "$venv/complete"
fi
echo "$venv/bin/python"
