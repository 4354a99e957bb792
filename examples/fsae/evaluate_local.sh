#!/usr/bin/env bash
# Tables 1 and 2 of the paper for one autoencoder on one machine, one process per GPU (or NUM_PROCESSES processes).
#
#   LOAD=runs/fsae_phase5 VIDEO_DIR=inter4k WAN=wan2.1 LTX=ltx-video HUNYUAN=hunyuanvideo examples/fsae/evaluate_local.sh
#
# VIDEO_DIR: videos that were not trained on, 1000 of them for the paper's protocol. WAN, LTX, HUNYUAN: local folders of
# diffusers' VAEs, or of pipelines that hold them. VGG16 and I3D: the judging networks' weights; docs/evaluation.md says
# where to get them.
set -euo pipefail

LOAD=${LOAD:-runs/fsae_phase5}
VIDEO_DIR=${VIDEO_DIR:-inter4k}
OUT=${OUT:-runs/fsae_evaluation}
NUM_POINTS=${NUM_POINTS:-5000}
VGG16=${VGG16:-vgg16_lpips.safetensors}
I3D=${I3D:-rgb_imagenet.pt}
WAN=${WAN:-wan2.1}
LTX=${LTX:-ltx-video}
HUNYUAN=${HUNYUAN:-hunyuanvideo}
NUM_PROCESSES=${NUM_PROCESSES:-$(python -c "import torch; print(max(1, torch.cuda.device_count()))")}

torchrun --nproc-per-node "$NUM_PROCESSES" tools/evaluate_fsae.py \
  --load "$LOAD" \
  --video-dir "$VIDEO_DIR" \
  --sampling videos \
  --num-clips 1000 \
  --num-frames 17 \
  --resolution 256 \
  --short-side 256 \
  --lpips-path "$VGG16" \
  --i3d-path "$I3D" \
  --compare "wan:$WAN" "ltx:$LTX" "hunyuan:$HUNYUAN" \
  --out "$OUT/table2.json" \
  "$@"

torchrun --nproc-per-node "$NUM_PROCESSES" tools/intrinsic_dimension.py \
  --load "$LOAD" \
  --video-dir "$VIDEO_DIR" \
  --num-points "$NUM_POINTS" \
  --out "$OUT/table1.json"
