#!/usr/bin/env bash
# Stage 2 of the base DiT on a laptop, on the latents of the quickstart's autoencoder:
# 9 frames of 48 x 48, 120 steps more, with the optimizer of stage 1.
#
#   make quickstart && examples/dit/stage2_local.sh
#
# After stage1_local.sh. Run it again after a stop: encoding and training continue.
set -euo pipefail

QUICKSTART=${QUICKSTART:-runs/quickstart}
STAGES=${STAGES:-runs/stages}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

for split in train heldout; do
  torchrun --nproc-per-node 2 tools/preprocess_latents.py \
    --manifest "$QUICKSTART/pans/manifest.jsonl" \
    --split "$split" \
    --fsae "$QUICKSTART/fsae" \
    --text-encoder minilm \
    --text-max-length 8 \
    --buckets 9x48x48 \
    --output "$STAGES/videos48-$split"
done

# Two processes share every layer (tensor parallelism).
torchrun --nproc-per-node 2 pretrain_dit.py \
  --preset dit_quickstart_stage2_video48 \
  --tensor-model-parallel-size 2 \
  --sequence-parallel \
  --data-path "$STAGES/videos48-train" \
  --valid-data-path "$STAGES/videos48-heldout" \
  --eval-iters 1 \
  --save "$STAGES/stage2" \
  --load "$STAGES/stage1" \
  --save-interval 60 \
  --keep-checkpoints 2 \
  --tensorboard-dir "$STAGES/stage2/logs" \
  "$@"
