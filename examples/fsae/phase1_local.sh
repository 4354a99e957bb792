#!/usr/bin/env bash
# Train the video autoencoder on one machine, one process per GPU (or NUM_PROCESSES on a CPU).
# Phase 1: L1 and LPIPS on images and 17-frame clips of about 256 x 256.
#
#   VIDEO_DIR=videos VGG16=vgg16_lpips.safetensors examples/fsae/phase1_local.sh
#
# Run it again after a stop: it continues from the newest checkpoint. VGG16 holds the perceptual loss's weights
# (docs/fsae.md says which).
set -euo pipefail

VIDEO_DIR=${VIDEO_DIR:-videos}
VGG16=${VGG16:-vgg16_lpips.safetensors}
SAVE=${SAVE:-runs/fsae_phase1}
NUM_PROCESSES=${NUM_PROCESSES:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}

torchrun --nproc-per-node "$((NUM_PROCESSES > 0 ? NUM_PROCESSES : 1))" pretrain_fsae.py \
  --preset fsae_phase1 \
  --video-dir "$VIDEO_DIR" \
  --holdout-every 50 \
  --perceptual-trunk-path "$VGG16" \
  --micro-batch-size 1 \
  --global-batch-size 16 \
  --image-batch-size 32 \
  --eval-interval 2000 \
  --eval-iters 1 \
  --save "$SAVE" \
  --load "$SAVE" \
  --save-interval 2000 \
  --keep-checkpoints 3 \
  --tensorboard-dir "$SAVE/logs"
