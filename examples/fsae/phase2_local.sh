#!/usr/bin/env bash
# Train the video autoencoder on one machine, one process per GPU (or NUM_PROCESSES on a CPU).
# Phase 2: + the discriminator, images and 61-frame clips of about 512 x 512.
#
#   VIDEO_DIR=videos VGG16=vgg16_lpips.safetensors examples/fsae/phase2_local.sh
#
# Run it again after a stop: it continues from the newest checkpoint. VGG16 holds the perceptual loss's weights
# (docs/fsae.md says which).
#
# PREVIOUS is phase 1's SAVE folder: its newest checkpoint is where this phase begins.
set -euo pipefail

VIDEO_DIR=${VIDEO_DIR:-videos}
VGG16=${VGG16:-vgg16_lpips.safetensors}
PREVIOUS=${PREVIOUS:-runs/fsae_phase1}
SAVE=${SAVE:-runs/fsae_phase2}
NUM_PROCESSES=${NUM_PROCESSES:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
# GPUs that share the frames of one clip, 2 for 61 x 512 x 512 on 80 GB; it must divide NUM_PROCESSES.
CONTEXT_PARALLEL=${CONTEXT_PARALLEL:-2}

torchrun --nproc-per-node "$((NUM_PROCESSES > 0 ? NUM_PROCESSES : 1))" pretrain_fsae.py \
  --preset fsae_phase2 \
  --context-parallel-size "$CONTEXT_PARALLEL" \
  --video-dir "$VIDEO_DIR" \
  --holdout-every 50 \
  --perceptual-trunk-path "$VGG16" \
  --init-from "$PREVIOUS" \
  --micro-batch-size 1 \
  --global-batch-size 8 \
  --image-batch-size 16 \
  --eval-interval 2000 \
  --eval-iters 1 \
  --save "$SAVE" \
  --load "$SAVE" \
  --save-interval 2000 \
  --keep-checkpoints 3 \
  --tensorboard-dir "$SAVE/logs"
