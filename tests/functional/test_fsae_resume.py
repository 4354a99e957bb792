"""GAN training of the autoencoder that is killed and started again is the unbroken run, bit for bit."""

import random
import time
from pathlib import Path

import pytest
import torch

import pretrain_fsae
from megatron_fsvideo.checkpoint.save_folder import iteration_folder, latest_iteration
from megatron_fsvideo.training.fsae_checkpoint import TRAINING_FILE
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
FLAGS += " --save-interval 1 --keep-checkpoints 3 --async-save"


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
    content = torch.load(iteration_folder(folder, TRAIN_ITERS) / TRAINING_FILE, weights_only=True)

    def tensors(value, path: str) -> dict[str, torch.Tensor]:
        if isinstance(value, torch.Tensor):
            return {path: value}
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return {key: leaf for name, item in items for key, leaf in tensors(item, f"{path}/{name}").items()}

    return tensors(content, "")


def assert_equal_runs(folder: Path, unbroken: Path) -> None:
    assert logged(folder) == logged(unbroken)
    ours, theirs = saved(folder), saved(unbroken)
    assert ours.keys() == theirs.keys() and any("/adversary/optimizer/0/state" in name for name in ours)
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
    path = iteration_folder(folder, 4) / TRAINING_FILE
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    run_to_end([*arguments(films, folder), "--exit-interval", "2"], log, 2, pretrain_fsae.main)
    assert "Continuing from iteration 3, the newest checkpoint that is whole" in log.read_text()
    assert latest_iteration(folder) == 5
    run_to_end(shared, log, 2, pretrain_fsae.main)
    assert_equal_runs(folder, unbroken)
