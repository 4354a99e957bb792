#!/usr/bin/env bash
# Train the video autoencoder on a SLURM cluster, one process per GPU.
# Phase 2: + the discriminator, images and 61-frame clips of about 512 x 512.
#
#   sbatch --nodes 8 examples/fsae/phase2_slurm.sh
#
# Five minutes before its time is over the run saves, leaves and is queued again; so it does when it is preempted.
# A requeued job continues from the newest checkpoint.
#
# PREVIOUS is phase 1's SAVE folder: its newest checkpoint is where this phase begins.
#SBATCH --job-name=fsae_phase2
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
set -euo pipefail

export VIDEO_DIR=${VIDEO_DIR:-data/videos}
export VGG16=${VGG16:-vgg16_lpips.safetensors}
export PREVIOUS=${PREVIOUS:-runs/fsae_phase1}
export SAVE=${SAVE:-runs/fsae_phase2}
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

# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID exec "$@"' pretrain \
  python pretrain_fsae.py \
  --preset fsae_phase2 \
  --video-dir "$VIDEO_DIR" \
  --holdout-every 50 \
  --perceptual-trunk-path "$VGG16" \
  --init-from "$PREVIOUS" \
  --micro-batch-size 1 \
  --global-batch-size 64 \
  --image-batch-size 64 \
  --eval-interval 2000 \
  --eval-iters 1 \
  --save "$SAVE" \
  --load "$SAVE" \
  --save-interval 1000 \
  --keep-checkpoints 3 \
  --tensorboard-dir "$SAVE/logs" &
ranks=$!
# In the background, because bash runs a trap only between commands; `wait` returns when the signal comes.
wait "$ranks"
