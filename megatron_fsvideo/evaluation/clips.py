"""The clips that autoencoders are judged on: the same for each of them, whatever the number of processes.

`shots` takes clips inside shots, so that none crosses a cut, from those that training held out if it held out any.
`videos` takes each file as it is, as Table 2's protocol does: one clip from its beginning, or several spread over it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megatron_fsvideo.config import VideoDataConfig
from megatron_fsvideo.data.frame_files import list_clip_files, open_frames
from megatron_fsvideo.data.listing import INDEX_FOLDER
from megatron_fsvideo.data.shot_index import ShotIndex
from megatron_fsvideo.data.shots import Shot, split_shots
from megatron_fsvideo.data.video import VideoError, resize_short_side, to_unit
from megatron_fsvideo.data.video.frame_table import PROGRESS_AFTER
from megatron_fsvideo.parallel.team import Team

Sampling = Literal["shots", "videos"]


@dataclass(frozen=True)
class ClipList:
    """The clips that are evaluated.

    Attributes:
        clips: ranges of frames, in order.
        skipped: file -> why none of its frames is judged.
        index: what is known of the files.
    """

    clips: tuple[Shot, ...]
    skipped: dict[str, str]
    index: ShotIndex


def list_clips(data: VideoDataConfig, sampling: Sampling, count: int, team: Team) -> ClipList:
    """`count` clips of `data.num_frames` spread evenly over the shots or videos below `data.video_dir`.

    Args:
        data: `holdout_every` takes every n-th shot of each file, 0 takes all.
        count: with fewer shots or videos than that, each gives equally many, rounded up.
        team: the files are dealt to its processes; all of them get the same list.

    Raises:
        ValueError: no folder, no videos, or none that can be read and is long enough.
    """
    if data.video_dir is None:
        raise ValueError("no videos to judge: give --video-dir FOLDER")
    if count < 1:
        raise ValueError(f"num_clips must be at least 1, got {count}")
    paths = list_clip_files(data.video_dir)
    index = ShotIndex(data.video_dir, data.shot_index or Path(data.video_dir) / INDEX_FOLDER)
    mine = list(team.share(paths))
    bar = tqdm(mine, desc="shots", unit="video", delay=PROGRESS_AFTER, disable=None if team.leads else True)
    for line in team.gather({k: index.line(path) for k, path in bar}).values():
        index.remember(line)
    looked_at = {k: _look_at(path, sampling, index) for k, path in enumerate(paths)}
    skipped = {str(paths[k]): found for k, found in looked_at.items() if isinstance(found, str)}
    ranges = [shot for found in looked_at.values() if not isinstance(found, str) for shot in found]
    if sampling == "shots" and data.holdout_every and ranges:
        found, ranges = len(ranges), split_shots(ranges, data.holdout_every)[1]
        if not ranges:
            raise ValueError(
                f"none of the {found} shots below {data.video_dir} is held out by holdout_every {data.holdout_every}, "
                "which is the training's unless you give it: judge all shots with --holdout-every 0"
            )
    if len(skipped) == len(paths):
        raise ValueError(f"none of the {len(paths)} videos below {data.video_dir} can be read: {min(skipped.values())}")
    long_enough = [shot for shot in ranges if shot.num_frames >= data.num_frames]
    if not long_enough:
        longest = max((shot.num_frames for shot in ranges), default=0)
        raise ValueError(
            f"none of the {len(ranges)} {sampling} below {data.video_dir} has {data.num_frames} frames (the longest "
            f"has {longest}; {len(skipped)} files were skipped): lower num_frames"
            + (", or judge all shots with --holdout-every 0" if data.holdout_every else "")
        )
    if sampling == "videos":
        short = [shot for shot in ranges if shot.num_frames < data.num_frames]
        skipped |= {shot.path: f"has {shot.num_frames} frames, needs {data.num_frames}" for shot in short}
    return ClipList(tuple(_spread(long_enough, count, data.num_frames)), skipped, index)


def read_clip(clip: Shot, data: VideoDataConfig, index: ShotIndex | None = None) -> Tensor:
    """[1, 3, f, side, side] in [-1, 1]: every frame, resized to the short side (bilinear, antialiased), centre crop.

    Args:
        index: what is known of the file; None decodes it once to find out.

    Raises:
        VideoError: the file is damaged there.
    """
    with open_frames(clip.path) if index is None else index.open(clip.path) as reader:
        frames = resize_short_side(reader.read(clip.start, clip.num_frames), data.short_side)
    side = data.resolution
    top, left = (frames.shape[1] - side) // 2, (frames.shape[2] - side) // 2
    return to_unit(frames[:, top : top + side, left : left + side]).unsqueeze(0)


def _look_at(path: Path, sampling: Sampling, index: ShotIndex) -> list[Shot] | str:
    """The ranges of a file that clips may come from, or why there are none."""
    try:
        return index.shots(path) if sampling == "shots" else [Shot(str(path), 0, index.info(path).num_frames)]
    except VideoError as error:
        return str(error)


def _spread(ranges: Sequence[Shot], count: int, num_frames: int) -> list[Shot]:
    if count < len(ranges):
        chosen = torch.linspace(0, len(ranges) - 1, count, dtype=torch.float64).round().long().tolist()
        return [Shot(ranges[k].path, ranges[k].start, num_frames) for k in chosen]
    each = -(-count // len(ranges))
    return [
        Shot(shot.path, shot.start + int(offset), num_frames)
        for shot in ranges
        for offset in np.linspace(0, shot.num_frames - num_frames, each).round()
    ]
