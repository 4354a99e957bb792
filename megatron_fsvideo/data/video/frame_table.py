"""Table of a video file's frames, made by decoding it once: their number, when each is shown, a mark to recognise it.

Headers and packets do not tell the number of frames. Edit lists hide packets, leading pictures and damaged packets give
no frame, two fields may be two packets, and containers' own counts are often absent or wrong.
"""

import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from megatron_fsvideo.data.video.container import VideoError, shown_name
from megatron_fsvideo.data.video.decoder import Decoder
from megatron_fsvideo.data.video.picture import display_size, hdr_name, pixel_ratio
from megatron_fsvideo.data.video.timeline import Timeline, make_timeline

T = TypeVar("T")

MARK_EVERY = 16
"""Frames from one mark to the next: a file of ten seconds has about twenty."""
PROGRESS_AFTER = 2.0
"""Seconds of work from which on a progress bar is shown."""


@dataclass(frozen=True)
class VideoInfo:
    """Measures of a video file: exact number of frames, upright display size in pixels, mean frames per second."""

    num_frames: int
    height: int
    width: int
    fps: float


@dataclass(frozen=True, eq=False)
class FrameTable:
    """A measured file.

    Attributes:
        info: its measures.
        times: int64, when each frame is shown, rising, in units of `time_base` seconds; None where the file does not
            say, so that it can only be read from its start.
        marks: uint32, `mark_of` each frame whose number is a multiple of `MARK_EVERY`.
        damaged: numbers of the frames that players show, but whose pixels were partly guessed.
        is_sound: whether everything decoded; else it is decoded by one thread, which gives the same each time.
        is_interlaced: whether frames of two fields are among them, which are deinterlaced.
        notes: what a user should know of it.
    """

    info: VideoInfo
    times: np.ndarray | None
    time_base: Fraction
    marks: np.ndarray
    damaged: tuple[int, ...] = ()
    is_sound: bool = True
    is_interlaced: bool = False
    notes: tuple[str, ...] = ()

    @property
    def num_threads(self) -> int:
        """Threads of a decoder of this file; 0 lets FFmpeg choose."""
        return 0 if self.is_sound else 1

    @cached_property
    def timeline(self) -> Timeline:
        """When the frames are shown, in seconds."""
        return _timeline(self.times, self.time_base, self.info.num_frames, self.info.fps)


def probe(path: str | Path) -> VideoInfo:
    """Measure a file. Decodes it once.

    Raises:
        VideoError: not a video, or nothing in it decodes.
    """
    return measure(path).info


def measure(path: str | Path) -> FrameTable:
    """The table of a file. Decodes it once, without making pictures; warns of what does not decode.

    Raises:
        VideoError: not a video, nothing in it decodes, or its frames change their size.
    """
    return measure_while(path, lambda frames: deque(frames, maxlen=0))[0]


def measure_while(path: str | Path, use: Callable[[Iterator[Any]], T]) -> tuple[FrameTable, T]:
    """Measure a file and pass PyAV's frames to `use` in the same pass. A damaged file needs a second pass.

    Raises:
        VideoError: not a video, nothing in it decodes, or its frames change their size.
    """
    with _Measuring(path, num_threads=0) as measuring:
        used = use(measuring.frames())
        table = measuring.table()
    # Several threads may lose the frames around an error, and do not always tell of it.
    if measuring.lost_frames:
        with _Measuring(path, num_threads=1) as measuring:
            used = use(measuring.frames())
            table = measuring.table()
    for note in table.notes:
        print(f"note: {shown_name(path)}: {note}", file=sys.stderr, flush=True)
    return table, used


def mark_of(frame: Any) -> int:
    """A number that tells frames apart by their pixels: a checksum of every eighth row of the first plane."""
    plane, form = frame.planes[0], frame.format
    rows = np.frombuffer(plane, np.uint8).reshape(-1, abs(plane.line_size))[: frame.height : 8]
    if form.is_planar:
        bits = 8 * (1 + (form.components[0].bits - 1) // 8)
    else:
        bits = form.padded_bits_per_pixel
    # The rest of a row is padding, whose bytes mean nothing.
    return zlib.crc32(np.ascontiguousarray(rows[:, : frame.width * bits // 8]))


class _Measuring:
    """One pass over a file: its frames, and then its table."""

    def __init__(self, path: str | Path, num_threads: int) -> None:
        self._path = path
        self._decoder = Decoder(path, num_threads)
        self._times: list[int | None] = []
        self._marks: list[int] = []
        self._damaged: list[int] = []
        self._size: tuple[int, int] | None = None
        self._is_interlaced = False
        self._hdr: str | None = None

    def __enter__(self) -> "_Measuring":
        return self

    def __exit__(self, *error: object) -> None:
        self._decoder.close()

    def frames(self) -> Iterator[Any]:
        """PyAV's frames, noted on their way."""
        expected = self._decoder.stream.frames or None
        with tqdm(total=expected, desc=Path(self._path).name, unit="frame", delay=PROGRESS_AFTER, disable=None) as bar:
            for index, frame in enumerate(self._decoder.frames()):
                if self._size is None:
                    self._size = display_size(self._path, frame, pixel_ratio(self._path, self._decoder.stream))
                    self._hdr = hdr_name(frame)
                self._times.append(frame.pts)
                if index % MARK_EVERY == 0:
                    self._marks.append(mark_of(frame))
                if frame.is_corrupt:
                    self._damaged.append(index)
                self._is_interlaced |= frame.interlaced_frame
                yield frame
                bar.update()

    @property
    def lost_frames(self) -> bool:
        """Whether some packets became no frame, or a damaged one."""
        return bool(self._damaged) or len(self._times) < self._decoder.num_packets

    def table(self) -> FrameTable:
        """The table, once all frames have passed."""
        name, decoder, num_frames = shown_name(self._path), self._decoder, len(self._times)
        if self._size is None:
            raise VideoError(f"{name}: no frame decodes" + (f" ({decoder.broke_off})" if decoder.broke_off else ""))
        rate = decoder.stream.average_rate or decoder.stream.base_rate
        if not rate:
            raise VideoError(f"{name}: does not say its frame rate")
        times = None if None in self._times else np.array(self._times, np.int64)
        if times is not None and (np.diff(times) <= 0).any():
            times = None
        time_base = decoder.stream.time_base
        timeline = _timeline(times, time_base, num_frames, float(rate))
        return FrameTable(
            VideoInfo(num_frames, *self._size, timeline.fps),
            times,
            time_base,
            np.array(self._marks, np.uint32),
            tuple(self._damaged),
            not self._damaged and not decoder.num_failed,
            self._is_interlaced,
            tuple(self._notes(num_frames)),
        )

    def _notes(self, num_frames: int) -> Iterator[str]:
        decoder = self._decoder
        promised = decoder.stream.frames
        if decoder.num_failed:
            yield f"{decoder.num_failed} of {decoder.num_packets} packets do not decode; {num_frames} frames do"
        if self._damaged:
            yield f"{len(self._damaged)} of {num_frames} frames are damaged, the first is frame {self._damaged[0]}"
        if decoder.broke_off is not None:
            yield f"breaks off after {num_frames} frames ({decoder.broke_off})"
        elif decoder.num_read < promised:
            yield f"truncated: {decoder.num_read} of {promised} frames are there"
        if self._is_interlaced:
            yield "is interlaced; its fields are deinterlaced"
        if self._hdr is not None:
            yield f"is {self._hdr}; its colours are mapped to BT.709"


def _timeline(times: np.ndarray | None, time_base: Fraction, num_frames: int, fps: float) -> Timeline:
    seconds = None if times is None else [float(time * time_base) for time in times.tolist()]
    return make_timeline(seconds, num_frames, fps)
