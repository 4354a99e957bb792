"""What the autoencoder's tools cannot use ends in one line that says what to do; the rest comes out right."""

import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from megatron_fsvideo.checkpoint.release import save_fsae
from megatron_fsvideo.config import FSAE_PRESETS, FSAEJob, build_job
from megatron_fsvideo.data.video import probe, read_video, write_video
from megatron_fsvideo.models.fsae import FSAE
from tests.functional.cli import run_cli


@pytest.fixture(scope="module")
def fsae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsae") / "release"
    torch.manual_seed(0)
    save_fsae(folder, FSAE(build_job(FSAEJob, FSAE_PRESETS["fsae_debug"]).model))
    return folder


def film(path: Path, num_frames: int, height: int = 32, width: int = 48) -> Path:
    shades = torch.linspace(20, 200, num_frames).to(torch.uint8)
    write_video(path, shades[:, None, None, None].expand(-1, height, width, 3), fps=8)
    return path


# Factor 4 in space and in time: fsae_debug.
SHAPES = {
    "frames, judged": ("evaluate_fsae", ["--num-frames", "6"], r"4k\+1 .*got 6; try 5"),
    "sides, judged": ("evaluate_fsae", ["--resolution", "30"], r"multiples of 4, not 30: give --resolution 28 or 32"),
    "frames, encoded": ("preprocess_latents", ["--buckets", "6x32x32"], r"6.*4k\+1|4k\+1.*6"),
    "sides, encoded": ("preprocess_latents", ["--buckets", "5x30x32"], r"30.*multiple|multiple.*30"),
    "frames, trained": ("pretrain_fsae", ["--num-frames", "6"], r"4k\+1.*6|6.*4k\+1"),
    "sides, trained": ("pretrain_fsae", ["--resolution", "30"], r"30.*multiple|multiple.*30"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_off_the_grid_are_refused(name: str, fsae: Path, tmp_path: Path) -> None:
    script, flags, message = SHAPES[name]
    (tmp_path / "in").mkdir()
    film(tmp_path / "in" / "a.mp4", 12)
    videos = ["--video-dir", tmp_path / "in"]
    arguments = {
        "evaluate_fsae": ["--load", fsae, *videos, "--num-frames", "5", "--short-side", "32", "--resolution", "32"],
        "preprocess_latents": ["--fsae", fsae, *videos, "--output", tmp_path / "out"],
        "pretrain_fsae": ["--preset", "fsae_debug", *videos, "--save", tmp_path / "out"],
    }[script]
    arguments = [*arguments, *(["--out", tmp_path / "out.json"] if script == "evaluate_fsae" else [])]
    folder = "" if script == "pretrain_fsae" else "tools/"
    result = run_cli(f"{folder}{script}.py", [*arguments, *flags], tmp_path / "log")
    assert result.code != 0 and "Traceback" not in result.stderr, result.stderr
    assert re.search(message, result.last_line), result.last_line
    assert not list(tmp_path.glob("out*"))


def test_files_of_any_shape_are_reconstructed(fsae: Path, tmp_path: Path) -> None:
    for num_frames, height, width in ((1, 32, 48), (6, 30, 46)):
        source, target = film(tmp_path / "in.mp4", num_frames, height, width), tmp_path / "out.mp4"
        result = run_cli("tools/reconstruct.py", [source, target, "--load", fsae, "--overwrite"], tmp_path / "log")
        assert result.code == 0, result.stderr
        info = probe(target)
        assert (info.num_frames, info.height, info.width, info.fps) == (num_frames, height, width, 8.0)


def test_variable_frame_rate_is_reconstructed_at_its_times(fsae: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.mp4", tmp_path / "out.mp4"
    seconds = [0.0, 0.1, 0.2, 0.3, 0.9, 1.5, 2.0]
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, second in enumerate(seconds):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 30 * index + 20, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(1000 * second), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for flags, expected in (([], [0, 3, 4, 4, 5, 5, 6]), (["--fps", "2"], [0, 3, 4, 5, 6])):
        arguments = [source, target, "--load", fsae, "--side-by-side", "--quality", "4", "--overwrite", *flags]
        result = run_cli("tools/reconstruct.py", arguments, tmp_path / "log")
        assert result.code == 0, result.stderr
        written = read_video(target)[:, :, :32].float().mean(dim=(1, 2, 3))
        assert [round((float(shade) - 20) / 30) for shade in written] == expected


def test_of_a_file_that_breaks_off_the_rest_is_reconstructed(fsae: Path, tmp_path: Path) -> None:
    whole, cut = film(tmp_path / "whole.mp4", 60), tmp_path / "cut.mp4"
    with av.open(str(whole)) as source, av.open(str(cut), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    cut.write_bytes(cut.read_bytes()[: int(0.8 * cut.stat().st_size)])
    out = tmp_path / "out.mp4"
    result = run_cli("tools/reconstruct.py", [cut, out, "--load", fsae], tmp_path / "log")
    assert result.code == 0, result.stderr
    assert "cut.mp4: truncated: " in result.stderr and 30 < probe(out).num_frames < 60
