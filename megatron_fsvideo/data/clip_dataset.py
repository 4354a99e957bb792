"""Random clips of video files for training the autoencoder, and fixed clips of held-out shots for judging it.

Clip number n of a run is a function of (seed, n) alone: which shot, which frames, which crop, mirrored or not. So a
restarted run sees the same clips, and any number of ranks the same union. Videos are scaled to a common short side;
a collection that fits into the cache is decoded once and stays in memory, else each clip is read from its file.
"""

from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_fsvideo.config import VideoDataConfig
from megatron_fsvideo.data.draws import WeightedDraw, draw
from megatron_fsvideo.data.frame_files import is_image, list_clip_files
from megatron_fsvideo.data.listing import INDEX_FOLDER
from megatron_fsvideo.data.shot_index import ShotIndex, find_all_shots
from megatron_fsvideo.data.shots import Shot, split_shots
from megatron_fsvideo.data.video import resize_short_side, to_unit
from megatron_fsvideo.data.video.pixels import scaled_size
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
        index: what is known of the files; None decodes each of them once to find out.

    Raises:
        ValueError: no shots.
    """

    def __init__(
        self,
        shots: Sequence[Shot],
        short_side: int,
        seed: int,
        max_frame_stride: int = 1,
        cache_gib: float = 4.0,
        index: ShotIndex | None = None,
    ) -> None:
        if not shots:
            raise ValueError("no shots to take clips from: the videos are too short, or all of them are held out")
        self.shots = list(shots)
        self.short_side = short_side
        self.seed = seed
        self.max_frame_stride = max_frame_stride
        self.index = index or ShotIndex(".")
        self._draws: dict[int, WeightedDraw] = {}
        self._frames = self._decode_all() if self._size_in_memory() <= cache_gib * GIB else None

    def random_clip(self, number: int, num_frames: int, resolution: int) -> Tensor:
        """Clip `number` of the endless random sequence: [3, num_frames, resolution, resolution] in [-1, 1]."""
        generator = sample_generator(self.seed, number, 0, "clip")
        index = self._draw_of(num_frames)(generator)
        shot = self.shots[index]
        longest_stride = max(1, min(self.max_frame_stride, (shot.num_frames - 1) // max(1, num_frames - 1)))
        stride = 1 + draw(longest_stride - 1, generator)
        start = draw(shot.num_frames - 1 - (num_frames - 1) * stride, generator)
        frames = self._read(index, start, num_frames, stride)
        top = draw(frames.shape[1] - resolution, generator)
        left = draw(frames.shape[2] - resolution, generator)
        crop = frames[:, top : top + resolution, left : left + resolution]
        return to_unit(crop.flip(2) if draw(1, generator) else crop)

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
        # Closed each time: the next clip is elsewhere, and decoders hold memory and threads.
        with self.index.open(shot.path) as reader:
            frames = reader.read(shot.start + offset, num_frames, stride=stride)
        return resize_short_side(frames, self.short_side)

    def _draw_of(self, num_frames: int) -> WeightedDraw:
        """Draws shots by the number of clips of this length that they hold."""
        if num_frames not in self._draws:
            weights = np.array([max(0, shot.num_frames - num_frames + 1) for shot in self.shots])
            if not weights.any():
                longest = max(shot.num_frames for shot in self.shots)
                raise ValueError(f"no shot has {num_frames} frames; the longest has {longest}")
            self._draws[num_frames] = WeightedDraw(weights)
        return self._draws[num_frames]

    def _size_in_memory(self) -> int:
        return sum(shot.num_frames * 3 * prod(self._scaled_size(shot.path)) for shot in self.shots)

    def _scaled_size(self, path: str) -> tuple[int, int]:
        info = self.index.info(path)
        return scaled_size(info.height, info.width, self.short_side)

    def _decode_all(self) -> list[Tensor]:
        """Every shot's frames; one pass over each file."""
        frames: list[Tensor] = [torch.empty(0)] * len(self.shots)
        mine: dict[str, list[int]] = {}
        for k, shot in enumerate(self.shots):
            mine.setdefault(shot.path, []).append(k)
        for path, numbers in sorted(mine.items()):
            size = self._scaled_size(path)
            with self.index.open(path) as reader:
                for k in sorted(numbers, key=lambda k: self.shots[k]):
                    shot = self.shots[k]
                    decoded = list(reader.frames(range(shot.start, shot.end), size))
                    frames[k] = torch.from_numpy(np.stack(decoded))
        return frames


def open_clips(data: VideoDataConfig, seed: int) -> tuple[ClipDataset, ClipDataset | None]:
    """The training clips below `data.video_dir`, and the held-out clips of it or of `data.valid_video_dir`, if any.

    Damaged files are named on stderr and skipped.

    Raises:
        ValueError: no folder given, no videos, or no shot long enough.
    """
    if data.video_dir is None:
        raise ValueError("no videos to train on: give --video-dir FOLDER")
    index, shots = _shots_below(data.video_dir, data.shot_index)
    train, held_out = split_shots(shots, data.holdout_every)
    valid_index = index
    if data.valid_video_dir is not None:
        valid_index, held_out = _shots_below(data.valid_video_dir, data.valid_shot_index)
    images = [shot for shot in train if is_image(shot.path)]
    # Only after the split, which must not depend on the clips' length.
    train, held_out = ([shot for shot in part if shot.num_frames >= data.num_frames] for part in (train, held_out))
    if data.valid_video_dir is not None and not held_out:
        raise ValueError(f"no shot below {data.valid_video_dir} has {data.num_frames} frames: give longer videos")
    if data.holdout_every and not held_out:
        raise ValueError(
            f"holdout_every {data.holdout_every} holds out none of the {len(shots)} shots with {data.num_frames} "
            "frames: use a smaller value, or 0, or give --valid-video-dir"
        )
    if not train:
        raise ValueError(
            f"none of the {len(shots)} shots below {data.video_dir} that are left for training has {data.num_frames} "
            "frames: lower num_frames, or give longer videos"
        )
    # Images serve the batches of one frame.
    train = sorted({*train, *images})
    validation = None
    if held_out:
        validation = ClipDataset(held_out, data.short_side, seed, cache_gib=data.cache_gib, index=valid_index)
    return ClipDataset(train, data.short_side, seed, data.max_frame_stride, data.cache_gib, index), validation


def _shots_below(folder: str, index_folder: str | None) -> tuple[ShotIndex, list[Shot]]:
    index = ShotIndex(folder, index_folder or Path(folder) / INDEX_FOLDER)
    return index, find_all_shots(list_clip_files(folder), index)
