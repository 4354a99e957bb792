#!/usr/bin/env bash
# Train the video autoencoder on one machine, one process per GPU (or NUM_PROCESSES on a CPU).
# Phase 4: + Video VF, the latents aligned with DINOv2.
#
#   VIDEO_DIR=videos VGG16=vgg16_lpips.safetensors DINOV2=dinov2-large examples/fsae/phase4_local.sh
#
# Run it again after a stop: it continues from the newest checkpoint. VGG16 holds the perceptual loss's weights
# (docs/fsae.md says which).
#
# PREVIOUS is phase 3's SAVE folder: its newest checkpoint is where this phase begins.
# DINOV2 is a folder with DINOv2-large as transformers saves it.
set -euo pipefail

VIDEO_DIR=${VIDEO_DIR:-videos}
VGG16=${VGG16:-vgg16_lpips.safetensors}
DINOV2=${DINOV2:-dinov2-large}
PREVIOUS=${PREVIOUS:-runs/fsae_phase3}
SAVE=${SAVE:-runs/fsae_phase4}
NUM_PROCESSES=${NUM_PROCESSES:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
# GPUs that share the frames of one clip, 4 for 121 x 1024 x 1024 on 80 GB; it must divide NUM_PROCESSES.
CONTEXT_PARALLEL=${CONTEXT_PARALLEL:-4}

torchrun --nproc-per-node "$((NUM_PROCESSES > 0 ? NUM_PROCESSES : 1))" pretrain_fsae.py \
  --preset fsae_phase4 \
  --context-parallel-size "$CONTEXT_PARALLEL" \
  --video-dir "$VIDEO_DIR" \
  --holdout-every 50 \
  --perceptual-trunk-path "$VGG16" \
  --vf-encoder-path "$DINOV2" \
  --init-from "$PREVIOUS" \
  --micro-batch-size 1 \
  --global-batch-size 8 \
  --image-batch-size 8 \
  --eval-interval 2000 \
  --eval-iters 1 \
  --save "$SAVE" \
  --load "$SAVE" \
  --save-interval 2000 \
  --keep-checkpoints 3 \
  --tensorboard-dir "$SAVE/logs"
