"""Reading frames of video files by their numbers, in any order, with the memory of what is returned."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from megatron_fsvideo.data.video.container import VideoError, shown_name
from megatron_fsvideo.data.video.decoder import Decoder
from megatron_fsvideo.data.video.frame_table import MARK_EVERY, FrameTable, VideoInfo, mark_of, measure
from megatron_fsvideo.data.video.picture import PictureMaker, deinterlaced, pixel_ratio
from megatron_fsvideo.data.video.pixels import resize_and_crop, scaled_size
from megatron_fsvideo.data.video.timeline import Timeline

SEEK_FROM = 64
"""Decoding and discarding this many frames costs less than a second opening of the file with a seek."""


def iterate_frames(path: str | Path, size: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
    """All frames of a file, one `[h, w, 3]` uint8 RGB array at a time.

    Args:
        size: (height, width) to scale each frame to while converting; a fast filter, meant for analysis.

    Raises:
        VideoError: nothing in it decodes.
    """
    with VideoReader(path) as reader:
        yield from reader.frames(range(reader.info.num_frames), size, allow_damaged=True)


def read_video(
    path: str | Path,
    start: int = 0,
    num_frames: int | None = None,
    *,
    stride: int = 1,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Read frames `start`, `start + stride`, ... as uint8 `[num_frames, h, w, 3]`.

    Args:
        start: number of the first source frame.
        num_frames: frames to return; None reads to the end.
        stride: source frames per returned frame.
        fps: sample at this rate instead (the nearest source frame each time); excludes `stride`.
        size: (height, width): scaled to cover it, then cropped around the centre.

    Raises:
        VideoError: damaged, or too short for the range asked for.
    """
    with VideoReader(path) as reader:
        return reader.read(start, num_frames, stride=stride, fps=fps, size=size)


class VideoReader:
    """A video file. Clips read in rising order cost one pass over the file; any order gives the same frames.

    Args:
        path: the file.
        table: its measures, if they are known; else the file is decoded once to find them.

    Attributes:
        path: the file.
        table: its measures.
    """

    def __init__(self, path: str | Path, table: FrameTable | None = None) -> None:
        self.path = path
        self.table = table or measure(path)
        self._decoder: Decoder | None = None
        self._raw: Iterator[Any] = iter(())
        self._position = 0
        self._recent: list[tuple[int, Any]] = []
        self._seeks = self.table.times is not None and self.table.is_sound

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def info(self) -> VideoInfo:
        """The file's measures."""
        return self.table.info

    @property
    def timeline(self) -> Timeline:
        """Times at which the file's frames are shown."""
        return self.table.timeline

    def close(self) -> None:
        """Close the file; reading again opens it."""
        if self._decoder is not None:
            self._decoder.close()
        self._decoder, self._raw, self._position, self._recent = None, iter(()), 0, []

    def read(
        self,
        start: int = 0,
        num_frames: int | None = None,
        *,
        stride: int = 1,
        fps: float | None = None,
        size: tuple[int, int] | None = None,
        short_side: int | None = None,
    ) -> torch.Tensor:
        """Read a clip as uint8 `[num_frames, h, w, 3]`. The arguments are those of `read_video`.

        `short_side` scales larger videos down while they are decoded, which is much faster than afterwards.
        """
        if fps is not None and stride != 1:
            raise ValueError(f"read_video takes stride or fps, got stride {stride} and fps {fps}")
        if fps is not None:
            indices = self.timeline.clip_indices(start, num_frames, fps)
        elif num_frames is None:
            indices = list(range(start, self.info.num_frames, stride))
        else:
            indices = list(range(start, start + num_frames * stride, stride))
        scaled = None
        if short_side is not None and short_side < min(self.info.height, self.info.width):
            scaled = scaled_size(self.info.height, self.info.width, short_side)
        # Each frame is cut as it comes: those of a clip at the file's own size may not fit into memory.
        frames = (torch.from_numpy(frame) for frame in self.frames(indices, scaled))
        return torch.stack([frame if size is None else resize_and_crop(frame[None], *size)[0] for frame in frames])

    def frames(
        self, indices: Sequence[int], size: tuple[int, int] | None = None, *, allow_damaged: bool = False
    ) -> Iterator[np.ndarray]:
        """The frames of these numbers, which do not fall, one `[h, w, 3]` uint8 RGB array at a time.

        Args:
            size: (height, width) to scale each frame to while converting.
            allow_damaged: give damaged frames as players show them.

        Raises:
            VideoError: a number that the file does not have, or a damaged frame.
        """
        self._check(indices, allow_damaged)
        wanted = iter(indices)
        index = next(wanted)
        picture: PictureMaker | None = None
        for number, frame in enumerate(self._frames_between(indices[0], indices[-1]), start=indices[0]):
            if number < index:
                continue
            assert self._decoder is not None
            picture = picture or PictureMaker(self.path, pixel_ratio(self.path, self._decoder.stream))
            shown = picture(frame, size)
            while number == index:
                yield shown
                index = next(wanted, -1)

    def _check(self, indices: Sequence[int], allow_damaged: bool) -> None:
        name, num_frames = shown_name(self.path), self.info.num_frames
        if not indices or indices[0] < 0 or indices[-1] >= num_frames:
            wanted = f"frames {indices[0]} to {indices[-1]}" if indices else "none"
            raise VideoError(f"{name}: has {num_frames} frames, asked for {wanted}")
        if not allow_damaged and (hit := set(indices).intersection(self.table.damaged)):
            raise VideoError(f"{name}: frame {min(hit)} is damaged")

    def _frames_between(self, first: int, last: int) -> Iterator[Any]:
        """PyAV's frames first ... last, both included."""
        if not self.table.is_interlaced:
            yield from self._raw_between(first, last)
            return
        begin = max(0, first - 1)
        fields = self._raw_between(begin, min(last + 1, self.info.num_frames - 1))
        for number, frame in enumerate(deinterlaced(fields), start=begin):
            if first <= number <= last:
                yield frame

    def _raw_between(self, first: int, last: int) -> Iterator[Any]:
        """PyAV's frames as they were decoded."""
        if self._recent and self._recent[0][0] <= first < self._position:
            yield from (frame for number, frame in self._recent if first <= number <= last)
            first = self._position
        else:
            self._go_to(first)
        while self._position <= last:
            number, frame = self._position, next(self._raw, None)
            if frame is None:
                self.close()
                raise VideoError(f"{shown_name(self.path)}: frame {number} does not decode; has the file changed?")
            self._position += 1
            if number < first:
                self._recent = []
                continue
            if self._seeks and not self._is_expected(number, frame):
                # Decoding from the start decides, and no seek in this file is trusted again.
                self._seeks = False
                yield from self._raw_between(number, last)
                return
            self._recent = [*self._recent[-2:], (number, frame)]
            yield frame

    def _go_to(self, first: int) -> None:
        """Make `first`, or a frame not far before it, the next that `_raw` gives."""
        if self._decoder is not None and self._position <= first <= self._position + SEEK_FROM:
            return
        if self._seeks and first >= SEEK_FROM and self._seek(first // MARK_EVERY * MARK_EVERY):
            return
        if self._decoder is None or first < self._position:
            self._restart()

    def _restart(self) -> Decoder:
        self.close()
        self._decoder = Decoder(self.path, self.table.num_threads)
        self._raw = self._decoder.frames()
        return self._decoder

    def _seek(self, number: int) -> bool:
        """Make the marked frame `number` the next, if a seek finds it with the time and the pixels that it should have.

        After a seek into an open group of pictures, or past a damaged keyframe, decoders show frames that no player
        that came from the start would show.
        """
        times = self.table.times
        assert times is not None
        decoder = self._restart()
        try:
            decoder.seek(int(times[number]))
            for frame in self._raw:
                if frame.pts is not None and frame.pts >= times[number]:
                    break
            else:
                frame = None
        except (VideoError, av.FFmpegError):
            frame = None  # Decoding from the start decides whether the file can be read.
        if frame is None or not self._is_expected(number, frame):
            self.close()
            return False
        self._raw = _chain(frame, self._raw)
        self._position = number
        return True

    def _is_expected(self, number: int, frame: Any) -> bool:
        times, marks = self.table.times, self.table.marks
        assert times is not None
        if frame.pts != times[number]:
            return False
        return number % MARK_EVERY != 0 or mark_of(frame) == marks[number // MARK_EVERY]


def _chain(frame: Any, frames: Iterator[Any]) -> Iterator[Any]:
    yield frame
    yield from frames
