"""Batches of several buckets, images among them, give the losses of one process in every layout; so does a resume."""

from itertools import pairwise
from pathlib import Path

import pytest
from megatron.core import parallel_state

from megatron_fsvideo.config import DIT_PRESETS, DiTJob, parse_job
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.tasks.dit.task import DiTTask
from megatron_fsvideo.training.logging import METRICS_FILE, read_metrics
from megatron_fsvideo.training.state import TrainState
from tests.functional.runs import debug_arguments, run_to_end
from tests.latent_fixtures import write_latent_dataset
from tests.parallel.harness import run_workers

BUCKETS = ("9x32x32", "1x32x32", "5x32x32")
NUM_STEPS, RESUMED_AFTER = 6, 3
FLAGS = f"--num-layers 4 --train-iters {NUM_STEPS} --global-batch-size 4 --batch-size-multiple 4 --lr 0.003"
FLAGS += " --lr-decay-style constant --adam-eps 1e-6 --layer-memory-init 0.3"
LAYOUTS = {
    "dp4": "",
    "dp4_distributed_optimizer_ahead": "--use-distributed-optimizer --num-workers 1",
    "dp2_token_budget": "--tensor-model-parallel-size 2 --tokens-per-micro-batch 32",
    "tp2_sp_dp2_ahead": "--tensor-model-parallel-size 2 --sequence-parallel --num-workers 2",
    "cp2_dp2_micro2": "--context-parallel-size 2 --micro-batch-size 2",
    "pp4": "--pipeline-model-parallel-size 4",
    "pp2_dp2": "--pipeline-model-parallel-size 2",
    "pp2_virtual2_dp2": "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latent_dataset(tmp_path_factory.mktemp("data"), 30, buckets=BUCKETS)


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """What one process logs."""
    folder = tmp_path_factory.mktemp("alone")
    run_to_end(debug_arguments(data, folder, *FLAGS.split()), folder / "log")
    return logged(folder)


def logged(folder: Path) -> list[dict[str, float]]:
    names = ("iteration", "consumed_samples", "loss", "grad_norm")
    return [{name: row[name] for name in names} for row in read_metrics(folder / "logs" / METRICS_FILE)]


def train(data: Path, layouts: dict[str, str]) -> dict[str, list[dict[str, float]]]:
    """What each layout logs; all in the same processes."""
    found = {}
    for name, flags in layouts.items():
        argv = f"--preset dit_debug --micro-batch-size 1 --data-path {data} {FLAGS} {flags}".split()
        job = parse_job(DiTJob, DIT_PRESETS, argv)
        pgs = groups.initialize(job.parallel)
        step, state, rows = DiTTask(job, pgs), TrainState(), []
        while state.iteration < NUM_STEPS:
            result = step.train_step(state)
            state.advance(result.num_samples)
            counts = {"iteration": state.iteration, "consumed_samples": state.consumed_samples}
            rows.append(counts | {key: result.metrics[key] for key in ("loss", "grad_norm")})
        parallel_state.destroy_model_parallel()  # the processes stay joined for the next layout
        found[name] = rows
    return found


def assert_equal(rows: list[dict[str, float]], expected: list[dict[str, float]], name: str) -> None:
    for row, wanted in zip(rows, expected, strict=True):
        for key in ("iteration", "consumed_samples"):
            assert row[key] == wanted[key], f"{name}: {key}"
        for key in ("loss", "grad_norm"):
            assert row[key] == pytest.approx(wanted[key], rel=1e-5), f"{name}: {key} of iteration {row['iteration']}"


def test_eight_layouts_train_as_one_process_on_several_buckets(data, alone):
    sizes = {after["consumed_samples"] - before["consumed_samples"] for before, after in pairwise(alone)}
    assert sizes == {4, 8, 12}, "every bucket is met, and has a batch size of its own"
    for rank in run_workers(train, 4, data, LAYOUTS, timeout=200):
        for name, rows in rank.items():
            assert_equal(rows, alone, name)


def test_a_run_goes_on_exactly_at_another_data_parallel_size(data, alone, tmp_path):
    argv = debug_arguments(data, tmp_path, *FLAGS.split(), "--micro-batch-size", "1")
    run_to_end([*argv, "--exit-interval", str(RESUMED_AFTER)], tmp_path / "log")
    run_to_end(argv, tmp_path / "log", 4)
    assert_equal(logged(tmp_path), alone, "resumed")


def test_a_layout_that_cannot_share_the_batches_is_refused_before_any_work(data):
    def refused() -> str:
        argv = f"--preset dit_debug --data-path {data} {FLAGS} --batch-size-multiple 2 --micro-batch-size 1".split()
        job = parse_job(DiTJob, DIT_PRESETS, argv)
        pgs = groups.initialize(job.parallel)
        with pytest.raises(ValueError) as refusal:
            DiTTask(job, pgs)
        return str(refusal.value)

    for text in run_workers(refused, 4):
        assert text.startswith("a batch of 5x32x32 has 6 samples, which is not a multiple of data-parallel size 4 x ")
        assert "multiples of 4 suit this layout; these batches suit data-parallel size 2" in text
