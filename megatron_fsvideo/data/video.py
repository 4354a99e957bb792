"""Reading, writing and measuring video files with PyAV.

Videos in memory are `frames [f, h, w, 3]`, uint8, RGB, unless named otherwise; `to_unit` and `from_unit` convert to
and from `video [3, f, h, w]` in [-1, 1]. Frame numbers are exact for any file that decodes: they count decoded
frames, and a seek is used only where the timestamps prove that it landed on the same frames.

What files bring along: a rotation (phones) is applied; 10 and more bits become 8; every pixel format that FFmpeg knows
becomes RGB, by the file's own colour matrix or, where it names none, BT.709 from 720 rows on and BT.601 below, as
players do; alpha is dropped, which leaves the colours below it; with variable frame rate, `fps` samples by time.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace

from megatron_fsvideo.data.timeline import Timeline, make_timeline

# From here on a file that does not name its colour matrix has that of HD television.
HD_ROWS = 720
_UNSPECIFIED = 2  # FFmpeg's AVCOL_SPC_UNSPECIFIED; PyAV has no name for it

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")

# Decoding and discarding this many frames costs less than a second opening of the file with a seek.
SEEK_FROM = 64


class VideoError(ValueError):
    """A video file that cannot be read as asked. The message is one line that names the file."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds: exact number of frames, upright size in pixels, mean frames per second."""

    num_frames: int
    height: int
    width: int
    fps: float


def list_videos(folder: str | Path) -> list[Path]:
    """All video files below a folder, sorted by path.

    Raises:
        ValueError: the folder is missing or has no video file.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{folder} is not a folder of videos")
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if not found:
        raise ValueError(f"no video file below {folder} (looked for {' '.join(VIDEO_SUFFIXES)})")
    return found


def probe(path: str | Path) -> VideoInfo:
    """Measure a file by walking its packets, without decoding: containers' own frame counts are often absent or wrong.

    Raises:
        VideoError: not a video, or fewer packets than the header promises (a truncated file).
    """
    container, stream = _open(path)
    with container:
        return _probe(path, container, stream).info


def iterate_frames(path: str | Path, size: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
    """Decode a file from its first frame, one `[h, w, 3]` uint8 RGB array at a time.

    Args:
        size: (height, width) to scale each frame to while converting; a fast filter, meant for analysis.

    Raises:
        VideoError: the file is damaged or ends before the frame its header promises.
    """
    container, stream = _open(path)
    with container:
        promised = stream.frames
        count = 0
        for frame in _decode(path, container, stream):
            yield _rgb(path, frame, size)
            count += 1
        if count < promised:
            raise VideoError(f"{path}: truncated or damaged: {count} of {promised} frames decode")
        if not count:
            raise VideoError(f"{path}: no frame decodes")


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
    """An open video file. Clips read in rising order cost one pass over the file; any order is exact.

    Attributes:
        path: the file.
        info: its exact measures.
        timeline: when its frames are shown.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        container, stream = _open(path)
        with container:
            found = _probe(path, container, stream)
        self.info, self.timeline, self._timestamps = found.info, found.timeline, found.timestamps
        self._container: Any = None
        self._decoder: Iterator[Any] = iter(())
        self._position = 0

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; reading again opens it."""
        if self._container is not None:
            self._container.close()
            self._container, self._decoder = None, iter(())

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
        """As `read_video`; `short_side` scales larger videos down while decoding, much faster than afterwards."""
        if fps is not None and stride != 1:
            raise ValueError(f"read_video takes stride or fps, got stride {stride} and fps {fps}")
        if fps is not None:
            indices = self.timeline.clip_indices(start, num_frames, fps)
        elif num_frames is None:
            indices = list(range(start, self.info.num_frames, stride))
        else:
            indices = list(range(start, start + num_frames * stride, stride))
        if not indices or indices[-1] >= self.info.num_frames or start < 0:
            wanted = f"frames {start} to {indices[-1]}" if indices else f"a frame from {start}"
            raise VideoError(f"{self.path}: has {self.info.num_frames} frames, asked for {wanted}")
        first, last = indices[0], indices[-1]
        wanted_offsets = {index - first for index in indices}
        scaled = None if short_side is None else _scaled_size(self.info, short_side)
        decoded = {
            k: _rgb(self.path, frame, scaled) for k, frame in enumerate(self._range(first, last)) if k in wanted_offsets
        }
        frames = torch.from_numpy(np.stack([decoded[index - first] for index in indices]))
        return frames if size is None else resize_and_crop(frames, *size)

    def _range(self, first: int, last: int) -> list[Any]:
        """Decoded frames first..last, both included."""
        if self._container is None or first < self._position or first > self._position + SEEK_FROM:
            if first >= SEEK_FROM and (frames := self._seek(first, last)) is not None:
                return frames
            if self._container is None or first < self._position:
                self._restart()
        frames = list(islice(self._decoder, first - self._position, last + 1 - self._position))
        if len(frames) < last + 1 - first:
            self.close()
            raise VideoError(f"{self.path}: truncated or damaged: frame {first + len(frames)} does not decode")
        self._position = last + 1
        return frames

    def _restart(self) -> tuple[Any, Any]:
        self.close()
        self._container, stream = _open(self.path)
        self._decoder, self._position = _decode(self.path, self._container, stream), 0
        return self._container, stream

    def _seek(self, first: int, last: int) -> list[Any] | None:
        """Frames first..last by a seek, or None (and a restart due) unless it gave exactly their timestamps."""
        if self._timestamps is None:
            return None
        wanted = self._timestamps[first : last + 1]
        container, stream = self._restart()
        frames: list[Any] = []
        try:
            container.seek(wanted[0], stream=stream, backward=True)
            for frame in self._decoder:
                if frame.pts is not None and frame.pts < wanted[0]:
                    continue
                if frame.pts != wanted[len(frames)]:
                    break
                frames.append(frame)
                if len(frames) == len(wanted):
                    self._position = last + 1
                    return frames
        except (VideoError, av.FFmpegError):
            pass  # The slow way decides whether the file is damaged.
        self.close()
        return None


def write_video(
    path: str | Path,
    frames: torch.Tensor,
    fps: float,
    quality: int = 18,
    *,
    full_color: bool = False,
    keyframe_interval: int | None = None,
) -> None:
    """Write uint8 `[f, h, w, 3]` as H.264 mp4, whole or not at all (a temporary file is renamed at the end).

    Args:
        fps: frames per second.
        quality: x264's constant rate factor: 0 is lossless up to the colour subsampling, 18 hard to tell from the
            source, 28 small.
        full_color: store colour at full resolution (4:4:4; few players show it). Otherwise 4:2:0, which every player
            shows and which needs even sides.
        keyframe_interval: frames from one keyframe to the next; None leaves it to x264.

    Raises:
        ValueError: frames of another shape or type, or odd sides (4:2:0 needs even ones).
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"write_video takes uint8 [f, h, w, 3], got {frames.dtype} {list(frames.shape)}")
    height, width = frames.shape[1:3]
    if (height % 2 or width % 2) and not full_color:
        raise ValueError(f"H.264 video needs even sides, got {height}x{width} (height x width) for {path}")
    write_frames(path, iter(frames), (height, width), fps, quality, full_color, keyframe_interval)


def write_frames(
    path: str | Path,
    frames: Iterable[torch.Tensor],
    size: tuple[int, int],
    fps: float,
    quality: int = 18,
    full_color: bool = False,
    keyframe_interval: int | None = None,
) -> None:
    """As `write_video`, for frames uint8 `[h, w, 3]` of `size` (height, width) that come one by one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width = size
            stream.pix_fmt = "yuv444p" if full_color else "yuv420p"
            stream.options = {"crf": str(quality), "preset": "veryfast"}
            # What the conversion below uses; players take BT.709 for large frames that name nothing.
            stream.codec_context.colorspace = Colorspace.ITU601
            stream.codec_context.color_range = ColorRange.MPEG
            if keyframe_interval is not None:
                stream.options |= {"g": str(keyframe_interval), "sc_threshold": "0"}
            for frame in frames:
                array = np.ascontiguousarray(frame.cpu().numpy())
                container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
            container.mux(stream.encode())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def resize_short_side(frames: torch.Tensor, short_side: int) -> torch.Tensor:
    """Scale uint8 `[f, h, w, 3]` so that the short side has `short_side` pixels; the long side is rounded."""
    height, width = frames.shape[1:3]
    scale = short_side / min(height, width)
    return _resize(frames, round(height * scale), round(width * scale))


def resize_and_crop(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Scale uint8 `[f, h, w, 3]` until it covers height x width, keep the aspect ratio, crop around the centre."""
    source_height, source_width = frames.shape[1:3]
    scale = max(height / source_height, width / source_width)
    scaled = _resize(
        frames,
        max(height, round(source_height * scale)),
        max(width, round(source_width * scale)),
    )
    top, left = (scaled.shape[1] - height) // 2, (scaled.shape[2] - width) // 2
    return scaled[:, top : top + height, left : left + width].contiguous()


def to_unit(frames: torch.Tensor) -> torch.Tensor:
    """uint8 `[..., f, h, w, 3]` -> fp32 `[..., 3, f, h, w]` in [-1, 1]."""
    return frames.movedim(-1, -4).float().div_(127.5).sub_(1.0)


def from_unit(video: torch.Tensor) -> torch.Tensor:
    """`[..., 3, f, h, w]` in [-1, 1] (clamped) -> uint8 `[..., f, h, w, 3]`."""
    return video.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8).movedim(-4, -1).contiguous()


def _resize(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if frames.shape[1:3] == (height, width):
        return frames
    # Without antialiasing, shrinking a video makes edges flicker, which an autoencoder then has to learn.
    scaled = F.interpolate(frames.movedim(-1, 1), size=(height, width), mode="bilinear", antialias=True)
    return scaled.movedim(1, -1).contiguous()


def _open(path: str | Path) -> tuple[Any, Any]:
    """(container, video stream); close the container. PyAV's errors become VideoError with the file's name."""
    if not Path(path).is_file():
        raise VideoError(f"{path}: no such file")
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: not a readable video, truncated or damaged ({error.strerror})") from error
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        kind = "only audio" if container.streams.audio else "nothing to see"
        container.close()
        raise VideoError(f"{path}: has no video stream, {kind}")
    stream = streams[0]
    stream.thread_type = "AUTO"
    return container, stream


def _scaled_size(info: VideoInfo, short_side: int) -> tuple[int, int]:
    """(height, width) with this short side, or the video's own if that is smaller."""
    scale = min(1.0, short_side / min(info.height, info.width))
    return round(info.height * scale), round(info.width * scale)


@dataclass(frozen=True)
class _Probed:
    """timestamps: of the frames in order, in the stream's unit; None where some are missing."""

    info: VideoInfo
    timeline: Timeline
    timestamps: list[int] | None


def _probe(path: str | Path, container: Any, stream: Any) -> _Probed:
    timestamps, first = [], None
    try:
        for packet in container.demux(stream):
            if packet.size:
                timestamps.append(packet.pts)
            # Only a frame knows how it is rotated.
            first = first or next(iter(packet.decode()), None)
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: truncated or damaged after {len(timestamps)} frames ({error.strerror})") from error
    if len(timestamps) < stream.frames:
        raise VideoError(f"{path}: truncated: {len(timestamps)} of {stream.frames} frames are there")
    if first is None:
        raise VideoError(f"{path}: has no frame that decodes")
    rate = stream.average_rate or stream.base_rate
    if not rate:
        raise VideoError(f"{path}: does not say its frame rate")
    known = sorted(timestamps) if None not in timestamps and len(set(timestamps)) == len(timestamps) else None
    seconds = None if known is None else [float(time * stream.time_base) for time in known]
    timeline = make_timeline(seconds, len(timestamps), float(rate))
    height, width = (first.height, first.width)[:: -1 if _quarter_turns(path, first) % 2 else 1]
    return _Probed(VideoInfo(len(timestamps), height, width, timeline.fps), timeline, known)


def _quarter_turns(path: str | Path, frame: Any) -> int:
    """How often to turn a frame counterclockwise until it is upright."""
    if frame.rotation % 90:
        raise VideoError(f"{path}: is rotated by {frame.rotation} degrees, multiples of 90 can be read")
    return frame.rotation // 90 % 4


def _decode(path: str | Path, container: Any, stream: Any) -> Iterator[Any]:
    count = 0
    try:
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise VideoError(f"{path}: frame {count} is damaged")
            yield frame
            count += 1
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: truncated or damaged after {count} frames ({error.strerror})") from error


def _rgb(path: str | Path, frame: Any, size: tuple[int, int] | None = None) -> np.ndarray:
    """An upright frame uint8 [h, w, 3], scaled to `size` (height, width)."""
    turns = _quarter_turns(path, frame)
    stored = size[::-1] if size is not None and turns % 2 else size
    guess = {}
    if frame.colorspace == _UNSPECIFIED and min(frame.height, frame.width) >= HD_ROWS:
        guess["src_colorspace"] = Colorspace.ITU709
    if stored is None or stored == (frame.height, frame.width):
        rgb = frame.to_ndarray(format="rgb24", **guess)
    else:
        # Averaging while converting costs a third of converting first and then scaling down.
        rgb = frame.to_ndarray(format="rgb24", height=stored[0], width=stored[1], interpolation="AREA", **guess)
    return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb
