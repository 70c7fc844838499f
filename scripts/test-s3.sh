#!/usr/bin/env bash
# A server that speaks S3 and checks every signature, for the tests of object storage (nanio), kept in
# the cache. Prints the program's path, and nothing else, on standard output. Several may run at once:
# one installs, and the others wait for it.
set -euo pipefail

package=nanio==0.1.7
hash=$(echo "$package $(python3 --version)" | sha256sum | cut -c1-12)
home=${XDG_CACHE_HOME:-$HOME/.cache}/tunesmith/s3-$hash
mkdir -p "$(dirname "$home")"
exec 9>"$home.lock"
flock 9
if [ ! -f "$home/complete" ]; then
  rm -rf "$home"
  python3 -m venv "$home"
  "$home/bin/pip" install --quiet --disable-pip-version-check --no-compile "$package" >&2
  touch "$home/complete"
fi
echo "$home/bin/nanio"
