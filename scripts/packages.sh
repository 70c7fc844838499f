#!/usr/bin/env bash
# Makes sure that the system has what `make PURPOSE` needs: scripts/packages.sh demo|test.
# As root on Debian or Ubuntu it installs what is missing; elsewhere it says in one line what to
# install, and ends with an error.
set -euo pipefail

purpose=${1:?usage: scripts/packages.sh demo|test}
missing=()

# need PACKAGE COMMAND…: the package is missing when the command fails.
need() {
  local package=$1
  shift
  "$@" >/dev/null 2>&1 || missing+=("$package")
}

has_postgresql() {
  [ -x "${TUNESMITH_PG_BIN:-}/initdb" ] || command -v initdb || compgen -G '/usr/lib/postgresql/*/bin/initdb'
}

if ! command -v cargo >/dev/null; then
  echo "Rust is missing: install it with rustup (https://rustup.rs), then run this again." >&2
  exit 1
fi
need build-essential cc --version
need python3 python3 --version
need python3-pip python3 -m pip --version
need postgresql has_postgresql
if [ "$purpose" = test ]; then
  need python3-venv python3 -c 'import ensurepip, venv'
  need chromium chromium --version
  need nodejs node --version
  need npm npm --version
fi

[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "Installing ${missing[*]} (a minute or two) ..."
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
else
  echo "Missing on this machine: install ${missing[*]} (Debian's names, e.g. 'sudo apt-get install ${missing[*]}'), then run this again." >&2
  exit 1
fi
