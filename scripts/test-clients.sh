#!/usr/bin/env bash
# Programs of others that the tests send to a running server, kept in the cache: OpenAI's SDK for
# Node, the last of its Python packages with the old command line, and schemathesis; and llama.cpp, which
# opens what a server gives out. Prints their directory, and nothing else, on standard output. Several
# may run at once: one installs, and the others wait for it.
set -euo pipefail

node=openai@6.49.0
python=(openai==2.34.0 schemathesis==4.32.5 xllamacpp==2026.10.11549)
hash=$(echo "$node ${python[*]} $(python3 --version)" | sha256sum | cut -c1-12)
home=${XDG_CACHE_HOME:-$HOME/.cache}/tunesmith/clients-$hash
mkdir -p "$(dirname "$home")"
exec 9>"$home.lock"
flock 9
if [ ! -f "$home/complete" ]; then
  rm -rf "$home"
  mkdir "$home"
  npm install --prefix "$home" --no-audit --no-fund --silent "$node" >&2
  python3 -m venv "$home/python"
  "$home/python/bin/pip" install --quiet --disable-pip-version-check --no-compile "${python[@]}" >&2
  touch "$home/complete"
fi
echo "$home"
