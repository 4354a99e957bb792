#!/usr/bin/env bash
# Train the DiT on one machine, one process per GPU (NUM_PROCESSES sets another number).
#
#   DATA=data/latents VALID=data/latents-valid SAVE=runs/dit examples/dit/train_local.sh
#
# Run it again after a stop: it continues from the newest checkpoint. The sizes of the dataset's text and image
# embeddings must be the preset's (umT5-XXL 4096, CLIP ViT-H 1280); flags such as --text-embed-dim override them.
set -euo pipefail

DATA=${DATA:-data/latents}
VALID=${VALID:-data/latents-valid}
SAVE=${SAVE:-runs/dit}
NUM_PROCESSES=${NUM_PROCESSES:-$(python -c "import torch; print(max(1, torch.cuda.device_count()))")}

torchrun --nproc-per-node "$NUM_PROCESSES" pretrain_dit.py \
  --preset dit_1b \
  --use-distributed-optimizer \
  --recompute-granularity full \
  --data-path "$DATA" \
  --valid-data-path "$VALID" \
  --num-workers 2 \
  --micro-batch-size 1 \
  --global-batch-size 16 \
  --train-iters 100000 \
  --lr 1e-4 \
  --lr-warmup-iters 1000 \
  --sigma-shift 3 \
  --eval-interval 1000 \
  --eval-iters 4 \
  --save "$SAVE" \
  --load "$SAVE" \
  --save-interval 1000 \
  --keep-checkpoints 3 \
  --tensorboard-dir "$SAVE/logs" \
  "$@"
