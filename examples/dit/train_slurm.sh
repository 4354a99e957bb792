#!/usr/bin/env bash
# Train the 14B DiT on a SLURM cluster, one process per GPU.
#
#   sbatch --nodes 16 examples/dit/train_slurm.sh
#
# Five minutes before its time is over the run saves, leaves and is queued again; so it does when it is preempted.
# A requeued job continues from the newest checkpoint, at another number of nodes too.
#SBATCH --job-name=pretrain_dit
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
set -euo pipefail

export DATA=${DATA:-data/latents}
export VALID=${VALID:-data/latents-valid}
export SAVE=${SAVE:-runs/dit_14b}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=${MASTER_PORT:-29500}

save_and_requeue() {
  # To the ranks, not to this script. They save at the end of their iteration and leave with 0.
  scancel --signal=USR1 "$SLURM_JOB_ID"
  wait "$ranks" || exit 1
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap save_and_requeue USR1

# Ranks of one node share a sample: tensor 4 x context 2. Everything else is data parallel.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID exec "$@"' pretrain \
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
  --tensorboard-dir "$SAVE/logs" &
ranks=$!
# In the background, because bash runs a trap only between commands; `wait` returns when the signal comes.
wait "$ranks"
