#!/usr/bin/env bash
# Convert a run's newest checkpoint to a release folder, which runs no code: release_local.sh SAVE_FOLDER OUTPUT
set -euo pipefail

RUN=${1:-runs/quickstart/dit}
OUTPUT=${2:-releases/dit}

python tools/convert_checkpoint.py \
    --input "$RUN" \
    --output "$OUTPUT" \
    --output-format release \
    --max-shard-size 4GB \
    "${@:3}"
