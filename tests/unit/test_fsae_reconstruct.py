"""tools/reconstruct.py: any length and size, in slices or tiles."""

import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch

from megatron_fsvideo.checkpoint.release import save_fsae
from megatron_fsvideo.data.video import from_unit, read_video, to_unit, write_video
from megatron_fsvideo.models.codecs import FSAECodec
from megatron_fsvideo.models.fsae.tiling import Tiling, pad_to_grid
from tests.unit.fsae_fixtures import build, config, count_attention
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
    codec = FSAECodec(fsae, tiling=Tiling(8 if kind == "standard" else 1, 0))
    calls = count_attention(fsae)
    psnr = reconstruct(codec, str(source), str(tmp_path / "out.mp4"), flags)
    assert calls.keys() == set(range(len(fsae.decoder.first_frame))), "an attention to the first frame is not called"
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
    command += ["--slice-frames", "1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "PSNR" in result.stdout and read_video(tmp_path / "out.mp4").shape == (6, 36, 50, 3)
    result = subprocess.run([*tool, str(source), "--load", "x"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1 and result.stderr.startswith("error: usage: reconstruct.py IN.mp4 OUT.mp4")


@pytest.mark.parametrize("kind, calls", [("causal", 0), ("standard", 1), ("lite", 1)])
def test_the_first_frame_is_encoded_once(
    kind: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many slices and tiles attend to it; a causal decoder has no use for it."""
    fsae, source, seen = build(config(kind)).float(), film(tmp_path, 9), []
    whole = fsae.encoder.stage_outputs

    def counted(*arguments):
        seen.append(arguments[0])
        return whole(*arguments)

    monkeypatch.setattr(fsae.encoder, "stage_outputs", counted)
    tiling = Tiling(frames=2, overlap_frames=1, rows=4, columns=4, overlap=1)
    codec = FSAECodec(fsae, tiling=tiling)
    reconstruct(codec, str(source), str(tmp_path / "out.mp4"), ReconstructFlags())
    assert len(seen) == calls
    first = pad_to_grid(to_unit(read_video(source)[:1]).unsqueeze(0), 8)
    assert all(torch.equal(frame, first) for frame in seen)
    reconstruct(codec, str(source), str(tmp_path / "out.mp4"), ReconstructFlags(first_frame=False))
    assert len(seen) == calls


@pytest.mark.parametrize("side_by_side", [False, True])
def test_odd_sides(side_by_side: bool, tmp_path: Path) -> None:
    """H.264's frames have even sides: those written have one row and column more, copies of the last."""
    frames = read_video(film(tmp_path, 6))[:, :35, :49].contiguous()
    source, fsae = tmp_path / "odd.mkv", build(config()).float()
    with av.open(str(source), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 35, 49, "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
        container.mux(stream.encode())
    flags = ReconstructFlags(quality=0, side_by_side=side_by_side)
    psnr = reconstruct(FSAECodec(fsae, tiling=Tiling(1, 0)), str(source), str(tmp_path / "out.mp4"), flags)
    written = read_video(tmp_path / "out.mp4").float()
    assert written.shape == (6, 36, 98 if side_by_side else 50, 3)
    video = to_unit(torch.cat([frames, frames[-1:].expand(3, -1, -1, -1)])).unsqueeze(0)
    expected = from_unit(fsae.decode(fsae.encode(pad_to_grid(video, 8)))[0, :, :6, :35, :49])
    luma = torch.tensor([0.299, 0.587, 0.114])
    assert (((written[:, :35, -49:] if side_by_side else written[:, :35, :49]) - expected) @ luma).abs().mean() < 6
    assert ((written[:, 35] - written[:, 34]) @ luma).abs().mean() < 6
    error = (to_unit(expected) - video[0, :, :6]).square().mean(dim=(0, 2, 3)) / 4
    assert psnr == pytest.approx(float((-10 * error.log10()).mean()), abs=0.2), "of the frames, not of what was added"
