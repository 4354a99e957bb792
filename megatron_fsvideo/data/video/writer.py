"""Writing H.264 mp4 files."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace

from megatron_fsvideo.data.outputs import replacing


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
    """Write frames uint8 `[h, w, 3]` of `size` (height, width), which come one by one, as H.264 mp4.

    The other arguments are those of `write_video`. The file is written whole or not at all.
    """
    with replacing(path) as temporary:
        with av.open(f"file:{temporary}", "w", format="mp4") as container:
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
