"""What a stream remembers between two chunks of a clip (paper section 2.2: causal convolutions).

A causal operator needs a few input frames of the past. They live in a `StreamCache` that the caller makes, one for each
stream, and passes to every call: the model itself has no state, so streams can be interleaved.
"""

import torch
from torch import Tensor, nn


class StreamCache:
    """The past of one stream: for each causal operator the last frames of its input.

    Attributes:
        started: whether a chunk has gone through. The first frame of a stream stands alone, which is why
            down-sampling duplicates it and up-sampling drops its copy: once a stream, whatever the chunks' lengths.
    """

    def __init__(self) -> None:
        self.started = False
        self._frames: dict[nn.Module, Tensor] = {}

    def extend(self, operator: nn.Module, frames: Tensor, first: int, later: int) -> Tensor:
        """A chunk [b, c, t, h, w] behind its past, whose end is remembered for the next chunk (see `with_past`)."""
        if self.started:
            extended = torch.cat([self._frames[operator], frames], dim=2)
        else:
            extended = replicate_first(frames, first)
        # A copy, not a view: a view would keep the whole chunk's memory alive.
        self._frames[operator] = extended[:, :, extended.shape[2] - later :].clone()
        return extended


def with_past(operator: nn.Module, frames: Tensor, cache: StreamCache | None, first: int, later: int) -> Tensor:
    """A chunk behind its past: `first` replicas of frame 0 at a stream's start, `later` remembered frames afterwards.

    Args:
        operator: whose past it is.
        frames: input [b, c, t, h, w] of the operator.
        cache: the stream; None is a whole clip in one call.
        first: frames in front of the first chunk. Replicas, so that an image is encoded like a static clip.
        later: frames in front of any other chunk.

    Returns:
        [b, c, first + t or later + t, h, w].
    """
    if cache is None:
        return replicate_first(frames, first)
    return cache.extend(operator, frames, first, later)


def is_stream_start(cache: StreamCache | None) -> bool:
    """Whether a call sees frame 0 of its clip."""
    return cache is None or not cache.started


def replicate_first(frames: Tensor, num_frames: int) -> Tensor:
    """[b, c, t, h, w] with `num_frames` copies of the first frame in front."""
    return torch.cat([frames[:, :, :1].expand(-1, -1, num_frames, -1, -1), frames], dim=2)
