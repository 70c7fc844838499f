#!/usr/bin/env bash
# The engine on a GPU in one command: bench/gpu.sh
#
# It builds with `--features cuda`, runs the engine's tests on the GPU, and then times a LoRA step
# (r = 16 on every projection, one sequence of 4096) of a random model of Llama 3.1 8B's shape
# beside PyTorch + PEFT on the same card, both as they come and with gradient checkpointing. It prints
# the card's name, each side's figures, and lines `ratio NAME VALUE`, the engine's figure over the
# peer's, each at its faster way.
#
# `DEVICE=cpu SHAPE=tiny SEQUENCE=128 bench/gpu.sh` tries it on the CPU with a tiny shape.
#
# Needs: an NVIDIA driver, the CUDA toolkit (headers, NVRTC, cuBLAS), Rust, Python 3; network access
# for the build (which fetches an LLVM) and for PyTorch, unless PYTHON names a Python that has torch,
# transformers and peft; 20 GB of disk, and for 8B 80 GB of GPU memory.
#
# Settings: DEVICE (cuda), SHAPE (8b or tiny), SEQUENCE (4096), STEPS (8), PYTHON, TESTS (1; 0 leaves
# the tests out), CARGO_FEATURES (cuda), MODEL_DIR (a temporary one).
set -euo pipefail
cd "$(dirname "$0")/.."

device=${DEVICE:-cuda} shape=${SHAPE:-8b} sequence=${SEQUENCE:-4096} steps=${STEPS:-8}
# Tokens a second of an 8B LoRA step at sequence 4096 on one H100, as NeMo Automodel's page has it.
published=12473

features=()
if [[ $device == cuda* ]]; then
  features=(--features "${CARGO_FEATURES:-cuda}")
  command -v nvidia-smi >/dev/null || { echo "bench/gpu.sh: nvidia-smi is missing: no NVIDIA driver here; DEVICE=cpu SHAPE=tiny tries the script without one" >&2; exit 1; }
  gpu_index=${device#cuda}
  gpu_index=${gpu_index#:}
  gpu_index=${gpu_index:-0}
  echo "card: $(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader -i "$gpu_index")"
else
  echo "card: none; this is the CPU, to try the script"
fi

work=$(mktemp -d)
sampler=
cleanup() {
  [ -z "$sampler" ] || kill "$sampler" 2>/dev/null || true
  rm -rf "$work"
}
trap cleanup EXIT
model=${MODEL_DIR:-$work/model}

if [ "${TESTS:-1}" = 1 ]; then
  scripts/test-setup.sh >/dev/null
  skip=()
  if [[ $device == cuda* ]] && [ "$(nvidia-smi -L | wc -l)" -lt 2 ]; then
    echo "tests: one GPU here, so the run on two is left out"
    skip=(--skip on_two_devices)
  fi
  # The unit tests of portable forms, whole models against PyTorch's numbers, and training runs.
  TUNESMITH_TEST_DEVICE=$device cargo test --release -p tunesmith-engine "${features[@]}" \
    --lib --test model --test trainer -- --test-threads 1 "${skip[@]}"
  echo "tests: passed on $device"
fi

cargo build --release -p tunesmith-engine "${features[@]}" --example random_model --example gpu_step
target=${CARGO_TARGET_DIR:-target}/release/examples
if [ ! -f "$model/model.safetensors" ]; then
  echo "Writing a random model of shape $shape ..."
  "$target/random_model" "$model" "$shape"
fi

python=${PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv "$work/venv"
  "$work/venv/bin/pip" install --quiet --disable-pip-version-check torch transformers peft
  python=$work/venv/bin/python
fi
export HF_HUB_OFFLINE=1

# run NAME COMMAND…: the command's lines of JSON go to $work/NAME.json; the card's greatest memory in
# use meanwhile, in MiB, to $work/NAME.mib. It is the same measure for both sides.
run() {
  local name=$1
  shift
  : >"$work/$name.samples"
  if [[ $device == cuda* ]]; then
    nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -i "$gpu_index" -lms 200 >"$work/$name.samples" &
    sampler=$!
  fi
  local status=0
  "$@" >"$work/$name.json" || status=$?
  if [ -n "$sampler" ]; then
    kill "$sampler" 2>/dev/null || true
    wait "$sampler" 2>/dev/null || true
    sampler=
  fi
  sort -n "$work/$name.samples" | tail -1 >"$work/$name.mib"
  [ "$status" = 0 ] || echo "$name ended with $status" >&2
}

for way in plain checkpointing; do
  run "engine-$way" "$target/gpu_step" "$model" "$device" "$sequence" "$steps" "$way"
  run "peer-$way" "$python" bench/gpu_peer.py "$model" "$device" "$sequence" "$steps" "$way"
done

"$python" - "$work" "$published" "$shape" "$sequence" "$device" <<'PY'
import json
import sys
from pathlib import Path

work, published, shape, sequence, device = Path(sys.argv[1]), float(sys.argv[2]), *sys.argv[3:]


def result(name):
    """What a side printed, with the card's memory beside it; None when it printed nothing."""
    lines = [line for line in (work / f"{name}.json").read_text().splitlines() if line.startswith("{")]
    memory = (work / f"{name}.mib").read_text().strip()
    figures = json.loads(lines[-1]) | {"card_mib": float(memory) if memory else None} if lines else None
    print(f"{name}:", json.dumps(figures))
    return figures


def fastest(side):
    ways = [result(f"{side}-{way}") for way in ("plain", "checkpointing")]
    ways = [way for way in ways if way and way["tokens_per_second"]]
    return max(ways, key=lambda way: way["tokens_per_second"], default=None)


engine, peer = fastest("engine"), fastest("peer")
if engine is None or peer is None:
    sys.exit("no ratio: a side has no figure")
print(f"ratio tokens_per_second {engine['tokens_per_second'] / peer['tokens_per_second']:.3f}")
if engine["card_mib"] and peer["card_mib"]:
    print(f"ratio card_memory {engine['card_mib'] / peer['card_mib']:.3f}")
if (shape, sequence) == ("8b", "4096"):
    print(f"ratio tokens_per_second_over_published_h100 {engine['tokens_per_second'] / published:.3f}")
PY
