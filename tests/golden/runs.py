"""Runs whose losses are kept in losses.json: 50 iterations with validation, stopped and resumed after the 25th.

    python -m tests.golden.runs tests/golden/losses.json        # writes the file anew; only for a change on purpose

The file was made by commit b37ee46; the DiT's rows were made again when the pseudo-Huber loss lost its factor 2c and
routers the tenfold rate. The rates are constant and the dataset has one sample, so that neither the form of
the schedule nor the order of the data matters here.
"""

import json
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import pretrain_dit
import pretrain_fsae
from megatron_fsvideo.training.logging import METRICS_FILE, read_metrics
from tests.functional.runs import run_to_end
from tests.latent_fixtures import write_latent_dataset
from tests.unit.test_fsae_training import make_film

NUM_ITERATIONS = 50
_COMMON = "--lr-decay-style constant --lr-warmup-iters 0 --eval-iters 1 --log-interval 1"
_GAN = "--discriminator-width 4 --discriminator-scales 1 --discriminator-layers 2 --r1-interval 4"
_FSAE = "--preset fsae_debug --holdout-every 2 --micro-batch-size 1 --lr 0.001 --adam-eps 1e-4 --ema-decay 0.9"


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        tolerance: largest relative difference of a logged number, gradient norms apart; 0 for bit for bit.
    """

    main: Callable[[], None]
    flags: str
    num_processes: int
    tolerance: float


CASES = {
    "dit_tp2_sp": Case(
        pretrain_dit.main,
        "--preset dit_quickstart --latent-channels 4 --text-embed-dim 12 --tensor-model-parallel-size 2"
        f" --sequence-parallel {_COMMON}",
        2,
        0.0,
    ),
    # Clipping is off in both: the gradient norm is another sum in the last digit than it was at that commit.
    "fsae_phase2_dp2": Case(
        pretrain_fsae.main,
        f"{_FSAE} --phase 2 --global-batch-size 4 --image-fraction 0.3 --image-batch-size 4 --clip-grad 0 {_GAN}"
        f" --discriminator-warmup-iters 2 {_COMMON}",
        2,
        0.0,
    ),
    "fsae_phase5": Case(
        pretrain_fsae.main,
        f"{_FSAE} --phase 5 --decoder standard --first-frame-head-dim 8 --global-batch-size 2 --clip-grad 0 {_GAN}"
        f" {_COMMON}",
        1,
        0.0,
    ),
}


def logged_numbers(name: str, folder: Path, num_iterations: int = NUM_ITERATIONS) -> list[dict[str, float]]:
    """What metrics.jsonl says of a case, but for times and rates: `num_iterations` in two legs, and validations."""
    case = CASES[name]
    if case.main is pretrain_dit.main:
        data = write_latent_dataset(folder / "data", num_samples=1)
        inputs = f"--data-path {data} --valid-data-path {data}"
    else:
        (folder / "films").mkdir()
        inputs = f"--video-dir {make_film(folder / 'films')}"
    save = folder / "run"
    argv = f"{case.flags} {inputs} --save {save} --load {save} --tensorboard-dir {save}/logs"
    argv += f" --train-iters {num_iterations} --eval-interval {num_iterations // 2}"
    for exit_interval in (num_iterations // 2, 0):
        leg = [*argv.split(), "--exit-interval", str(exit_interval)]
        run_to_end(leg, folder / "log", case.num_processes, case.main)
    kept = ("iteration", "loss", "l1", "gan", "discriminator", "r1", "velocity_mse")
    return [
        {key: value for key, value in row.items() if key in kept or "norm" in key or "validation" in key}
        for row in read_metrics(save / "logs" / METRICS_FILE)
    ]


def arithmetic() -> dict[str, str]:
    """What the last digits of a result depend on besides this code."""
    return {
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
    }


def main() -> None:
    """Make the file that the first argument names."""
    torch.set_num_threads(1)
    content: dict = {"arithmetic": arithmetic(), "cases": {}}
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            content["cases"][name] = logged_numbers(name, Path(folder))
        print(name, content["cases"][name][-1], flush=True)
    Path(sys.argv[1]).write_text(_in_rows(content))


def _in_rows(content: dict) -> str:
    """JSON with one logged row a line."""
    cases = (
        f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]"
        for name, rows in content["cases"].items()
    )
    return f'{{"arithmetic": {json.dumps(content["arithmetic"])},\n"cases": {{\n' + ",\n".join(cases) + "\n}}\n"


if __name__ == "__main__":
    main()
