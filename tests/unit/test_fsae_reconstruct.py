"""tools/reconstruct.py: any length and size, in slices or tiles."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_fsvideo.checkpoint.release import save_fsae
from megatron_fsvideo.data.video import from_unit, read_video, to_unit, write_video
from megatron_fsvideo.models.fsae.tiling import Tiling, pad_to_grid
from tests.unit.fsae_fixtures import build, config
from tools.reconstruct import ReconstructFlags, reconstruct

ROOT = Path(__file__).parents[2]


def film(folder: Path, num_frames: int) -> Path:
    texture = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(0))
    texture = torch.nn.functional.interpolate(texture[None], (36, 50), mode="bilinear")[0] * 255
    frames = torch.stack([texture.roll(k, dims=2) for k in range(num_frames)]).movedim(1, -1).to(torch.uint8)
    write_video(folder / "film.mp4", frames, fps=25)
    return folder / "film.mp4"


@pytest.mark.parametrize("kind", ["causal", "standard", "lite"])
def test_reconstruction_is_that_of_one_call(kind: str, tmp_path: Path) -> None:
    fsae, source = build(config(kind)).float(), film(tmp_path, 11)
    flags = ReconstructFlags(quality=0, side_by_side=True)
    psnr = reconstruct(fsae, str(source), str(tmp_path / "out.mp4"), flags, Tiling(8 if kind == "standard" else 1, 0))
    original = read_video(source)
    video = to_unit(original).unsqueeze(0)
    padded = pad_to_grid(torch.cat([video, video[:, :, -1:], video[:, :, -1:]], dim=2), 8)
    whole = fsae.decode(fsae.encode(padded), fsae.first_frame_features(padded[:, :, :1]))
    expected = from_unit(whole[0, :, :11, :36, :50])
    written = read_video(tmp_path / "out.mp4")
    assert written.shape == (11, 36, 100, 3)
    # 4:2:0 averages colour over 2x2 pixels: luma is what can be compared.
    luma = torch.tensor([0.299, 0.587, 0.114])
    for half, wanted in ((written[:, :, :50], original), (written[:, :, 50:], expected)):
        error = ((half.float() - wanted.float()) @ luma).abs().mean()
        assert error < 6, error
    unit = to_unit(expected)
    error = (unit - video[0]).square().mean(dim=(0, 2, 3)) / 4
    assert psnr == pytest.approx(float((-10 * error.log10()).mean()), abs=0.2)


def test_command_line(tmp_path: Path) -> None:
    save_fsae(tmp_path / "release", build(config("lite")).float())
    source = film(tmp_path, 6)
    tool = [sys.executable, str(ROOT / "tools" / "reconstruct.py")]
    command = [*tool, str(source), str(tmp_path / "out.mp4"), "--load", str(tmp_path / "release"), "--tile-rows", "4"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "PSNR" in result.stdout and read_video(tmp_path / "out.mp4").shape == (6, 36, 50, 3)
    result = subprocess.run([*tool, str(source), "--load", "x"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1 and result.stderr.startswith("error: usage: reconstruct.py IN.mp4 OUT.mp4")
