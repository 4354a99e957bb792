"""Mutated video files, seeded: each is read or refused in one line that names it, in time."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from megatron_fsvideo.data.shots import scan_shots
from megatron_fsvideo.data.video import VideoError, VideoReader

SEED = 8
SECONDS_PER_FILE = 10
KINDS = {
    "mp4": ("libx264", "yuv420p"),
    "mkv": ("libx265", "yuv420p10le"),
    "webm": ("libvpx-vp9", "yuv420p"),
    "avi": ("mpeg4", "yuv420p"),
    "ts": ("mpeg2video", "yuv420p"),
    "mov": ("prores_ks", "yuv422p10le"),
    "gif": ("gif", "rgb8"),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small whole file of each kind."""
    folder = tmp_path_factory.mktemp("originals")
    files = {}
    for suffix, (codec, pix_fmt) in KINDS.items():
        path = folder / f"a.{suffix}"
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=25)
            stream.height, stream.width, stream.pix_fmt = 48, 64, pix_fmt
            if codec == "libx265":
                stream.options = {"x265-params": "log-level=none", "preset": "ultrafast"}
            elif codec == "libvpx-vp9":
                stream.options = {"deadline": "realtime", "cpu-used": "8"}
            for k in range(20):
                picture = np.random.default_rng(k // 10).integers(0, 200, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
                frame = av.VideoFrame.from_ndarray(np.roll(picture, 2 * k, axis=1), format="rgb24")
                container.mux(stream.encode(frame.reformat(format=pix_fmt)))
            container.mux(stream.encode())
        files[suffix] = path.read_bytes()
    return files


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """With some bytes changed, a block lost, doubled or zeroed, or the end cut off."""
    content = bytearray(data)
    kind = rng.integers(5)
    if kind == 0:
        for place in rng.integers(0, len(content), rng.integers(1, 30)):
            content[place] = rng.integers(256)
        return bytes(content)
    start = int(rng.integers(len(content)))
    end = min(len(content), start + int(rng.integers(1, 2000)))
    if kind == 1:
        return bytes(content[:start])
    if kind == 2:
        return bytes(content[:start] + content[end:])
    if kind == 3:
        return bytes(content[:end] + content[start:end] + content[end:])
    content[start:end] = bytes(end - start)
    return bytes(content)


def mutations(originals: dict[str, bytes], folder: Path, seed: int) -> Iterator[Path]:
    rng = np.random.default_rng(seed)
    while True:
        for suffix, data in originals.items():
            path = folder / f"mutated.{suffix}"
            path.write_bytes(mutated(data, rng))
            yield path


def outcome(path: Path) -> str:
    """What comes of a file, for the report; a traceback or a hang fails the test."""
    began = time.perf_counter()
    try:
        table, ranges = scan_shots(path)
        with VideoReader(path, table) as reader:
            last = table.info.num_frames - 1
            for start in {0, last}:
                shape = next(reader.frames([start], allow_damaged=True)).shape
                assert shape == (table.info.height, table.info.width, 3)
        assert all(0 <= start < end <= table.info.num_frames for start, end in ranges)
        said = "read"
    except VideoError as error:
        assert path.name in str(error) and "\n" not in str(error)
        said = "refused"
    assert time.perf_counter() - began < SECONDS_PER_FILE
    return said


def test_mutated_videos_are_read_or_refused(originals, tmp_path):
    stop = time.process_time() + 8
    found: Counter[str] = Counter()
    for path in mutations(originals, tmp_path, SEED):
        found[outcome(path)] += 1
        if time.process_time() > stop or found.total() == 140:
            break
    assert found["read"] and found["refused"], found


@pytest.mark.slow
def test_three_hundred_mutated_videos(originals, tmp_path):
    slowest, found = 0.0, Counter()
    for count, path in enumerate(mutations(originals, tmp_path, SEED + 1)):
        if count == 300:
            break
        began = time.perf_counter()
        found[outcome(path)] += 1
        slowest = max(slowest, time.perf_counter() - began)
    print(f"300 mutated videos: {dict(found)}, slowest {slowest:.2f} s")
    assert found.total() == 300
