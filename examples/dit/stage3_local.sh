#!/usr/bin/env bash
# Stage 3 of the base DiT on a laptop, on the latents of the quickstart's autoencoder:
# 9 frames of 80 x 80, 120 steps more, with the optimizer of stage 2.
#
#   make quickstart && examples/dit/stage3_local.sh
#
# After stage2_local.sh. Run it again after a stop: encoding and training continue.
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
    --buckets 9x80x80 \
    --output "$STAGES/videos80-$split"
done

# Two processes share every layer (tensor parallelism).
torchrun --nproc-per-node 2 pretrain_dit.py \
  --preset dit_quickstart_stage3_video80 \
  --tensor-model-parallel-size 2 \
  --sequence-parallel \
  --data-path "$STAGES/videos80-train" \
  --valid-data-path "$STAGES/videos80-heldout" \
  --eval-iters 1 \
  --save "$STAGES/stage3" \
  --load "$STAGES/stage2" \
  --save-interval 60 \
  --keep-checkpoints 2 \
  --tensorboard-dir "$STAGES/stage3/logs" \
  "$@"
