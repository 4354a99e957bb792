#!/usr/bin/env bash
# Supervised fine-tuning (SFT) of the base DiT on a laptop, on the latents of the quickstart's autoencoder:
# 40 steps on a chosen part of stage 3's samples, from its weights.
#
#   make quickstart && examples/dit/sft_local.sh
#
# After stage3_local.sh. Run it again after a stop: encoding and training continue.
set -euo pipefail

QUICKSTART=${QUICKSTART:-runs/quickstart}
STAGES=${STAGES:-runs/stages}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# SFT uses the best samples by some measure. Here they are those whose caption is a pan to the left or right.
python tools/list_samples.py --data-path "$STAGES/videos80-train" > "$STAGES/samples.txt"
grep -E '"caption": "pan (left|right)"' "$STAGES/samples.txt" > "$STAGES/sft.txt"

# Two processes share every layer (tensor parallelism).
torchrun --nproc-per-node 2 pretrain_dit.py \
  --preset dit_quickstart_sft \
  --tensor-model-parallel-size 2 \
  --sequence-parallel \
  --data-path "$STAGES/videos80-train" \
  --valid-data-path "$STAGES/videos80-heldout" \
  --eval-iters 1 \
  --save "$STAGES/sft" \
  --load "$STAGES/stage3" \
  --sample-list "$STAGES/sft.txt" \
  --save-interval 20 \
  --keep-checkpoints 2 \
  --tensorboard-dir "$STAGES/sft/logs" \
  "$@"
