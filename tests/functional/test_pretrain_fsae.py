"""pretrain_fsae.py as from a shell: one process, two, from phase to phase, and what it says to wrong input."""

import json
from pathlib import Path

import pytest

from megatron_fsvideo.checkpoint.release import load_fsae
from tests.functional.cli import Result, run_cli
from tests.unit.test_fsae_training import make_film

SMALL = ["--preset", "fsae_debug", "--micro-batch-size", 1, "--global-batch-size", 2, "--train-iters", 3]
TINY_ADVERSARY = ["--discriminator-width", 4, "--discriminator-scales", 1, "--discriminator-layers", 2]


class Runs:
    """Runs of the script on one film."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "videos").mkdir()
        make_film(folder / "videos")

    def train(self, name: str, *argv: str | int | Path, world_size: int = 1) -> Result:
        save = self.folder / name
        usual = ["--video-dir", self.folder / "videos", "--save", save, "--load", save, "--tensorboard-dir", save]
        return run_cli("pretrain_fsae.py", [*SMALL, *usual, *argv], self.folder / f"{name}.log", world_size)

    def metrics(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    found = Runs(tmp_path_factory.mktemp("fsae"))
    result = found.train("phase1")
    assert result.code == 0, result.stderr
    return found


def test_it_leaves_an_autoencoder_and_its_metrics(runs):
    assert load_fsae(runs.folder / "phase1").latent_channels == 4
    assert [row["iteration"] for row in runs.metrics("phase1")] == [1, 2, 3]


def test_two_processes_train_as_one(runs):
    result = runs.train("two", world_size=2)
    assert result.code == 0, result.stderr
    alone, together = ([row["loss"] for row in runs.metrics(name)] for name in ("phase1", "two"))
    assert together == pytest.approx(alone, rel=1e-5)


def test_the_next_phase_starts_from_the_one_before(runs):
    result = runs.train("phase2", "--phase", 2, "--init-from", runs.folder / "phase1", *TINY_ADVERSARY)
    assert result.code == 0, result.stderr
    assert all(row["discriminator"] > 0 for row in runs.metrics("phase2")), runs.metrics("phase2")


def test_a_run_does_not_overwrite_anothers_checkpoints(runs):
    videos, save = runs.folder / "videos", runs.folder / "phase1"
    result = run_cli("pretrain_fsae.py", [*SMALL, "--video-dir", videos, "--save", save], runs.folder / "again.log")
    assert result.code == 1 and "holds a checkpoint, which this run would overwrite" in result.last_line, result.stderr
    assert len(runs.metrics("phase1")) == 3


def test_wrong_input_ends_with_one_line(runs):
    result = runs.train("wrong", "--num-frames", 6)
    assert result.code == 2 and "got 6" in result.last_line and "Traceback" not in result.stderr, result.stderr
    assert not (runs.folder / "wrong").exists()
