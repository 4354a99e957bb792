#!/usr/bin/env bash
# Supervised fine-tuning (SFT) of the 14B DiT on a SLURM cluster: chosen clips of 121 frames of about 512 x 512.
#
#   SAMPLES=sft.txt GPU=h200 sbatch --nodes 8 examples/dit/sft_slurm.sh
#
# It runs on 1, 8 or 32 nodes of eight H100 (GPU=h100) or H200 (GPU=h200). docs/pretraining.md has inputs and cost.
# Five minutes before its time limit, and when it is preempted, the run saves, ends and is queued again.
# A requeued job continues from the newest checkpoint, also at another number of nodes.
#SBATCH --job-name=dit_sft
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
set -euo pipefail

export DATA=${DATA:-data/videos512}
export VALID=${VALID:-data/videos512-valid}
export SAMPLES=${SAMPLES:-data/sft.txt}
export STAGE3=${STAGE3:-runs/dit_14b_stage3}
export SAVE=${SAVE:-runs/dit_14b_sft}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=${MASTER_PORT:-29500}

# GPUs that share a sample, tokens of a micro-batch and recomputation come from tools/plan_layout.py.
case "${GPU:-h100}-${SLURM_JOB_NUM_NODES:-8}" in
  h100-1) layout=(--tensor-model-parallel-size 4 --tokens-per-micro-batch 3968 --recompute-granularity full) ;;
  h100-8 | h100-32) layout=(--tensor-model-parallel-size 4 --tokens-per-micro-batch 3968) ;;
  h200-1) layout=(--tensor-model-parallel-size 2 --tokens-per-micro-batch 1984) ;;
  h200-8 | h200-32) layout=(--tensor-model-parallel-size 4 --tokens-per-micro-batch 7936) ;;
  *) echo "no layout for GPU=${GPU:-h100} on $SLURM_JOB_NUM_NODES nodes: ask tools/plan_layout.py for one" >&2; exit 1 ;;
esac

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
  python pretrain_dit.py \
  --preset dit_14b_sft \
  "${layout[@]}" \
  --sequence-parallel \
  --use-distributed-optimizer \
  --overlap-grad-reduce \
  --data-path "$DATA" \
  --valid-data-path "$VALID" \
  --sample-list "$SAMPLES" \
  --num-workers 2 \
  --eval-interval 1000 \
  --eval-iters 1 \
  --save "$SAVE" \
  --load "$STAGE3" \
  --save-interval 500 \
  --async-save \
  --keep-checkpoints 3 \
  --tensorboard-dir "$SAVE/logs" &
ranks=$!
# srun is in the background, because bash runs a trap only between commands; `wait` returns when the signal comes.
wait "$ranks"
