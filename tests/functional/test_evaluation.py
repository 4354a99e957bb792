"""tools/evaluate_fsae.py and tools/intrinsic_dimension.py on several processes; what users get wrong."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from megatron_fsvideo.checkpoint.release import save_fsae
from megatron_fsvideo.data.video import write_video
from tests.functional.cli import Result, run_cli
from tests.unit.fsae_fixtures import build, config
from tests.unit.judge_fixtures import random_i3d


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A Standard autoencoder with random weights, I3D weights, five videos, one of them damaged."""
    folder = tmp_path_factory.mktemp("evaluation")
    torch.manual_seed(0)
    save_fsae(folder / "standard", build(config("standard")).float())
    safetensors.torch.save_file(random_i3d().state_dict(), folder / "i3d.safetensors")
    (folder / "films").mkdir()
    generator = torch.Generator().manual_seed(1)
    for name in "abcd":
        still = torch.randint(40, 256, (1, 32, 48, 3), generator=generator, dtype=torch.uint8)
        frames = torch.cat([still.roll(k, dims=2) for k in range(20)])
        write_video(folder / "films" / f"{name}.mp4", frames, fps=12)
    (folder / "films" / "bad.mp4").write_bytes((folder / "films" / "a.mp4").read_bytes()[:700])
    return folder


def run(folder: Path, script: str, out: str, *argv: str | Path, world_size: int = 1) -> Result:
    log = folder / f"{out}.log"
    log.touch()
    words = ["--video-dir", folder / "films", "--num-frames", "9", "--resolution", "16", "--short-side", "32"]
    return run_cli(script, [*words, "--device", "cpu", "--out", folder / f"{out}.json", *argv], log, world_size)


def evaluate(folder: Path, out: str, *argv: str | Path, world_size: int = 1) -> Result:
    flags = ["--load", folder / "standard", "--sampling", "videos", "--num-clips", "3"]
    return run(folder, "tools/evaluate_fsae.py", out, *flags, *argv, world_size=world_size)


def compare_one_and_two(folder: Path, name: str, *argv: str | Path) -> dict:
    """The report of two processes, which is that of one, as the two other files are."""
    for size, out in ((1, f"{name}1"), (2, f"{name}2")):
        result = evaluate(folder, out, *argv, world_size=size)
        assert result.code == 0, result.stderr
        assert result.stderr.count("skipped") == 1 and "bad.mp4" in result.stderr
    alone, pair = (json.loads((folder / f"{name}{size}.json").read_text()) for size in (1, 2))
    assert alone == pair
    for suffix in (".latents.json", ".png"):
        assert (folder / f"{name}1{suffix}").read_bytes() == (folder / f"{name}2{suffix}").read_bytes()
    return pair


def test_two_processes_make_the_report_of_one(workplace):
    report = compare_one_and_two(workplace, "plain", "--num-shown", "2")
    assert [row["name"] for row in report["table"]] == ["FSAE-Standard", "FSAE-Standard, no noise"]
    assert report["clips"]["count"] == 3
    assert report["table"][0]["values"] != report["table"][1]["values"]


def test_two_processes_make_the_frechet_distance_of_one(workplace):
    flags = ("--i3d-path", workplace / "i3d.safetensors", "--noise", "on", "--num-clips", "2")
    report = compare_one_and_two(workplace, "frechet", *flags)
    assert report["fvd"] > 1


def test_more_processes_than_clips(workplace):
    result = evaluate(workplace, "three", "--num-clips", "2", "--noise", "off", world_size=3)
    assert result.code == 0, result.stderr
    report = json.loads((workplace / "three.json").read_text())
    assert report["clips"]["count"] == 2 and len(report["table"]) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resolution", "20"], "multiples of 8, not 20: give --resolution 16 or 24"),
        (["--num-frames", "45"], "none of the 4 videos"),
        (["--compare", "wan:/nowhere"], "wan:/nowhere is not a folder"),
        (["--i3d-path", "/nowhere.pt"], "i3d_path /nowhere.pt does not exist"),
    ],
)
def test_mistakes_are_one_line(workplace, flags, message):
    result = evaluate(workplace, "mistake", *flags)
    assert result.code == 1 and result.last_line.startswith("error: ") and message in result.last_line
