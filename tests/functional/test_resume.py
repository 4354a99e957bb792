"""A run killed at a random moment and restarted writes the losses of an unbroken run, bit for bit."""

import random
import shutil
import time
from pathlib import Path

import pytest

from megatron_fsvideo.checkpoint.save_folder import JOB_FILE, LATEST_FILE, iteration_folder, latest_iteration
from megatron_fsvideo.training.logging import METRICS_FILE, read_metrics
from tests.functional.runs import Run, debug_arguments, run_to_end
from tests.latent_fixtures import write_latent_dataset

TRAIN_ITERS = 16
# A high rate, so that an iteration done twice, or a forgotten optimizer moment, shows in the loss. With a checkpoint
# after every iteration most of the time goes into saving: most moments are within a save.
FLAGS = f"--train-iters {TRAIN_ITERS} --lr 0.01 --lr-warmup-iters 2 --save-interval 1 --keep-checkpoints 3".split()
DATA_PARALLEL = "--use-distributed-optimizer --micro-batch-size 1".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latent_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts, on two data-parallel ranks."""
    folder = tmp_path_factory.mktemp("unbroken")
    run_to_end(debug_arguments(data, folder, *FLAGS, *DATA_PARALLEL), folder / "log", 2)
    rows = logged(folder)
    assert [row["iteration"] for row in rows] == list(range(1, TRAIN_ITERS + 1))
    assert len({row["loss"] for row in rows}) == TRAIN_ITERS
    return folder


def kill_and_restart(data: Path, unbroken: Path, folder: Path, seed: int) -> None:
    argv = debug_arguments(data, folder, *FLAGS, *DATA_PARALLEL)
    moment = random.Random(seed).uniform(0, 0.8 * TRAIN_ITERS * seconds_per_iteration(unbroken))
    run = Run(argv, folder.with_suffix(".log"), 2)
    wait_for_first_line(run, folder / "logs" / METRICS_FILE)
    time.sleep(moment)
    was_alive = run.alive
    run.kill()
    latest = folder / LATEST_FILE
    reached = latest.read_text() if latest.exists() else None
    run_to_end(argv, folder.with_suffix(".log"), 2)
    where = f"seed {seed}: killed {moment:.3f} s after the first line, alive {was_alive}, restarted from {reached}"
    assert logged(folder) == logged(unbroken), where


def test_killed_at_a_random_moment_and_restarted(data: Path, unbroken: Path, tmp_path: Path) -> None:
    kill_and_restart(data, unbroken, tmp_path / "run", random.SystemRandom().randrange(1 << 30))


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(5))
def test_killed_at_five_random_moments(attempt: int, data: Path, unbroken: Path, tmp_path: Path) -> None:
    kill_and_restart(data, unbroken, tmp_path / "run", random.SystemRandom().randrange(1 << 30))


def test_a_half_written_checkpoint_is_not_picked_up(data: Path, unbroken: Path, tmp_path: Path) -> None:
    """What a kill in the middle of a save leaves: a torn folder, and the text file still naming the one before."""
    folder = tmp_path / "run"
    argv = debug_arguments(data, folder, *FLAGS, *DATA_PARALLEL, "--exit-interval", "4")
    run_to_end(argv, tmp_path / "log", 2)
    torn = iteration_folder(folder, 5)
    shutil.copytree(iteration_folder(folder, 4), torn)
    for path in torn.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    (torn / ".metadata").unlink()
    (torn / JOB_FILE).unlink()
    assert latest_iteration(folder) == 4
    run_to_end(argv, tmp_path / "log", 2)
    assert logged(folder) == logged(unbroken)[:8]


def logged(folder: Path) -> list[dict[str, float]]:
    """What every iteration's line says, but for its timings."""
    names = ("iteration", "consumed_samples", "loss", "grad_norm", "learning_rate")
    return [{name: row[name] for name in names} for row in read_metrics(folder / "logs" / METRICS_FILE)]


def seconds_per_iteration(folder: Path) -> float:
    """From one checkpoint to the next; the last three are kept."""
    times = sorted(path.stat().st_mtime for path in folder.glob(f"iter_*/{JOB_FILE}"))
    return (times[-1] - times[0]) / (len(times) - 1)


def wait_for_first_line(run: Run, metrics: Path, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not (metrics.exists() and metrics.read_text().count("\n")):
        assert run.alive and time.monotonic() < deadline, run.log.read_text()
        time.sleep(0.005)
