"""Random clips of video files for training the autoencoder, and fixed clips of held-out shots for judging it.

Clip number n of a run is a function of (seed, n) alone: which shot, which frames, which crop, mirrored or not. So a
restarted run sees the same clips, and any number of ranks the same union. Videos are scaled to a common short side;
a collection that fits into the cache is decoded once and stays in memory, else each clip is read from its file.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_fsvideo.config import VideoDataConfig
from megatron_fsvideo.data.listing import list_videos
from megatron_fsvideo.data.shots import Shot, find_shots, split_shots
from megatron_fsvideo.data.video import (
    VideoError,
    VideoInfo,
    VideoReader,
    iterate_frames,
    probe,
    resize_short_side,
    to_unit,
)
from megatron_fsvideo.parallel.seeds import sample_generator

GIB = 1 << 30


class ClipDataset:
    """Clips from a list of shots of one or several files.

    Args:
        shots: without cuts inside.
        short_side: pixels to which videos are scaled.
        seed: of the random clips.
        max_frame_stride: random clips take every frame, every second, ... up to this, as far as the shot is long.
        cache_gib: decoded frames up to this size are kept in memory.

    Raises:
        ValueError: no shots.
    """

    def __init__(
        self, shots: Sequence[Shot], short_side: int, seed: int, max_frame_stride: int = 1, cache_gib: float = 4.0
    ) -> None:
        if not shots:
            raise ValueError("no shots to take clips from: the videos are too short, or all of them are held out")
        self.shots = list(shots)
        self.short_side = short_side
        self.seed = seed
        self.max_frame_stride = max_frame_stride
        self._readers: dict[str, VideoReader] = {}
        self._frames = self._decode_all() if self._size_in_memory() <= cache_gib * GIB else None

    def random_clip(self, number: int, num_frames: int, resolution: int) -> Tensor:
        """Clip `number` of the endless random sequence: [3, num_frames, resolution, resolution] in [-1, 1]."""
        generator = sample_generator(self.seed, number, 0, "clip")
        weights = torch.tensor([max(0, shot.num_frames - num_frames + 1) for shot in self.shots], dtype=torch.float64)
        if not weights.any():
            longest = max(shot.num_frames for shot in self.shots)
            raise ValueError(f"no shot has {num_frames} frames; the longest has {longest}")
        index = int(torch.multinomial(weights, 1, generator=generator))
        shot = self.shots[index]
        longest_stride = min(self.max_frame_stride, (shot.num_frames - 1) // max(1, num_frames - 1))
        stride = 1 + _draw(longest_stride - 1, generator)
        start = _draw(shot.num_frames - 1 - (num_frames - 1) * stride, generator)
        frames = self._read(index, start, num_frames, stride)
        top = _draw(frames.shape[1] - resolution, generator)
        left = _draw(frames.shape[2] - resolution, generator)
        crop = frames[:, top : top + resolution, left : left + resolution]
        return to_unit(crop.flip(2) if _draw(1, generator) else crop)

    def random_batch(self, first: int, count: int, num_frames: int, resolution: int) -> Tensor:
        """Clips `first` to `first + count - 1` as [count, 3, num_frames, resolution, resolution]."""
        return torch.stack([self.random_clip(first + k, num_frames, resolution) for k in range(count)])

    def fixed_clips(self, count: int, num_frames: int, resolution: int) -> Tensor:
        """About `count` clips spread evenly over shots and time, cropped around the centre, the same every time.

        Returns:
            [n, 3, num_frames, resolution, resolution]; n is `count` rounded up to as many per shot.

        Raises:
            ValueError: no shot is long enough.
        """
        long_enough = [k for k, shot in enumerate(self.shots) if shot.num_frames >= num_frames]
        if not long_enough:
            raise ValueError(f"no shot has {num_frames} frames")
        per_shot = -(-count // len(long_enough))
        clips = []
        for index in long_enough:
            last = self.shots[index].num_frames - num_frames
            for start in np.linspace(0, last, per_shot).round().astype(int):
                frames = self._read(index, int(start), num_frames)
                top, left = (frames.shape[1] - resolution) // 2, (frames.shape[2] - resolution) // 2
                clips.append(to_unit(frames[:, top : top + resolution, left : left + resolution]))
        return torch.stack(clips)

    def _read(self, index: int, offset: int, num_frames: int, stride: int = 1) -> Tensor:
        """uint8 [num_frames, h, w, 3] of a shot: frames offset, offset + stride, ... of it."""
        if self._frames is not None:
            return self._frames[index][offset : offset + (num_frames - 1) * stride + 1 : stride]
        shot = self.shots[index]
        if shot.path not in self._readers:
            self._readers[shot.path] = VideoReader(shot.path)
        frames = self._readers[shot.path].read(shot.start + offset, num_frames, stride=stride)
        return resize_short_side(frames, self.short_side)

    def _size_in_memory(self) -> int:
        sizes = {path: scaled_size(probe(path), self.short_side) for path in {shot.path for shot in self.shots}}
        return sum(shot.num_frames * 3 * sizes[shot.path][0] * sizes[shot.path][1] for shot in self.shots)

    def _decode_all(self) -> list[Tensor]:
        """Every shot's frames; one pass over each file."""
        frames: list[Tensor] = [torch.empty(0)] * len(self.shots)
        for path in sorted({shot.path for shot in self.shots}):
            size = scaled_size(probe(path), self.short_side)
            mine = [(k, shot) for k, shot in enumerate(self.shots) if shot.path == path]
            wanted = {n for _, shot in mine for n in range(shot.start, shot.end)}
            decoded = {n: frame for n, frame in enumerate(iterate_frames(path, size)) if n in wanted}
            for index, shot in mine:
                frames[index] = torch.from_numpy(np.stack([decoded[n] for n in range(shot.start, shot.end)]))
        return frames


def open_clips(data: VideoDataConfig, seed: int) -> tuple[ClipDataset, ClipDataset | None]:
    """The training clips and the held-out clips (None with `holdout_every` 0) below `data.video_dir`.

    Damaged files are named on stderr and skipped.

    Raises:
        ValueError: no folder given, no videos, or no shot long enough.
    """
    if data.video_dir is None:
        raise ValueError("no videos to train on: give --video-dir FOLDER")
    shots = _find_all_shots(list_videos(Path(data.video_dir)))
    train, held_out = split_shots(shots, data.holdout_every)
    # Only after the split, which must not depend on the clips' length.
    train, held_out = ([shot for shot in part if shot.num_frames >= data.num_frames] for part in (train, held_out))
    if data.holdout_every and not held_out:
        raise ValueError(
            f"holdout_every {data.holdout_every} holds out none of the {len(shots)} shots with {data.num_frames} "
            "frames: use a smaller value, or 0"
        )
    if not train:
        raise ValueError(
            f"none of the {len(shots)} shots below {data.video_dir} that are left for training has {data.num_frames} "
            "frames: lower num_frames, or give longer videos"
        )
    validation = ClipDataset(held_out, data.short_side, seed, cache_gib=data.cache_gib) if held_out else None
    return ClipDataset(train, data.short_side, seed, data.max_frame_stride, data.cache_gib), validation


def _find_all_shots(paths: Sequence[Path]) -> list[Shot]:
    shots: list[Shot] = []
    for path in paths:
        try:
            shots.extend(find_shots(path))
        except VideoError as error:
            print(f"skipped a damaged video: {error}", file=sys.stderr, flush=True)
    return shots


def scaled_size(info: VideoInfo, short_side: int) -> tuple[int, int]:
    """(height, width) of a video scaled to a short side."""
    scale = short_side / min(info.height, info.width)
    return round(info.height * scale), round(info.width * scale)


def _draw(largest: int, generator: torch.Generator) -> int:
    """A whole number in 0..largest."""
    return int(torch.randint(largest + 1, (1,), generator=generator))
