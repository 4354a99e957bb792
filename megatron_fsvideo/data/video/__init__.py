"""Video files: measuring, reading and writing them with PyAV.

Videos in memory are `frames [f, h, w, 3]`, uint8, RGB, unless named otherwise; `to_unit` and `from_unit` convert to
and from `video [3, f, h, w]` in [-1, 1]. Frame k is the k-th frame that a player shows: frames are counted as they
decode (frame_table.py), and a seek is used only where timestamps and pixels prove that it landed on the same frames.
"""

from megatron_fsvideo.data.video.container import VideoError
from megatron_fsvideo.data.video.frame_table import FrameTable, VideoInfo, measure, probe
from megatron_fsvideo.data.video.pixels import from_unit, resize_and_crop, resize_short_side, to_unit
from megatron_fsvideo.data.video.reader import VideoReader, iterate_frames, read_video
from megatron_fsvideo.data.video.writer import write_frames, write_video

__all__ = [
    "FrameTable",
    "VideoError",
    "VideoInfo",
    "VideoReader",
    "from_unit",
    "iterate_frames",
    "measure",
    "probe",
    "read_video",
    "resize_and_crop",
    "resize_short_side",
    "to_unit",
    "write_frames",
    "write_video",
]
