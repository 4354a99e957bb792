#!/usr/bin/env bash
# Everything that waits for a GPU, in one command: the gpu tests, then each benchmark's figures as JSON.
#
#   tools/gpu_session.sh docs/benchmarks            # one H100 or H200
#   SIZES=debug tools/gpu_session.sh /tmp/figures   # the same commands at sizes of seconds, on any machine
#
# A part that fails, or that takes longer than $LIMIT seconds (600), does not stop the others. The exit code is the number
# of parts that failed. $PYTHON (python) has this package installed. PARTS="tests memory" runs some of the parts.
set -uo pipefail
cd "$(dirname "$0")/.."

OUT=${1:?usage: tools/gpu_session.sh FOLDER}
SIZES=${SIZES:-paper}
PYTHON=${PYTHON:-python}
LIMIT=${LIMIT:-600}
PARTS=${PARTS:-tests memory training fp8 inference fsae}
mkdir -p "$OUT"

SLICE="--preset dit_14b --num-layers 4 --latent-grid 31 16 16 --recompute-granularity full"
case $SIZES in
  paper)
    MEMORY=""
    TRAINING="$SLICE --bf16"
    INFERENCE="--preset dit_14b"
    FSAE="--clip 121 768 1280 --contenders standard_tiled lite_streamed lite_tiled wan ltx"
    ;;
  debug)
    MEMORY="--hidden-size 64 --tokens 32 --num-layers 3 --num-threads 1"
    TRAINING="--preset dit_debug --latent-grid 2 4 4 --rounds 1 --iterations 1 --warmup-iterations 1 --num-threads 1"
    INFERENCE="--preset dit_debug --base-grid 2 4 4 --refiner-grid 2 4 8 --base-steps 2 --refiner-steps 1"
    FSAE="--size debug --clip 9 64 64 --dtype fp32 --rounds 1 --contenders lite wan"
    ;;
  *) echo "SIZES is paper or debug, got $SIZES" >&2; exit 64 ;;
esac

FAILED=()
part() { # name, command ...
  local name=$1
  shift
  [[ " $PARTS " == *" $name "* ]] || return 0
  echo "== $name: $*"
  if timeout "$LIMIT" "$@" 2>&1 | tee "$OUT/gpu_$name.log"; then echo "== $name: done in ${SECONDS} s"; else FAILED+=("$name"); fi
}

part tests "$PYTHON" -m pytest -q -m gpu
# shellcheck disable=SC2086
{
  part memory "$PYTHON" tools/benchmark_layer_memory.py $MEMORY --json "$OUT/layer_memory_gpu.json"
  part training "$PYTHON" tools/benchmark_dit_training.py $TRAINING --json "$OUT/training_gpu.json"
  if "$PYTHON" -c "import transformer_engine.pytorch" 2>/dev/null; then
    part fp8 "$PYTHON" tools/benchmark_dit_training.py $TRAINING --contenders ours ours_without_memory \
      --transformer-impl transformer_engine --fp8-format hybrid --json "$OUT/training_fp8_gpu.json"
  else
    echo "== fp8: left out, Transformer Engine is not installed"
  fi
  part inference "$PYTHON" tools/benchmark_dit_inference.py $INFERENCE --json "$OUT/inference_gpu.json"
  part fsae "$PYTHON" tools/benchmark_fsae.py $FSAE --json "$OUT/fsae_gpu.json"
}

echo "failed: ${FAILED[*]:-nothing}"
exit ${#FAILED[@]}
