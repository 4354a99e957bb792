#!/usr/bin/env bash
#SBATCH --job-name=fsvideo-generate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --time=01:00:00
# Generate every request of a JSONL file (image, prompt, out, seed a line) with the DiT split over four GPUs. Give the
# encoders of the training: no file is loaded from a place that only the checkpoint names.
set -euo pipefail

LOAD=${LOAD:-checkpoints/dit_14b}
REQUESTS=${REQUESTS:-requests.jsonl}
TEXT_ENCODER=${TEXT_ENCODER:-umt5:google/umt5-xxl}
IMAGE_ENCODER=${IMAGE_ENCODER:-clip:laion/CLIP-ViT-H-14-laion2B-s32B-b79K}

srun torchrun --nproc-per-node 4 tools/generate.py \
    --load "$LOAD" \
    --requests "$REQUESTS" \
    --text-encoder "$TEXT_ENCODER" --image-encoder "$IMAGE_ENCODER" --allow-download \
    --tensor-model-parallel-size 4 --sequence-parallel \
    --num-inference-steps 30 \
    --guidance-scale 5.0
