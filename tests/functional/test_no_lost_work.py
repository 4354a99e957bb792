"""Whatever happens to a run, it goes on from its last good state with the losses of a run that nothing happened to."""

import os
import signal
from pathlib import Path

import pytest

from megatron_fsvideo.checkpoint.distributed import latest_iteration
from megatron_fsvideo.data.latent_shards import hash_key
from megatron_fsvideo.training.logging import METRICS_FILE, read_metrics
from tests.functional.runs import Run, debug_arguments, run_to_end
from tests.functional.test_resume import wait_for_first_line
from tests.latent_fixtures import write_latent_dataset

TRAIN_ITERS = 16
NAN_SAMPLE = 5
# A high rate, so that an iteration done twice, or a forgotten optimizer moment, shows in the loss.
FLAGS = f"--train-iters {TRAIN_ITERS} --lr 0.01 --lr-warmup-iters 2 --keep-checkpoints 3".split()
DATA_PARALLEL = "--use-distributed-optimizer --micro-batch-size 1".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 samples, batches of 2: each is seen once in 12 iterations, and one of them holds a NaN."""
    return write_latent_dataset(tmp_path_factory.mktemp("data"), nan_sample=NAN_SAMPLE)


def arguments(data: Path, folder: Path, *more: str) -> list[str]:
    return debug_arguments(data, folder, *FLAGS, *DATA_PARALLEL, *more)


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What every iteration of a run logs that nothing interrupts, on two data-parallel ranks."""
    folder = tmp_path_factory.mktemp("unbroken")
    run_to_end(arguments(data, folder), folder / "log", 2)
    rows = logged(folder)
    assert [row["iteration"] for row in rows] == list(range(1, TRAIN_ITERS + 1))
    return rows


def logged(folder: Path) -> list[dict]:
    """What every iteration's line says, but for its timings."""
    names = ("iteration", "consumed_samples", "loss", "grad_norm", "learning_rate", "skipped")
    return [{name: row.get(name) for name in names} for row in read_metrics(folder / "logs" / METRICS_FILE)]


def test_a_broken_sample_costs_one_step_and_is_named(unbroken: list[dict]) -> None:
    skipped = [row for row in unbroken if row["skipped"]]
    assert 1 <= len(skipped) <= 2
    for row in skipped:
        assert row["loss"] is None and "the loss is nan" in row["skipped"]
        assert row["skipped"].endswith(f"samples (1 of 2 in the batch): {hash_key('sample', 0, NAN_SAMPLE)}")
    others = [row for row in unbroken if not row["skipped"]]
    assert len({row["loss"] for row in others}) == len(others)
    assert all(row["loss"] < 10 and row["grad_norm"] > 0 for row in others)


def test_nothing_but_broken_samples_stops_the_run(tmp_path: Path) -> None:
    data = write_latent_dataset(tmp_path / "data", num_samples=2, nan_sample=1)
    folder = tmp_path / "run"
    more = ["--max-consecutive-skipped", "3", "--save-interval", "2"]
    code, text = Run(arguments(data, folder, *more), tmp_path / "log", 2).wait()
    last = text.strip().splitlines()[-1]
    assert code == 1 and "3 optimizer steps in a row" in last and hash_key("sample", 0, 1) in last
    assert latest_iteration(folder) == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_any_rank_saves_and_leaves(data: Path, unbroken: list[dict], tmp_path: Path, rank: int) -> None:
    folder = tmp_path / "run"
    run = Run(arguments(data, folder), tmp_path / "log", 2)
    wait_for_first_line(run, folder / "logs" / METRICS_FILE)
    os.kill(run.ranks[rank].pid, signal.SIGUSR1 if rank else signal.SIGTERM)
    code, text = run.wait()
    assert (code, [process.exitcode for process in run.ranks]) == (0, [0, 0]), text
    reached = latest_iteration(folder)
    assert reached is not None and reached == len(logged(folder)) < TRAIN_ITERS
    run_to_end(arguments(data, folder), tmp_path / "log", 2)
    assert logged(folder) == unbroken
