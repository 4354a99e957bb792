"""examples/fsae/all_phases.py: every command that it runs, a few iterations each, and its report."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from megatron_fsvideo.data.video import write_video
from tests.functional.cli import ROOT, run_cli

NUM_SHOTS, SHOT_FRAMES = 6, 40


def make_films(folder: Path) -> None:
    """One film of six shots, textures of different colours that move."""
    generator = torch.Generator().manual_seed(0)
    shots = []
    for k in range(NUM_SHOTS):
        texture = torch.rand(3, 12, 14, generator=generator)
        texture = torch.nn.functional.interpolate(texture[None], (144, 160), mode="bilinear")[0] * 0.5
        texture = texture + 0.5 * torch.eye(3)[k % 3].view(3, 1, 1) * (1 if k < 3 else -0.5)
        shots += [texture.roll(frame, dims=2) for frame in range(SHOT_FRAMES)]
    folder.mkdir()
    frames = (torch.stack(shots).clamp(0, 1) * 255).movedim(1, -1).to(torch.uint8)
    write_video(folder / "film.mp4", frames, fps=25, quality=5)


@pytest.mark.slow
def test_six_phases_and_their_report(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    spec = importlib.util.spec_from_file_location("all_phases", ROOT / "examples/fsae/all_phases.py")
    all_phases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(all_phases)
    videos = tmp_path / "videos"
    make_films(videos)
    commands = [all_phases.training(phase, tmp_path, videos, 0.0) for phase in all_phases.FLAGS]
    for script, *argv in [*commands, all_phases.report(tmp_path, videos)]:
        result = run_cli(script, argv, tmp_path / "log")
        assert result.code == 0, result.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    kinds = [(row["phase"], row["first_frame_features"]) for row in report["rows"]]
    assert kinds == [(1, False), (2, False), (3, False), (4, False), (5, False), (5, True), (6, False), (6, True)]
    assert len(report["differences"]) == 4 and all(0 < row["psnr"] < 60 for row in report["rows"])
    assert (tmp_path / "report.md").read_text().count("\n|") > 12
    assert (tmp_path / "reconstructions.png").stat().st_size > 1000
