"""Frames before and after those that a network is given (paper section 2.2.1: sliced encode and decode).

Modules hold no state of their own: each call gets a `Stream` that answers for the frames it cannot see. None means the
whole video. One `StreamCache` is one video in chunks, so any number of them may be interleaved; `FrameShards`
(frame_shards.py) is a video whose frames lie on several processes.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Stream:
    """A call whose frames begin at `position` of the video, with unknown frames before (and after) them.

    Attributes:
        position: frames (encoder) or latent frames (decoder) before these; 0 is the start of the video.
        kept: what a video needs once for all its chunks, such as noise maps.
    """

    position: int = 0
    kept: dict[Hashable, Tensor] = field(default_factory=dict)

    @property
    def advances(self) -> bool:
        """Whether calls change it, so that a call cannot be repeated in a backward pass."""
        return False

    @property
    def first_latent(self) -> int:
        """Latent frames before those that a decoder is given."""
        return self.position

    def look_back(self, module: nn.Module, frames: Tensor, length: int) -> tuple[Tensor, Tensor | None]:
        """`frames` [b, c, t, h, w], to be used from here on, and the `length` frames before them if known.

        Args:
            module: the convolution that asks, always with the same `length`.
        """
        return frames, None

    def look_around(self, frames: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`frames`, to be used from here on, with the frame before and the frame after them if known."""
        return frames, None, None


@dataclass
class StreamCache(Stream):
    """State of one video that passes through one encoder or decoder in chunks.

    Attributes:
        tails: per convolution the last input frames, which the next chunk continues from.
    """

    tails: dict[nn.Module, Tensor] = field(default_factory=dict)

    @property
    def advances(self) -> bool:
        """True: each call changes the cache, so a call cannot be repeated in a backward pass."""
        return True

    def look_back(self, module: nn.Module, frames: Tensor, length: int) -> tuple[Tensor, Tensor | None]:
        """Return `frames` and those before them, and remember the last `length` frames for the next chunk."""
        before = self.tails.get(module)
        joined = frames if before is None else torch.cat([before, frames], dim=2)
        if joined.shape[2] < length:
            # A start of one frame counts as a replicated past, just as the convolution pads it.
            missing = length - joined.shape[2]
            joined = torch.cat([joined[:, :, :1].expand(-1, -1, missing, -1, -1), joined], dim=2)
        # Without the copy the tail would keep the whole chunk's memory alive, and in-place changes would reach it.
        self.tails[module] = joined[:, :, joined.shape[2] - length :].clone()
        return frames, before


def at_start(stream: Stream | None) -> bool:
    """Whether these frames begin the video; without a stream a call sees the whole video."""
    return stream is None or stream.position == 0
