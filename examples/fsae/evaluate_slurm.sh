#!/usr/bin/env bash
# Tables 1 and 2 of the paper for one autoencoder, on a SLURM cluster, one process per GPU.
#
#   sbatch --nodes 2 examples/fsae/evaluate_slurm.sh
#
# The variables are those of evaluate_local.sh.
#SBATCH --job-name=fsae_evaluate
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
set -euo pipefail

export LOAD=${LOAD:-runs/fsae_phase5}
export VIDEO_DIR=${VIDEO_DIR:-data/inter4k}
export OUT=${OUT:-runs/fsae_evaluation}
export VGG16=${VGG16:-vgg16_lpips.safetensors}
export I3D=${I3D:-rgb_imagenet.pt}
export WAN=${WAN:-wan2.1}
export LTX=${LTX:-ltx-video}
export HUNYUAN=${HUNYUAN:-hunyuanvideo}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=${MASTER_PORT:-29500}

# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID exec "$@"' evaluate \
  python tools/evaluate_fsae.py \
  --load "$LOAD" \
  --video-dir "$VIDEO_DIR" \
  --sampling videos \
  --num-clips 1000 \
  --num-frames 17 \
  --resolution 256 \
  --short-side 256 \
  --lpips-path "$VGG16" \
  --i3d-path "$I3D" \
  --compare "wan:$WAN" "ltx:$LTX" "hunyuan:$HUNYUAN" \
  --out "$OUT/table2.json"

# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID exec "$@"' measure \
  python tools/intrinsic_dimension.py \
  --load "$LOAD" \
  --video-dir "$VIDEO_DIR" \
  --num-points 5000 \
  --out "$OUT/table1.json"
