#!/usr/bin/env bash
# Prints one sha256 over the dashboard's sources. `make dashboard` writes it beside the built
# files, and a test compares the two, so that the committed build cannot fall behind.
set -euo pipefail
cd "$(dirname "$0")/../dashboard"
LC_ALL=C
export LC_ALL
sha256sum index.html package.json package-lock.json tsconfig.json vite.config.ts src/* | sha256sum | cut -d' ' -f1
