"""What a causal network remembers between two chunks of one video (paper section 2.2.1: sliced encode and decode).

One `StreamCache` is one stream. Modules hold no state of their own, so any number of streams may be interleaved.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class StreamCache:
    """State of one stream through one encoder or decoder.

    Attributes:
        position: frames (encoder) or latent frames (decoder) consumed; 0 is the start of the video.
        tails: per convolution the last input frames, which the next chunk continues from.
    """

    position: int = 0
    tails: dict[nn.Module, Tensor] = field(default_factory=dict)

    def continue_from(self, module: nn.Module, frames: Tensor, length: int) -> Tensor | None:
        """The `length` frames before `frames [b, c, t, h, w]`, None at the start; remembers the last of `frames`.

        `frames` must not be shorter than what it overwrites allows: a short chunk keeps part of the older tail.
        """
        before = self.tails.get(module)
        joined = frames if before is None else torch.cat([before, frames], dim=2)
        if joined.shape[2] < length:
            # A start of one frame counts as a replicated past, just as the convolution pads it.
            missing = length - joined.shape[2]
            joined = torch.cat([joined[:, :, :1].expand(-1, -1, missing, -1, -1), joined], dim=2)
        # Without the copy the tail would keep the whole chunk's memory alive, and in-place changes would reach it.
        self.tails[module] = joined[:, :, joined.shape[2] - length :].clone()
        return before


def at_start(cache: StreamCache | None) -> bool:
    """Whether the next chunk begins the video; without a cache a call sees the whole video."""
    return cache is None or cache.position == 0
