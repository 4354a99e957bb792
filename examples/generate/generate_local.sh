#!/usr/bin/env bash
# Generate one video with a trained DiT: generate_local.sh CHECKPOINT IMAGE PROMPT OUT.mp4
set -euo pipefail

LOAD=${1:-runs/quickstart/dit}
IMAGE=${2:-runs/quickstart/first_frames/00_left.png}
PROMPT=${3:-pan left}
OUT=${4:-runs/generated/out.mp4}

python tools/generate.py \
    --load "$LOAD" \
    --image "$IMAGE" \
    --prompt "$PROMPT" \
    --out "$OUT" \
    --num-inference-steps 6 \
    "${@:5}"
