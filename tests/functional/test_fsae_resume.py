"""GAN training of the autoencoder that is killed and started again is the unbroken run, bit for bit."""

import random
import shutil
import time
from pathlib import Path

import pytest
import torch

import pretrain_fsae
from megatron_fsvideo.checkpoint.distributed_weights import DistributedWeights
from megatron_fsvideo.checkpoint.save_folder import iteration_folder, latest_iteration
from megatron_fsvideo.training.logging import METRICS_FILE, read_metrics
from tests.functional.runs import Run, run_to_end
from tests.functional.test_resume import wait_for_first_line
from tests.unit.test_fsae_training import make_film

TRAIN_ITERS = 8
# The discriminator learns alone at first; images and clips; R1 in every other step; a save after each.
FLAGS = (
    f"--preset fsae_debug --phase 2 --train-iters {TRAIN_ITERS} --micro-batch-size 1 --global-batch-size 2 --lr 0.01"
)
FLAGS += " --image-fraction 0.3 --image-batch-size 2 --discriminator-warmup-iters 2 --r1-interval 2 --ema-decay 0.9"
FLAGS += " --discriminator-width 4 --discriminator-scales 1 --discriminator-layers 2"
FLAGS += " --clip-grad 0 --save-interval 1 --keep-checkpoints 3 --async-save"


def arguments(films: Path, folder: Path, *more: str) -> list[str]:
    return [*FLAGS.split(), *f"--video-dir {films} --save {folder} --load {folder}".split(), *more] + [
        "--tensorboard-dir",
        f"{folder}/logs",
    ]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_film(tmp_path_factory.mktemp("films"))


@pytest.fixture(scope="module")
def unbroken(films: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    run_to_end(arguments(films, folder), folder.with_suffix(".log"), 2, pretrain_fsae.main)
    assert len({row["loss"] for row in logged(folder)}) == TRAIN_ITERS
    return folder


def logged(folder: Path) -> list[dict]:
    """What every iteration's line says, but for its timings."""
    names = ("iteration", "loss", "l1", "gan", "discriminator", "r1", "grad_norm", "discriminator_grad_norm")
    return [{name: row.get(name) for name in names} for row in read_metrics(folder / "logs" / METRICS_FILE)]


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """All that the last checkpoint holds: both networks, both optimizers, the average."""
    stored = DistributedWeights(iteration_folder(folder, TRAIN_ITERS), "")
    return {name: stored.read(name) for name in stored.infos}


def assert_equal_runs(folder: Path, unbroken: Path, norm_tolerance: float = 0.0) -> None:
    for ours, theirs in zip(logged(folder), logged(unbroken), strict=True):
        for name, value in ours.items():
            tolerance = norm_tolerance if name.endswith("norm") else 0.0
            assert value == (theirs[name] and pytest.approx(theirs[name], rel=tolerance, abs=0)), name
    ours, theirs = saved(folder), saved(unbroken)
    assert ours.keys() == theirs.keys() and all(
        any(name.startswith(prefix) for name in ours)
        for prefix in ("fsae.model.", "fsae.ema.", "fsae.optimizer.", "discriminator.optimizer.exp_avg.")
    )
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_killed_gan_run_goes_on_bit_for_bit(films: Path, unbroken: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    seed = random.SystemRandom().randrange(1 << 30)
    times = sorted(path.stat().st_mtime for path in unbroken.glob("iter_*/job.json"))
    moment = random.Random(seed).uniform(0, 0.7 * TRAIN_ITERS * (times[-1] - times[0]) / (len(times) - 1))
    run = Run(arguments(films, folder), log, 2, pretrain_fsae.main)
    wait_for_first_line(run, folder / "logs" / METRICS_FILE)
    time.sleep(moment)
    run.kill()
    print(f"seed {seed}: killed {moment:.3f} s after the first line, restarted")
    run_to_end(arguments(films, folder), log, 2, pretrain_fsae.main)
    assert_equal_runs(folder, unbroken)


def test_a_shared_optimizer_resumes_and_a_damaged_checkpoint_is_passed_over(
    films: Path, unbroken: Path, tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    shared = arguments(films, folder, "--use-distributed-optimizer")
    run_to_end([*shared, "--exit-interval", "4"], log, 2, pretrain_fsae.main)
    # A checkpoint of two processes that share the moments is one of a process that has them all, and the reverse.
    path = next(iteration_folder(folder, 4).glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    run_to_end([*arguments(films, folder), "--exit-interval", "2"], log, 2, pretrain_fsae.main)
    assert "Continuing from iteration 3, the newest checkpoint that is whole" in log.read_text()
    assert latest_iteration(folder) == 5
    run_to_end(shared, log, 2, pretrain_fsae.main)
    # Each process sums the squares of its share: the norm's last digit differs, and without clipping nothing else.
    assert_equal_runs(folder, unbroken, norm_tolerance=1e-6)


def test_two_processes_continue_on_one_and_on_four(films: Path, tmp_path: Path) -> None:
    def argv(folder: Path, *more: str) -> list[str]:
        return arguments(films, folder, "--global-batch-size", "4", "--image-batch-size", "4", *more)

    saved_by_two = tmp_path / "two"
    run_to_end(argv(saved_by_two, "--exit-interval", "4"), tmp_path / "log", 2, pretrain_fsae.main)
    rows = {}
    for number in (2, 1, 4):
        folder = tmp_path / f"on_{number}"
        shutil.copytree(saved_by_two, folder)
        more = ["--use-distributed-optimizer"] if number == 4 else []
        run_to_end(argv(folder, "--exit-interval", "1", *more), tmp_path / "log", number, pretrain_fsae.main)
        rows[number] = logged(folder)[-1]
    assert rows[2]["iteration"] == 5
    for number in (1, 4):
        assert rows[number] == pytest.approx(rows[2], rel=1e-6), number
