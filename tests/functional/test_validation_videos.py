"""Videos sampled while training: each data-parallel rank makes its share, and training does not notice."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from megatron_fsvideo.checkpoint.release import save_fsae
from megatron_fsvideo.config import DIT_PRESETS, FSAE_PRESETS, DiTJob, FSAEJob, build_job, parse_job
from megatron_fsvideo.data.video import read_video
from megatron_fsvideo.models.codecs.identity import fingerprint
from megatron_fsvideo.models.fsae import FSAE
from megatron_fsvideo.training.logging import METRICS_FILE, read_metrics
from tests.functional.runs import debug_arguments, run_to_end
from tests.latent_fixtures import write_latent_dataset

NUM_VIDEOS = 3
COMMON = "--micro-batch-size 1 --global-batch-size 4 --train-iters 4 --lr 0.01 --eval-iters 1".split()
SAMPLING = f"--sample-interval 2 --num-validation-videos {NUM_VIDEOS} --num-sampling-steps 3".split()


@pytest.fixture(scope="module")
def fsae(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    torch.manual_seed(0)
    model = FSAE(build_job(FSAEJob, FSAE_PRESETS["fsae_causal_debug"]).model)
    folder = tmp_path_factory.mktemp("fsae") / "release"
    save_fsae(folder, model)
    return folder, fingerprint(model)


@pytest.fixture(scope="module")
def data(fsae: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    return write_latent_dataset(folder, 24, fsae[1], buckets=("5x32x32", "1x32x64"))


def run(data: Path, folder: Path, world_size: int, *more: str) -> list[dict]:
    argv = debug_arguments(data, folder, *COMMON, "--valid-data-path", str(data), *more)
    run_to_end(argv, folder.with_suffix(".log"), world_size)
    return read_metrics(folder / "logs" / METRICS_FILE)


def values(rows: list[dict], name: str) -> dict[int, float]:
    return {row["iteration"]: row[name] for row in rows if name in row}


def test_two_ranks_make_what_one_makes_and_training_does_not_notice(data, fsae, tmp_path):
    alone = run(data, tmp_path / "alone", 1, *SAMPLING, "--sampling-guidance-scale", "2")
    two = ["--use-distributed-optimizer", "--fsae", str(fsae[0]), "--sampling-guidance-scale", "2"]
    rows = run(data, tmp_path / "two", 2, *SAMPLING, *two)
    errors = values(rows, "validation_video_latent_mse")
    assert list(errors) == [2, 4] and errors[2] != errors[4]
    assert errors == pytest.approx(values(alone, "validation_video_latent_mse"), rel=1e-4)
    without = run(data, tmp_path / "without", 2, "--use-distributed-optimizer")
    assert values(rows, "loss") == values(without, "loss")
    folder = tmp_path / "two" / "logs" / "videos" / "iter_0000004"
    names = sorted(path.name for path in folder.iterdir())
    assert names == [*(f"{k:02d}.mp4" for k in range(NUM_VIDEOS)), "contact_sheet.png"]
    shapes = {tuple(read_video(folder / f"{k:02d}.mp4").shape) for k in range(NUM_VIDEOS)}
    assert shapes == {(5, 32, 32, 3), (1, 32, 64, 3)}
    latents = [
        safetensors.torch.load_file(tmp_path / "alone" / "logs" / "videos" / "iter_0000004" / f"{k:02d}.safetensors")
        for k in range(NUM_VIDEOS)
    ]
    assert {tuple(one["latents"].shape) for one in latents} == {(4, 2, 4, 4), (4, 1, 4, 8)}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (SAMPLING, "sample_interval needs valid_data_path, eval_iters and tensorboard_dir"),
        (
            [*SAMPLING, "--num-validation-videos", "0"],
            "num_validation_videos must be an integer of at least 1, got 0",
        ),
        (
            [*SAMPLING, *"--eval-iters 1 --valid-data-path x --tensorboard-dir y".split()]
            + ["--pipeline-model-parallel-size", "2"],
            "not pipeline_model_parallel_size 2",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused(flags, words, capsys):
    with pytest.raises(SystemExit):
        parse_job(DiTJob, DIT_PRESETS, ["--preset", "dit_debug", *flags])
    assert words in capsys.readouterr().err
