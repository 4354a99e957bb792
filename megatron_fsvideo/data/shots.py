"""Shot boundaries, and the split of a collection into training and held-out shots.

A clip that crosses a cut teaches a model that scenes jump, and a held-out clip from a training shot measures memory:
so clips are cut inside shots, and whole shots are held out. The detector is deliberately simple: two frames belong to
different shots when they differ far more than the frames around them do, and either their colours are distributed
differently (histogram distance) or their thumbnails differ much (mean absolute difference). Dark frames (fades through
black) end a shot and belong to none. A slow dissolve is not found: it stays inside one shot, on one side of the split.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_fsvideo.data.frame_files import is_image, measure_image
from megatron_fsvideo.data.video import FrameTable
from megatron_fsvideo.data.video.frame_table import measure_while
from megatron_fsvideo.data.video.picture import PictureMaker

THUMBNAIL = (36, 64)
BINS = 8
"""Histogram bins per colour."""
HISTOGRAM_CUT = 0.35
"""Share of the pixels that changed their colour bin."""
DIFFERENCE_FLOOR = 0.06
"""A cut moves the thumbnail's mean absolute difference (of 1) by at least this."""
DIFFERENCE_CUT = 0.15
"""A difference this large is a cut without a change of the histogram."""
STANDS_OUT = 2.0
"""A cut is this many times the median difference of the three steps before and after."""
MIN_SHOT_FRAMES = 17
"""Shorter shots are dropped unless asked for: the quickstart's autoencoder trains on 17 frames."""
DARK = 0.05
"""Mean brightness (of 1) under which a frame is black."""


@dataclass(frozen=True, order=True)
class Shot:
    """Frames [start, start + num_frames) of a file, without a cut inside."""

    path: str
    start: int
    num_frames: int

    @property
    def end(self) -> int:
        """The frame after the last."""
        return self.start + self.num_frames

    @property
    def name(self) -> str:
        """Stable name of the shot: file and range."""
        return f"{Path(self.path).name}:{self.start}-{self.end}"


def find_shots(path: str | Path, min_frames: int = MIN_SHOT_FRAMES) -> list[Shot]:
    """Shots of a file with at least `min_frames` frames, in order. Decodes the whole file once.

    Raises:
        VideoError: the file is damaged.
    """
    ranges = scan_shots(path)[1]
    return [Shot(str(path), start, end - start) for start, end in ranges if end - start >= min_frames]


def scan_shots(path: str | Path) -> tuple[FrameTable, list[tuple[int, int]]]:
    """A file's table and the ranges [start, end) of its shots, in one pass. Damaged frames belong to no shot.

    An image is a shot of one frame.

    Raises:
        VideoError: not a video, nothing in it decodes, or its frames change their size.
    """
    if is_image(path):
        return measure_image(path), [(0, 1)]
    picture = PictureMaker(path)
    table, ranges = measure_while(path, lambda frames: detect_shots(picture(frame, THUMBNAIL) for frame in frames))
    return table, [part for found in ranges for part in _without(found, table.damaged)]


def detect_shots(frames: Iterable[np.ndarray]) -> list[tuple[int, int]]:
    """Ranges [start, end) of the shots of uint8 `[h, w, 3]` frames (small ones do: THUMBNAIL)."""
    dark, histogram_steps, differences = _measure(frames)
    num_frames = len(dark)
    starts = {0} | {k + 1 for k in range(num_frames - 1) if _is_cut(histogram_steps, differences, k)}
    ranges = []
    begin: int | None = None
    for k in range(num_frames + 1):
        ends_here = k == num_frames or dark[k] or k in starts
        if begin is not None and ends_here:
            ranges.append((begin, k))
            begin = None
        if k < num_frames and not dark[k] and begin is None:
            begin = k
    return ranges


def _without(found: tuple[int, int], damaged: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The parts of a range between damaged frames."""
    start, end = found
    for number in (*(n for n in damaged if start <= n < end), end):
        if start < number:
            yield start, number
        start = number + 1


def split_shots(shots: Sequence[Shot], holdout_every: int) -> tuple[list[Shot], list[Shot]]:
    """Divide shots into training and held-out shots.

    Of a file with at least `holdout_every` shots, every `holdout_every`-th shot is held out. Of the files with fewer,
    in order, every `holdout_every`-th file is held out whole.

    The split depends on the list alone, so the autoencoder's training, the DiT's and the evaluation agree on it as long
    as they make the list with the same `find_shots(path, min_frames)`. 0 holds out none.

    Raises:
        ValueError: `holdout_every` is negative or 1 (nothing would be left to train on).
    """
    if holdout_every < 0 or holdout_every == 1:
        raise ValueError(f"holdout_every must be 0 (none) or at least 2, got {holdout_every}")
    if holdout_every == 0:
        return sorted(shots), []
    files: dict[str, list[Shot]] = {}
    for shot in sorted(shots):
        files.setdefault(shot.path, []).append(shot)
    held_out: set[Shot] = set()
    small = 0
    for own in files.values():
        if len(own) >= holdout_every:
            held_out.update(own[holdout_every - 1 :: holdout_every])
            continue
        small += 1
        if small % holdout_every == 0:
            held_out.update(own)
    return [shot for shot in sorted(shots) if shot not in held_out], sorted(held_out)


def _measure(
    frames: Iterable[np.ndarray],
) -> tuple[list[bool], list[float], list[float]]:
    """Per frame: is it dark; per step to the next frame: histogram distance and mean absolute difference, both 0..1."""
    dark: list[bool] = []
    histogram_steps: list[float] = []
    differences: list[float] = []
    previous: tuple[np.ndarray, np.ndarray] | None = None
    for frame in frames:
        thumbnail = frame.astype(np.float32) / 255.0
        dark.append(float(thumbnail.mean()) < DARK)
        bins = (frame // (256 // BINS)).reshape(-1, 3).astype(np.int64)
        codes = (bins[:, 0] * BINS + bins[:, 1]) * BINS + bins[:, 2]
        histogram = np.bincount(codes, minlength=BINS**3) / len(codes)
        if previous is not None:
            histogram_steps.append(float(np.abs(histogram - previous[0]).sum() / 2))
            differences.append(float(np.abs(thumbnail - previous[1]).mean()))
        previous = histogram, thumbnail
    return dark, histogram_steps, differences


def _is_cut(histogram_steps: Sequence[float], differences: Sequence[float], k: int) -> bool:
    """Is there a cut between frames k and k + 1?"""
    around = [*differences[max(0, k - 3) : k], *differences[k + 1 : k + 4]]
    # A pan or a flash changes many steps in a row, a cut one: compare with the neighbours.
    if around and differences[k] < STANDS_OUT * float(np.median(around)):
        return False
    recoloured = histogram_steps[k] > HISTOGRAM_CUT and differences[k] > DIFFERENCE_FLOOR
    return recoloured or differences[k] > DIFFERENCE_CUT
