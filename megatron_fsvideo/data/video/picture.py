"""Converts decoded frames to the pictures that a player shows: upright, square pixels, 8-bit RGB of standard range.

A rotation (phones) is applied; 10 and more bits become 8; every pixel format that FFmpeg knows becomes RGB, by the
file's own colour matrix or, where it names none, BT.709 from 720 rows on and BT.601 below, as players do; alpha is
dropped, which leaves the colours below it. Pixels that are not square are scaled to the display size. HDR (PQ, HLG)
and other BT.2020 colours are mapped to BT.709 by FFmpeg's scale filter.
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.filter
import numpy as np
from av.video.reformatter import Colorspace

from megatron_fsvideo.data.video.container import VideoError, shown_name

HD_ROWS = 720
"""From here on a file that does not name its colour matrix has that of HD television."""
MAX_PIXEL_RATIO = 10
"""A pixel's sides that differ more are a damaged header."""

# FFmpeg's numbers, for which PyAV has no names.
_UNSPECIFIED = 2
_BT2020_PRIMARIES = 9
_HDR_TRANSFERS = {16: "HDR (PQ)", 18: "HDR (HLG)"}


def hdr_name(frame: Any) -> str | None:
    """Name of a frame's colours if they need mapping to BT.709; None for those of standard range."""
    if frame.color_trc in _HDR_TRANSFERS:
        return _HDR_TRANSFERS[frame.color_trc]
    return "in BT.2020 colours" if frame.color_primaries == _BT2020_PRIMARIES else None


def pixel_ratio(path: str | Path, stream: Any) -> Fraction:
    """Width over height of a pixel, as PyAV's stream has it.

    Raises:
        VideoError: an incredible shape.
    """
    ratio = stream.sample_aspect_ratio or Fraction(1)
    if not Fraction(1, MAX_PIXEL_RATIO) <= ratio <= MAX_PIXEL_RATIO:
        raise VideoError(f"{shown_name(path)}: has pixels of {ratio.numerator}:{ratio.denominator}, which none is")
    return ratio


def display_size(path: str | Path, frame: Any, ratio: Fraction) -> tuple[int, int]:
    """(height, width) at which a frame of pixels of this ratio is shown, upright.

    Raises:
        VideoError: a slanted rotation.
    """
    height, width = frame.height, max(1, round(frame.width * ratio))
    return (width, height) if _quarter_turns(path, frame) % 2 else (height, width)


class PictureMaker:
    """Makes pictures of the frames of one file.

    Args:
        ratio: width over height of a pixel.
    """

    def __init__(self, path: str | Path, ratio: Fraction = Fraction(1)) -> None:
        self._path = path
        self._ratio = ratio
        self._graph: tuple[tuple, Any] | None = None

    def __call__(self, frame: Any, size: tuple[int, int] | None = None) -> np.ndarray:
        """An upright frame uint8 [h, w, 3], scaled to `size` (height, width) by a fast filter.

        Raises:
            VideoError: this FFmpeg cannot convert the frame's colours.
        """
        turns = _quarter_turns(self._path, frame)
        shown = frame.height, max(1, round(frame.width * self._ratio))
        stored = shown if size is None else size[::-1] if turns % 2 else size
        # Averaging while converting costs a third of converting first and then scaling down.
        method = "BICUBIC" if size is None else "AREA"
        try:
            if hdr_name(frame) is not None:
                rgb = self._map_colours(frame, stored, method.lower())
            else:
                rgb = _convert(frame, stored, method)
        except (av.FFmpegError, OSError) as error:  # colours that a damaged header claims, and no converter knows
            raise VideoError(
                f"{shown_name(self._path)}: frames of {frame.format.name} cannot be shown ({error.strerror})"
            ) from error
        return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb

    def _map_colours(self, frame: Any, size: tuple[int, int], method: str) -> np.ndarray:
        key = (frame.width, frame.height, frame.format.name, size, method, frame.colorspace)
        if self._graph is None or self._graph[0] != key:
            matrix = ":in_color_matrix=bt2020" if frame.colorspace == _UNSPECIFIED else ""
            scale = f"w={size[1]}:h={size[0]}:flags={method}{matrix}"
            scale += ":out_transfer=iec61966-2-1:out_primaries=bt709:intent=perceptual"
            try:
                self._graph = key, _filters(frame, ("scale", scale), ("format", "rgb24"))
            except (av.FFmpegError, ValueError) as error:
                raise VideoError(
                    f"{shown_name(self._path)}: is {hdr_name(frame)}, which PyAV's FFmpeg here cannot map to BT.709 "
                    "(it needs FFmpeg 8, PyAV 16): convert the file, or pip install --upgrade av"
                ) from error
        graph = self._graph[1]
        graph.vpush(frame)
        return graph.vpull().to_ndarray()


def deinterlaced(frames: Iterable[Any]) -> Iterator[Any]:
    """The frames, those of two fields each made one picture (bwdif, which looks at one frame before and after)."""
    graph: Any = None
    for index, frame in enumerate(frames):
        # bwdif asks that times rise, and those of the file may not.
        frame.pts, frame.time_base = index, Fraction(1, 1)
        if graph is None:
            graph = _filters(frame, ("bwdif", "mode=send_frame:deint=interlaced"))
        graph.vpush(frame)
        if index:
            yield graph.vpull()
    if graph is not None:
        graph.vpush(None)
        yield graph.vpull()


def _filters(frame: Any, *filters: tuple[str, str]) -> Any:
    graph = av.filter.Graph()
    last = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1))
    for name, arguments in (*filters, ("buffersink", None)):
        added = graph.add(name, arguments)
        last.link_to(added)
        last = added
    graph.configure()
    return graph


def _convert(frame: Any, size: tuple[int, int], method: str) -> np.ndarray:
    guess = {}
    if frame.colorspace == _UNSPECIFIED and min(frame.height, frame.width) >= HD_ROWS:
        guess["src_colorspace"] = Colorspace.ITU709
    if size == (frame.height, frame.width):
        return frame.to_ndarray(format="rgb24", **guess)
    return frame.to_ndarray(format="rgb24", height=size[0], width=size[1], interpolation=method, **guess)


def _quarter_turns(path: str | Path, frame: Any) -> int:
    """Number of counterclockwise quarter turns that make a frame upright."""
    if frame.rotation % 90:
        raise VideoError(f"{shown_name(path)}: is rotated by {frame.rotation} degrees, multiples of 90 can be read")
    return frame.rotation // 90 % 4
