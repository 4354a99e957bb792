#!/usr/bin/env bash
# Convert a Wan2.1-I2V checkpoint to initial weights of FSVideo's base DiT: wan_start_local.sh WAN_FOLDER OUTPUT
# One process with the memory of one tensor suffices. Next: START=OUTPUT sbatch examples/dit/stage1_slurm.sh
set -euo pipefail

WAN=${1:-Wan2.1-I2V-14B-720P}
OUTPUT=${2:-checkpoints/wan_start}

python tools/convert_checkpoint.py \
    --input "$WAN" \
    --to-preset dit_14b \
    --layer-memory-init 0.99 \
    --dtype bf16 \
    --output "$OUTPUT" \
    --output-format distributed \
    "${@:3}"
