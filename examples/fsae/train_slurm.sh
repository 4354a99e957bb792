#!/usr/bin/env bash
# Train one phase of the video autoencoder on a SLURM cluster, one process per GPU.
#
#   sbatch --nodes 4 examples/fsae/train_slurm.sh PHASE [flags of pretrain_fsae.py]
#
# The phases and the variables are those of train_local.sh. Our plan: 4 nodes for phase 1, 8 for phase 2, 16 for the others.
# Five minutes before its time limit, and when it is preempted, the run saves, ends and is queued again.
# A requeued job continues from the newest checkpoint.
#SBATCH --job-name=fsae
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
set -euo pipefail

PHASE=${1:?usage: sbatch examples/fsae/train_slurm.sh PHASE [flags of pretrain_fsae.py]}
shift
VIDEO_DIR=${VIDEO_DIR:-data/videos}
VGG16=${VGG16:-vgg16_lpips.safetensors}
DINOV2=${DINOV2:-dinov2-large}
SAVE=${SAVE:-runs/fsae_phase$PHASE}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=${MASTER_PORT:-29500}

case $PHASE in
  1) batch=64 images=128 micro_batch=2 ;;
  2) batch=64 images=64 micro_batch=1 ;;
  3 | 4 | 5 | 6) batch=128 images=128 micro_batch=1 ;;
  *) echo "PHASE is 1, 2, 3, 4, 5 or 6, got $PHASE" >&2; exit 64 ;;
esac
if [ "$PHASE" -gt 1 ]; then INIT=${INIT:-runs/fsae_phase$((PHASE - 1))}; fi
start=()
if [ -n "${INIT:-}" ]; then start+=(--init-from "$INIT"); fi
if [ "$PHASE" = 4 ]; then start+=(--vf-encoder-path "$DINOV2"); fi

save_and_requeue() {
  # Send the signal to the ranks, not to this script. They save at the end of their iteration and exit with 0.
  scancel --signal=USR1 "$SLURM_JOB_ID"
  wait "$ranks" || exit 1
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap save_and_requeue USR1

# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID exec "$@"' pretrain \
  python pretrain_fsae.py \
  --preset "fsae_phase$PHASE" \
  --video-dir "$VIDEO_DIR" \
  --holdout-every 50 \
  --perceptual-trunk-path "$VGG16" \
  "${start[@]}" \
  --micro-batch-size "$micro_batch" \
  --global-batch-size "$batch" \
  --image-batch-size "$images" \
  --eval-interval 2000 \
  --eval-iters 1 \
  --save "$SAVE" \
  --load "$SAVE" \
  --save-interval 1000 \
  --keep-checkpoints 3 \
  --tensorboard-dir "$SAVE/logs" \
  "$@" &
ranks=$!
# srun is in the background, because bash runs a trap only between commands; `wait` returns when the signal comes.
wait "$ranks"
