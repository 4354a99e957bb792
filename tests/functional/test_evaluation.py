"""tools/evaluate_fsae.py and tools/intrinsic_dimension.py on several processes; what users get wrong."""

import json
from pathlib import Path

import numpy
import pytest
import torch

from megatron_fsvideo.checkpoint.release import save_fsae
from megatron_fsvideo.data.video import write_video
from tests.functional.cli import Result, run_cli
from tests.unit.fsae_fixtures import build, config
from tests.unit.judge_fixtures import QuickLogits


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A Standard autoencoder with random weights, five videos, one of them damaged."""
    folder = tmp_path_factory.mktemp("evaluation")
    torch.manual_seed(0)
    save_fsae(folder / "standard", build(config("standard")).float())
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


def test_two_processes_make_the_frechet_distance_of_one(workplace, monkeypatch):
    # The processes are forked from this one, and find it there.
    monkeypatch.setattr("megatron_fsvideo.models.frozen.i3d.load_i3d", lambda path, device: QuickLogits())
    flags = ("--i3d-path", "i3d.safetensors", "--noise", "on", "--num-clips", "2")
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


def test_intrinsic_dimension_of_videos_on_two_processes(workplace):
    flags = ["--load", workplace / "standard", "--num-points", "9", "--max-neighbors", "4", "--sampling", "videos"]
    for size, out in ((1, "dimension1"), (2, "dimension2")):
        words = [*flags, "--num-frames", "9", "1"]
        result = run(workplace, "tools/intrinsic_dimension.py", out, *words, world_size=size)
        assert result.code == 0, result.stderr
        assert "bad.mp4" in result.stderr
    video, image = json.loads((workplace / "dimension1.json").read_text())
    assert [video, image] == json.loads((workplace / "dimension2.json").read_text())
    assert (video["points"], video["features"], image["features"]) == (12, 4 * 3 * 2 * 2, 4 * 2 * 2)
    assert [scale["neighbors"] for scale in image["scales"]] == [2, 4]
    assert all(scale["dimension"] > 0 for scale in video["scales"])


def test_intrinsic_dimension_of_a_file(workplace):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(3000, 3, generator=generator) @ torch.randn(3, 12, generator=generator)
    points[5] = points[4]
    numpy.save(workplace / "points.npy", points.numpy())
    log = workplace / "file.log"
    log.touch()
    words = ["--latents", workplace / "points.npy", "--out", workplace / "file.json"]
    result = run_cli("tools/intrinsic_dimension.py", words, log)
    assert result.code == 0 and "1 duplicate points dropped" in result.stderr
    (line,) = json.loads((workplace / "file.json").read_text())
    assert (line["points"], line["duplicates"]) == (2999, 1)
    for scale in line["scales"]:
        assert scale["dimension"] == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --load and --video-dir, or --latents"),
        (["--load", "x"], "give --load and --video-dir, or --latents"),
        (["--latents", "/nowhere.npy"], "/nowhere.npy does not exist"),
    ],
)
def test_dimension_of_nothing_is_refused(tmp_path, flags, message):
    (tmp_path / "log").touch()
    result = run_cli("tools/intrinsic_dimension.py", flags, tmp_path / "log")
    assert result.code == 1 and message in result.last_line


def test_too_few_clips_are_refused_before_they_are_encoded(workplace):
    flags = ["--load", workplace / "standard", "--num-points", "9", "--sampling", "videos"]
    result = run(workplace, "tools/intrinsic_dimension.py", "few", *flags)
    assert result.code == 1 and "12 points have at most 11 neighbours each, asked for 64" in result.last_line
