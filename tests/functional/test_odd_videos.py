"""Videos as they come: what FFmpeg reads is read right, the rest is refused in one line with file and reason."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace

from megatron_fsvideo.checkpoint.release import save_fsae
from megatron_fsvideo.config import FSAE_PRESETS, FSAEJob, build_job
from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.clips import ClipOptions, Source, expand
from megatron_fsvideo.data.manifest import VideoEntry
from megatron_fsvideo.data.video import VideoError, VideoReader, iterate_frames, probe, read_video
from megatron_fsvideo.models.fsae import FSAE
from tests.functional.cli import run_cli

# Four corners whose colours tell which is which.
CORNERS = ((220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 220, 30))
PICTURE = np.zeros((48, 80, 3), np.uint8)
PICTURE[:24, :40], PICTURE[:24, 40:], PICTURE[24:, :40], PICTURE[24:, 40:] = CORNERS


def write(
    path: Path,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    *,
    pictures: list[np.ndarray] | None = None,
    times: list[float] | None = None,
    source: str = "rgb24",
    colorspace: int | None = None,
    prepare: Callable[[Any], None] = lambda stream: None,
) -> Path:
    """One file of these pictures at 8 frames a second, or each at its time in seconds."""
    pictures = pictures or [PICTURE] * 6
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if colorspace is not None:
            stream.codec_context.colorspace, stream.codec_context.color_range = colorspace, ColorRange.MPEG
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        prepare(stream)
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format=source)
            if pix_fmt != source:
                frame = frame.reformat(format=pix_fmt, dst_colorspace=colorspace)
            frame.pts = index
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[index]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def corners(frame: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(int(value) for value in frame[y, x]) for y, x in ((5, 5), (5, -6), (-6, 5), (-6, -6))]


def assert_shows(path: Path, expected: tuple = CORNERS, size: tuple[int, int] = (48, 80), off: int = 4) -> None:
    """Every way of reading agrees."""
    info = probe(path)
    assert (info.height, info.width, info.num_frames) == (*size, 6)
    for frame in (*iterate_frames(path), *read_video(path, 2, 2).numpy()):
        assert frame.shape == (*size, 3)
        assert np.abs(np.subtract(corners(frame), expected)).max() <= off, corners(frame)


FORMATS = {
    "10_bit": ("mkv", "ffv1", "yuv420p10le"),
    "10_bit_hevc": ("mp4", "libx265", "yuv420p10le"),
    "10_bit_422": ("mkv", "ffv1", "yuv422p10le"),
    "10_bit_rgb": ("mkv", "ffv1", "gbrp10le"),
    "444": ("mkv", "ffv1", "yuv444p"),
    "411": ("mkv", "ffv1", "yuv411p"),
    "410": ("mkv", "ffv1", "yuv410p"),
    "rgb": ("mkv", "ffv1", "bgr0"),
    "alpha_first": ("mov", "qtrle", "argb"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_pixel_formats(name, tmp_path):
    suffix, codec, pix_fmt = FORMATS[name]
    quiet = {"x265-params": "log-level=none:crf=4"} if codec == "libx265" else {}
    assert_shows(write(tmp_path / f"a.{suffix}", codec, pix_fmt, prepare=lambda s: setattr(s, "options", quiet)), off=8)


@pytest.mark.parametrize("pix_fmt", ["gray", "gray16le"])
def test_gray(pix_fmt, tmp_path):
    luma = [round(0.299 * r + 0.587 * g + 0.114 * b) for r, g, b in CORNERS]
    assert_shows(write(tmp_path / "a.mkv", "ffv1", pix_fmt), tuple((value,) * 3 for value in luma))


@pytest.mark.parametrize(("suffix", "codec", "pix_fmt"), [("mov", "png", "rgba"), ("mov", "prores_ks", "yuva444p10le")])
def test_alpha_is_dropped(suffix, codec, pix_fmt, tmp_path):
    half = np.dstack([PICTURE, np.full(PICTURE.shape[:2], 128, np.uint8)])
    options = {"profile": "4444"} if codec == "prores_ks" else {}
    path = tmp_path / f"a.{suffix}"
    write(path, codec, pix_fmt, pictures=[half] * 6, source="rgba", prepare=lambda s: setattr(s, "options", options))
    assert_shows(path)


def test_odd_sizes(tmp_path):
    picture = PICTURE[:47, :65]
    path = write(tmp_path / "a.mkv", "ffv1", "yuv420p", pictures=[picture] * 6)
    assert_shows(path, tuple(corners(picture)), (47, 65))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("degrees", [90, -90, 180])
def test_rotated_phone_videos_come_out_upright(suffix, degrees, tmp_path):
    upright = np.rot90(PICTURE, degrees // 90)
    stored = write(tmp_path / f"a.{suffix}", prepare=lambda stream: stream.set_display_rotation(degrees))
    assert_shows(stored, tuple(corners(upright)), upright.shape[:2])
    with VideoReader(stored) as reader:
        small = reader.read(0, 1, short_side=24)[0].numpy()
    assert small.shape[:2] == tuple(side // 2 for side in upright.shape[:2])
    assert np.abs(np.subtract(corners(small), corners(upright))).max() <= 4


def test_slanted_videos_are_refused(tmp_path):
    path = write(tmp_path / "slanted.mp4", prepare=lambda stream: stream.set_display_rotation(45))
    with pytest.raises(VideoError, match=r"slanted.mp4: is rotated by 45 degrees, multiples of 90 can be read"):
        probe(path)


@pytest.mark.parametrize("tagged", [Colorspace.ITU601, Colorspace.ITU709])
def test_the_colour_matrix_is_the_files_own(tagged, tmp_path):
    assert_shows(write(tmp_path / "a.mkv", "ffv1", "yuv444p", colorspace=tagged))


def test_large_frames_that_name_no_colour_matrix_have_that_of_hd(tmp_path):
    large = np.repeat(np.repeat(PICTURE, 15, axis=0), 15, axis=1)
    path = tmp_path / "a.mkv"
    untag = lambda stream: setattr(stream.codec_context, "colorspace", 2)  # noqa: E731
    write(path, "ffv1", "yuv444p", pictures=[large], colorspace=Colorspace.ITU709, prepare=untag)
    (shown,) = iterate_frames(path)
    assert np.abs(np.subtract(corners(shown), CORNERS)).max() <= 4


# 13 frames in 3 s: 0.1 s apart at first, then 0.3 s and more.
TIMES = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.9, 1.2, 1.5, 1.8, 2.4, 3.0]


def shades(frames: Any) -> list[int]:
    """Which picture each frame shows."""
    return [round(float(frame.mean()) / 15) for frame in np.asarray(frames, dtype=np.float32)]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rate_is_sampled_by_time(suffix, tmp_path):
    pictures = [np.full((32, 32, 3), 15 * index, np.uint8) for index in range(len(TIMES))]
    path = write(tmp_path / f"a.{suffix}", pictures=pictures, times=TIMES)
    with VideoReader(path) as reader:
        assert reader.info.num_frames == 13 and reader.info.fps == pytest.approx(12 / 3.0, rel=1e-3)
        every_half_second = [0, 5, 7, 9, 10, 11, 12]
        assert shades(reader.read(0, fps=2)) == every_half_second
        assert shades(reader.read(6, 4, fps=5)) == [6, 7, 7, 8]  # 0.6, 0.8, 1.0, 1.2 s
        # In steps of frames, time does not count.
        assert shades(reader.read(2, 4, stride=3)) == [2, 5, 8, 11]
    entry = VideoEntry(str(path), "a", "", 0, 13)
    clips = expand(entry, Source(entry), ClipOptions((Bucket(5, 32, 32),), fps=2))
    assert [(clip.start, clip.bucket.num_frames) for clip in clips] == [(0, 5)]
    with pytest.raises(VideoError, match="13 frames make 7 at 2 frames per second, the shortest bucket has 9"):
        expand(entry, Source(entry), ClipOptions((Bucket(9, 32, 32),), fps=2))


def test_rounded_times_are_no_variable_frame_rate(tmp_path):
    times = [round(index / 29.97, 3) for index in range(30)]
    path = write(tmp_path / "a.mkv", pictures=[PICTURE] * 30, times=times)
    with VideoReader(path) as reader:
        assert reader.timeline.seconds is None


def write_audio(path: Path, cover: bool = False) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        if cover:
            picture = container.add_stream("png", rate=1)
            picture.height, picture.width, picture.pix_fmt = 48, 80, "rgb24"
            picture.disposition = Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if cover:
            container.mux(picture.encode(av.VideoFrame.from_ndarray(PICTURE, format="rgb24")))
            container.mux(picture.encode())
    return path


def write_bytes(content: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return make


def write_truncated(path: Path) -> Path:
    write(path)
    path.write_bytes(path.read_bytes()[:-400])
    return path


REFUSED = {
    "audio_only": (write_audio, "has no video stream, only audio"),
    "audio_with_a_cover": (lambda path: write_audio(path, cover=True), "has no video stream, only audio"),
    "zero_bytes": (write_bytes(b""), "not a readable video, truncated or damaged"),
    "text": (write_bytes(b"not a video"), "not a readable video, truncated or damaged"),
    "truncated": (write_truncated, "not a readable video, truncated or damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_video_is_refused(name, tmp_path):
    make, reason = REFUSED[name]
    path = make(tmp_path / f"{name}.mp4")
    for read in (probe, read_video, lambda path: list(iterate_frames(path))):
        with pytest.raises(VideoError, match=rf"{name}.mp4: {reason}") as error:
            read(path)
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def fsae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsae") / "release"
    save_fsae(folder, FSAE(build_job(FSAEJob, FSAE_PRESETS["fsae_debug"]).model))
    return folder


@pytest.mark.parametrize("script", ["reconstruct", "evaluate_fsae", "preprocess_latents", "pretrain_fsae"])
@pytest.mark.parametrize("name", ["audio_only", "zero_bytes"])
def test_tools_end_with_one_line(script, name, fsae, tmp_path):
    (tmp_path / "in").mkdir()
    bad = REFUSED[name][0](tmp_path / "in" / f"{name}.mp4")
    out = tmp_path / "out"
    arguments = {
        "reconstruct": [bad, tmp_path / "out.mp4", "--load", fsae],
        "evaluate_fsae": ["--load", fsae, "--video-dir", bad.parent, "--out", tmp_path / "out.json"],
        "preprocess_latents": [
            *("--video-dir", bad.parent, "--fsae", fsae, "--output", out, "--text-encoder", "none"),
            *("--image-encoder", "none", "--buckets", "5x32x32"),
        ],
        "pretrain_fsae": ["--preset", "fsae_debug", "--video-dir", bad.parent, "--save", out],
    }[script]
    folder = "" if script == "pretrain_fsae" else "tools/"
    result = run_cli(f"{folder}{script}.py", arguments, tmp_path / "log")
    assert result.code != 0 and "Traceback" not in result.stderr, result.stderr
    assert f"{name}.mp4" in result.stderr or "video" in result.last_line, result.stderr
    assert not (tmp_path / "out.mp4").exists() and not list(tmp_path.glob("out/iter_*"))


def test_a_rotated_video_is_reconstructed_upright(fsae, tmp_path):
    write(tmp_path / "in.mp4", prepare=lambda stream: stream.set_display_rotation(-90))
    result = run_cli(
        "tools/reconstruct.py", [tmp_path / "in.mp4", tmp_path / "out.mp4", "--load", fsae], tmp_path / "log"
    )
    assert result.code == 0, result.stderr
    info = probe(tmp_path / "out.mp4")
    assert (info.height, info.width, info.num_frames) == (80, 48, 6)
