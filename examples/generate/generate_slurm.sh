#!/usr/bin/env bash
#SBATCH --job-name=fsvideo-generate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --time=01:00:00
# Generate every request of a JSONL file (image, prompt, out, seed a line) with the DiT cut over four GPUs.
set -euo pipefail

LOAD=${LOAD:-checkpoints/dit_14b}
REQUESTS=${REQUESTS:-requests.jsonl}

srun torchrun --nproc-per-node 4 tools/generate.py \
    --load "$LOAD" \
    --requests "$REQUESTS" \
    --tensor-model-parallel-size 4 --sequence-parallel \
    --num-inference-steps 30 \
    --guidance-scale 5.0
