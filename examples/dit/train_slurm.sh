#!/usr/bin/env bash
# Train the 14B DiT on a SLURM cluster, one process per GPU.
#
#   sbatch --nodes 16 examples/dit/train_slurm.sh
#
# A requeued job continues from the newest checkpoint, at another number of nodes too.
#SBATCH --job-name=pretrain_dit
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --requeue
set -euo pipefail

export DATA=${DATA:-data/latents}
export VALID=${VALID:-data/latents-valid}
export SAVE=${SAVE:-runs/dit_14b}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=${MASTER_PORT:-29500}

# Ranks of one node share a sample: tensor 4 x context 2. Everything else is data parallel.
# shellcheck disable=SC2016
srun bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID exec "$@"' pretrain \
  python pretrain_dit.py \
  --preset dit_14b \
  --tensor-model-parallel-size 4 \
  --context-parallel-size 2 \
  --sequence-parallel \
  --use-distributed-optimizer \
  --overlap-grad-reduce \
  --recompute-granularity full \
  --data-path "$DATA" \
  --valid-data-path "$VALID" \
  --num-workers 4 \
  --micro-batch-size 1 \
  --global-batch-size 256 \
  --train-iters 100000 \
  --lr 1e-4 \
  --lr-warmup-iters 1000 \
  --sigma-shift 5 \
  --eval-interval 1000 \
  --eval-iters 1 \
  --save "$SAVE" \
  --load "$SAVE" \
  --save-interval 500 \
  --keep-checkpoints 3 \
  --tensorboard-dir "$SAVE/logs"
