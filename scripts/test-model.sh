#!/usr/bin/env bash
# test-model.sh NAME FETCH [PROFILE]: makes target/test-models/NAME, a Hugging Face directory, of the
# GGUF whose path the script FETCH prints, unless it is there. It is made by our own importer, built
# in PROFILE: dev, as the tests build it, or release.
set -euo pipefail
cd "$(dirname "$0")/.."

name=$1 fetch=$2 profile=${3:-dev}
model=target/test-models/$name
if [ -f "$model/model.safetensors" ]; then
  exit
fi
echo "Importing $name ..." >&2
gguf=$("$fetch")
case $profile in
  # The tests' own selection of packages, so that nothing is built twice with other features.
  dev) what=(--workspace --bins --examples) programs=${CARGO_TARGET_DIR:-target}/debug ;;
  release) what=(--release --example import_model) programs=${CARGO_TARGET_DIR:-target}/release ;;
esac
cargo build --quiet "${what[@]}" >&2
rm -rf "$model.part"
mkdir -p "$(dirname "$model")"
"$programs/examples/import_model" "$gguf" "$model.part" >&2
rm -rf "$model"
mv "$model.part" "$model"
