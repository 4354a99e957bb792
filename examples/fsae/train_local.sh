#!/usr/bin/env bash
# Train one phase of the video autoencoder on one machine, one process per GPU (NUM_PROCESSES sets another number).
#
#   VIDEO_DIR=videos VGG16=vgg16_lpips.safetensors examples/fsae/train_local.sh PHASE [flags of pretrain_fsae.py]
#
# PHASE  trains                                                              begins with
# 1      L1 and LPIPS on images and 17-frame clips of about 256 x 256        INIT, or random weights
# 2      + the discriminator, images and 61-frame clips of 512 x 512         phase 1
# 3      mixed resolution and length, up to 121 frames of 1024 x 1024        phase 2
# 4      + Video VF: the latents are aligned with DINOv2 (folder DINOV2)     phase 3
# 5      the Standard decoder; the encoder is frozen                         phase 4
# 6      the Lite decoder; the encoder is frozen                             phase 5
#
# A phase begins with the newest checkpoint in INIT, which is the previous phase's SAVE folder unless you name another.
# The paper's phase 1 begins with dc-ae-f32c32-sana-1.0: convert it with tools/convert_fsae.py and name the result.
# VGG16 holds the weights of the perceptual loss (docs/fsae.md). The presets share the frames of one clip among 2 processes
# (phase 2) or 4 (phases 3 to 6); --context-parallel-size changes that, and must divide the number of processes.
# Run the script again after a stop: it continues from the newest checkpoint.
set -euo pipefail

PHASE=${1:?usage: examples/fsae/train_local.sh PHASE [flags of pretrain_fsae.py]}
shift
VIDEO_DIR=${VIDEO_DIR:-videos}
VGG16=${VGG16:-vgg16_lpips.safetensors}
DINOV2=${DINOV2:-dinov2-large}
SAVE=${SAVE:-runs/fsae_phase$PHASE}
NUM_PROCESSES=${NUM_PROCESSES:-$(python -c "import torch; print(max(1, torch.cuda.device_count()))")}

case $PHASE in
  1) batch=16 images=32 ;;
  2) batch=8 images=16 ;;
  3 | 4 | 5 | 6) batch=8 images=8 ;;
  *) echo "PHASE is 1, 2, 3, 4, 5 or 6, got $PHASE" >&2; exit 64 ;;
esac
if [ "$PHASE" -gt 1 ]; then INIT=${INIT:-runs/fsae_phase$((PHASE - 1))}; fi
start=()
if [ -n "${INIT:-}" ]; then start+=(--init-from "$INIT"); fi
if [ "$PHASE" = 4 ]; then start+=(--vf-encoder-path "$DINOV2"); fi

torchrun --nproc-per-node "$NUM_PROCESSES" pretrain_fsae.py \
  --preset "fsae_phase$PHASE" \
  --video-dir "$VIDEO_DIR" \
  --holdout-every 50 \
  --perceptual-trunk-path "$VGG16" \
  "${start[@]}" \
  --micro-batch-size 1 \
  --global-batch-size "$batch" \
  --image-batch-size "$images" \
  --eval-interval 2000 \
  --eval-iters 1 \
  --save "$SAVE" \
  --load "$SAVE" \
  --save-interval 2000 \
  --keep-checkpoints 3 \
  --tensorboard-dir "$SAVE/logs" \
  "$@"
