"""The files that clips come from: videos, and images, which are videos of one frame."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from megatron_fsvideo.data.images import ImageError, read_image
from megatron_fsvideo.data.listing import IMAGE_SUFFIXES, VIDEO_SUFFIXES, list_files
from megatron_fsvideo.data.video import FrameTable, VideoError, VideoInfo, VideoReader
from megatron_fsvideo.data.video.pixels import resize_and_crop

IMAGE_FPS = 24.0
"""Frames per second of an image, which has none: what the paper's videos have."""


def is_image(path: str | Path) -> bool:
    """Whether a file is an image by its name."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def list_clip_files(folder: str | Path) -> list[Path]:
    """All video and image files below a folder, sorted. An image beside a video of its name is that one's preview.

    Raises:
        ValueError: the folder is missing or has no such file.
    """
    found = list_files(folder, (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES), "video or image")
    videos = {path.with_suffix("") for path in found if not is_image(path)}
    return [path for path in found if not is_image(path) or path.with_suffix("") not in videos]


def measure_image(path: str | Path) -> FrameTable:
    """An image's table.

    Raises:
        VideoError: it cannot be read.
    """
    height, width = _read(path).shape[:2]
    info = VideoInfo(1, height, width, IMAGE_FPS)
    return FrameTable(info, None, Fraction(1), np.zeros(1, np.uint32))


def open_frames(path: str | Path, table: FrameTable | None = None) -> "VideoReader | ImageReader":
    """A reader of a file's frames.

    Args:
        table: the file's measures, if they are known.

    Raises:
        VideoError: the file cannot be read.
    """
    return ImageReader(path, table) if is_image(path) else VideoReader(path, table)


class ImageReader:
    """An image file behind the interface of `VideoReader`: a video of one frame.

    Args:
        table: its measures, if they are known.

    Attributes:
        table, info, timeline: those of a video of one frame.
    """

    def __init__(self, path: str | Path, table: FrameTable | None = None) -> None:
        self.path = path
        self.table = table or measure_image(path)
        self.info, self.timeline = self.table.info, self.table.timeline

    def __enter__(self) -> "ImageReader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Do nothing: no file is open between calls."""

    def read(
        self,
        start: int = 0,
        num_frames: int | None = None,
        *,
        stride: int = 1,
        fps: float | None = None,
        size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Read the image as uint8 [1, h, w, 3]. The arguments are those of `VideoReader.read`.

        Raises:
            VideoError: another frame than the first is asked for, or the file cannot be read.
        """
        if start != 0 or num_frames not in (None, 1):
            raise VideoError(f"{self.path}: is an image, asked for {num_frames} frames from {start}")
        image = _read(self.path)[None]
        return image if size is None else resize_and_crop(image, *size)

    def frames(self, indices: Sequence[int], size: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
        """Yield the image uint8 [h, w, 3] once for each index; every index is 0."""
        for index in indices:
            yield self.read(index, 1, size=size)[0].numpy()


def _read(path: str | Path) -> torch.Tensor:
    try:
        return read_image(path)
    except ImageError as error:
        raise VideoError(str(error)) from error
