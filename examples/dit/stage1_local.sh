#!/usr/bin/env bash
# Stage 1 of the base DiT on a laptop, on the latents of the quickstart's autoencoder:
# text to image on 48 x 48 pixels, 60 steps.
#
#   make quickstart && examples/dit/stage1_local.sh
#
# Run it again after a stop: encoding and training continue.
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
    --buckets 1x48x48 \
    --output "$STAGES/images48-$split"
done

# Two processes share every layer (tensor parallelism).
torchrun --nproc-per-node 2 pretrain_dit.py \
  --preset dit_quickstart_stage1_image48 \
  --tensor-model-parallel-size 2 \
  --sequence-parallel \
  --data-path "$STAGES/images48-train" \
  --valid-data-path "$STAGES/images48-heldout" \
  --eval-iters 1 \
  --save "$STAGES/stage1" \
  --load "$STAGES/stage1" \
  --save-interval 30 \
  --keep-checkpoints 2 \
  --tensorboard-dir "$STAGES/stage1/logs" \
  "$@"
