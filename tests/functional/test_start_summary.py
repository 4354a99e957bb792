"""A run says once what it runs, where it begins and saves, and each checkpoint that it has saved."""

import contextlib
import re
import sys
from math import prod
from pathlib import Path

import torch
import torch.distributed.checkpoint as distributed_checkpoint

import pretrain_dit
import pretrain_fsae
from megatron_fsvideo.checkpoint.save_folder import iteration_folder
from megatron_fsvideo.data.video import write_video
from tests.functional.runs import debug_arguments, run_to_end
from tests.latent_fixtures import write_latent_dataset


def dit_main() -> None:
    """What a run prints goes to the log that keeps its stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        pretrain_dit.main()


def fsae_main() -> None:
    with contextlib.redirect_stdout(sys.stderr):
        pretrain_fsae.main()


def printed(argv: list[str], log: Path, world_size: int, main=dit_main) -> list[str]:
    run_to_end(argv, log, world_size, main)
    return log.read_text().splitlines()


def test_a_dit_on_two_stages(tmp_path):
    data = write_latent_dataset(tmp_path / "data", buckets=("5x32x32", "1x32x32"))
    save = tmp_path / "run"
    flags = ["--pipeline-model-parallel-size", "2", "--save-interval", "2", "--keep-checkpoints", "1"]
    lines = printed(debug_arguments(data, save, *flags, "--train-iters", "3"), tmp_path / "log1", 2)
    metadata = distributed_checkpoint.FileSystemReader(iteration_folder(save, 3)).read_metadata()
    sizes = [prod(t.size) for key, t in metadata.state_dict_metadata.items() if key.startswith("dit.model.")]
    text = "\n".join(lines)
    assert f"dit: {sum(sizes):,} parameters; adam, lr 0.0001, fp32" in lines
    assert "layout: 2 processes on cpu: pipeline 2 parallel" in lines
    assert f"data: 24 samples in {data}: 12 of 1x32x32 (batches of 4), 12 of 5x32x32 (batches of 2)" in lines
    assert "begins with random weights" in lines
    assert f"iterations 1 to 3; saves to {save} every 2 iterations and at the end, the newest 1 are kept" in lines
    saved = re.findall(r"saved iteration (\d+) to (\S+): [\d.]+ MB in [\d.]+ s", text)
    assert saved == [("2", str(iteration_folder(save, 2))), ("3", str(iteration_folder(save, 3)))], text
    again = printed(debug_arguments(data, save, *flags, "--train-iters", "4"), tmp_path / "log2", 2)
    assert f"continues {save} after iteration 3" in again and "iterations 4 to 4; " in "\n".join(again)


def test_an_autoencoder(tmp_path):
    (tmp_path / "videos").mkdir()
    frames = torch.randint(0, 255, (20, 32, 32, 3), dtype=torch.uint8)
    write_video(tmp_path / "videos/a.mp4", frames, 8)
    argv = ["--preset", "fsae_debug", "--video-dir", str(tmp_path / "videos"), "--train-iters", "1"]
    lines = printed(argv, tmp_path / "log", 1, fsae_main)
    text = "\n".join(lines)
    assert re.search(r"^fsae: [\d,]+ parameters; adam, ", text, re.M), text
    assert f"data: 1 shots of 1 files in {tmp_path / 'videos'}; batches of " in text
    assert "iterations 1 to 1; nothing is saved (no --save)" in lines
    buckets = ["--buckets", "5x32x32", "9x32x32", "--image-fraction", "0"]
    text = "\n".join(printed([*argv, *buckets], tmp_path / "log2", 1, fsae_main))
    assert re.search(r"batches of \d+ of 5x32x32 \(1 shots\), \d+ of 9x32x32 \(1 shots\)$", text, re.M), text
