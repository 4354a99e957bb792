"""Random clips in several shapes: aspect ratios, mixed resolutions and lengths (paper section 2.2.1, footnote 2).

Every batch has one bucket, drawn by the number of the batch. A shot serves the buckets that it is long enough for, and
of those of one length the ones nearest to its aspect ratio. Clip number n of a bucket is a function of
(seed, n, bucket) alone.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from math import log

import numpy as np
import torch
from torch import Tensor

from megatron_fsvideo.config import VideoDataConfig
from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.clip_dataset import ClipDataset, open_clips
from megatron_fsvideo.data.draws import WeightedDraw, draw
from megatron_fsvideo.data.shot_index import ShotIndex
from megatron_fsvideo.data.shots import Shot
from megatron_fsvideo.data.video import resize_short_side, to_unit
from megatron_fsvideo.parallel.seeds import sample_generator


class BucketedClips:
    """Clips of a list of shots, read from their files each time.

    Args:
        shots: without cuts inside.
        buckets: shapes; one that occurs twice is drawn twice as often.
        seed: of buckets and clips.
        max_frame_stride: clips take every frame, every second, ... up to this, as far as the shot is long.
        index: what is known of the files; None decodes each of them once to find out.

    Raises:
        ValueError: no shot serves any bucket.
    """

    def __init__(
        self,
        shots: Sequence[Shot],
        buckets: Sequence[Bucket],
        seed: int,
        max_frame_stride: int = 1,
        index: ShotIndex | None = None,
    ) -> None:
        self.shots = list(shots)
        self.seed = seed
        self.max_frame_stride = max_frame_stride
        self._index = index or ShotIndex(".")
        self._ratios = {path: self._log_ratio(path) for path in {shot.path for shot in shots}}
        self._shots = {bucket: self._serving(shots, bucket, buckets) for bucket in set(buckets)}
        # Uniform over frames, not over shots: long shots have more to show.
        self._draws = {
            bucket: WeightedDraw(np.array([shot.num_frames - bucket.num_frames + 1 for shot in serving]))
            for bucket, serving in self._shots.items()
            if serving
        }
        self.buckets = tuple(bucket for bucket in buckets if self._shots[bucket])
        if not self.buckets:
            longest = max((shot.num_frames for shot in shots), default=0)
            raise ValueError(
                f"none of the {len(shots)} shots (the longest has {longest} frames) serves a bucket: give shorter ones"
            )
        for bucket in sorted(set(buckets) - set(self.buckets)):
            print(f"no shot serves the bucket {bucket}: it is left out", file=sys.stderr, flush=True)

    def num_shots(self, bucket: Bucket) -> int:
        """Shots that serve a bucket."""
        return len(self._shots[bucket])

    def choose_bucket(self, batch: int, is_image: bool) -> Bucket:
        """The bucket of batch `batch`, among those of one frame or among the others.

        Raises:
            ValueError: there is none such.
        """
        candidates = [bucket for bucket in self.buckets if (bucket.num_frames == 1) == is_image]
        if not candidates:
            kind = "one frame, which image_fraction asks for" if is_image else "more than one frame"
            raise ValueError(f"none of the buckets {', '.join(map(str, self.buckets))} has {kind}")
        generator = sample_generator(self.seed, batch, 0, "bucket")
        # By shots, so that those of a rare aspect ratio are not seen more often than others.
        weights = torch.tensor([len(self._shots[bucket]) for bucket in candidates], dtype=torch.float64)
        return candidates[int(torch.multinomial(weights, 1, generator=generator))]

    def random_clip(self, number: int, bucket: Bucket) -> Tensor:
        """Clip `number` of a bucket's endless sequence: [3, f, h, w] in [-1, 1]."""
        generator = sample_generator(self.seed, number, 0, f"clip {bucket}")
        shots = self._shots[bucket]
        shot = shots[self._draws[bucket](generator)]
        gaps = bucket.num_frames - 1
        longest_stride = max(1, min(self.max_frame_stride, (shot.num_frames - 1) // max(1, gaps)))
        stride = 1 + draw(longest_stride - 1, generator)
        start = shot.start + draw(shot.num_frames - 1 - gaps * stride, generator)
        # Closed each time: the next clip is elsewhere, and decoders hold memory and threads.
        with self._index.open(shot.path) as reader:
            frames = _cover(reader.read(start, bucket.num_frames, stride=stride), bucket)
        top = draw(frames.shape[1] - bucket.height, generator)
        left = draw(frames.shape[2] - bucket.width, generator)
        crop = frames[:, top : top + bucket.height, left : left + bucket.width]
        return to_unit(crop.flip(2) if draw(1, generator) else crop)

    def shots_of(self, bucket: Bucket) -> list[Shot]:
        """The shots that serve a bucket."""
        return self._shots[bucket]

    def _serving(self, shots: Sequence[Shot], bucket: Bucket, buckets: Sequence[Bucket]) -> list[Shot]:
        rivals = [other for other in buckets if other.num_frames == bucket.num_frames]
        return [
            shot
            for shot in shots
            if shot.num_frames >= bucket.num_frames
            and _distance(bucket, self._ratios[shot.path])
            <= min(_distance(b, self._ratios[shot.path]) for b in rivals) + 1e-6
        ]

    def _log_ratio(self, path: str) -> float:
        info = self._index.info(path)
        return log(info.width / info.height)


def open_bucketed_clips(
    data: VideoDataConfig, buckets: Sequence[Bucket], seed: int
) -> tuple[BucketedClips, ClipDataset | None]:
    """Open the training clips in buckets, and the held-out clips as square crops.

    Raises:
        ValueError: no folder given, no videos, no shot long enough, or no shot that serves a bucket.
    """
    shortest = min(bucket.num_frames for bucket in buckets)
    clips, held_out = open_clips(replace(data, num_frames=shortest, cache_gib=0.0), seed)
    return BucketedClips(clips.shots, buckets, seed, data.max_frame_stride, clips.index), held_out


def _distance(bucket: Bucket, log_ratio: float) -> float:
    return abs(log(bucket.aspect_ratio) - log_ratio)


def _cover(frames: Tensor, bucket: Bucket) -> Tensor:
    """Scale uint8 [f, h, w, 3] until it just covers the bucket."""
    height, width = frames.shape[1:3]
    scale = max(bucket.height / height, bucket.width / width)
    short = -(-min(height, width) * scale // 1)  # rounded up
    scaled = resize_short_side(frames, int(short))
    assert scaled.shape[1] >= bucket.height and scaled.shape[2] >= bucket.width, "rounding lost a row"
    return scaled
