#!/usr/bin/env bash
# Encode a folder of videos to a latent dataset on one machine, one process per GPU (NUM_PROCESSES sets another number).
#
#   VIDEO_DIR=videos FSAE=runs/fsae OUTPUT=data/latents examples/preprocess/preprocess_local.sh
#
# Run it again after a stop: finished shards are kept. Captions lie beside the videos: clip.mp4, clip.txt.
set -euo pipefail

VIDEO_DIR=${VIDEO_DIR:-videos}
FSAE=${FSAE:-runs/fsae}
OUTPUT=${OUTPUT:-data/latents}
TEXT_ENCODER=${TEXT_ENCODER:-umt5:google/umt5-xxl}
IMAGE_ENCODER=${IMAGE_ENCODER:-clip:laion/CLIP-ViT-H-14-laion2B-s32B-b79K}
NUM_PROCESSES=${NUM_PROCESSES:-$(python -c "import torch; print(max(1, torch.cuda.device_count()))")}

torchrun --nproc-per-node "$NUM_PROCESSES" tools/preprocess_latents.py \
  --video-dir "$VIDEO_DIR" \
  --fsae "$FSAE" \
  --text-encoder "$TEXT_ENCODER" \
  --image-encoder "$IMAGE_ENCODER" \
  --allow-download \
  --buckets 121x704x1280 121x1280x704 121x1024x1024 \
  --fps 24 \
  --encode-batch-size 1 \
  --max-bad-fraction 0.01 \
  --output "$OUTPUT" \
  "$@"
