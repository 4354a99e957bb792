#!/usr/bin/env bash
# Encode a video collection to a latent dataset on a SLURM cluster.
#
#   sbatch --nodes 8 examples/preprocess/preprocess_slurm.sh
#
# The processes do not communicate, so a requeued or enlarged job continues. Submit it again until it prints
# "complete".
#SBATCH --job-name=preprocess_latents
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --requeue
set -euo pipefail

export MANIFEST=${MANIFEST:-data/videos.jsonl}
export FSAE=${FSAE:-release/fsae}
export OUTPUT=${OUTPUT:-data/latents}
export TEXT_ENCODER=${TEXT_ENCODER:-umt5:google/umt5-xxl}
export IMAGE_ENCODER=${IMAGE_ENCODER:-clip:laion/CLIP-ViT-H-14-laion2B-s32B-b79K}

# One task runs per GPU. The tool needs only RANK and WORLD_SIZE.
# shellcheck disable=SC2016
srun bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID exec "$@"' preprocess \
  python tools/preprocess_latents.py \
  --manifest "$MANIFEST" \
  --fsae "$FSAE" \
  --text-encoder "$TEXT_ENCODER" \
  --image-encoder "$IMAGE_ENCODER" \
  --allow-download \
  --buckets 121x704x1280 121x1280x704 121x1024x1024 \
  --fps 24 \
  --encode-batch-size 1 \
  --samples-per-shard 256 \
  --output "$OUTPUT"
