"""One video's frames shared by several processes (context parallelism of the autoencoder; fsae_spec section 3).

Attention is per frame and norms are per position, so only convolutions look at other frames: each asks its neighbours'
processes for the one or two frames that it needs. The results and the gradients of weights, summed over the processes,
are those of one process.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_fsvideo.models.fsae.streaming import Stream
from megatron_fsvideo.parallel.neighbours import exchange_frames

MIN_LATENTS = 2
"""Latent frames per process: a causal convolution looks two frames back, and not past its neighbour."""


@dataclass
class FrameShards(Stream):
    """This process's place among those that hold a video's frames, in rank order.

    Attributes:
        group: the processes.
    """

    group: ProcessGroup | None = None

    @property
    def first_latent(self) -> int:
        """As `Stream.first_latent`, which is not known here: `position` is a rank.

        Raises:
            ValueError: on all processes but the first.
        """
        if self.group.rank() == 0:
            return 0
        raise ValueError(
            "noise_shape full draws by frame, and processes that share a clip do not know theirs: use spatial"
        )

    def look_back(self, module: nn.Module, frames: Tensor, length: int) -> tuple[Tensor, Tensor | None]:
        """As `Stream.look_back`; the frames come from the process before."""
        frames, before, _ = exchange_frames(frames, length, 0, self.group)
        return frames, before if self.group.rank() > 0 else None

    def look_around(self, frames: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `Stream.look_around`; the frames come from the processes before and after."""
        frames, before, after = exchange_frames(frames, 1, 1, self.group)
        rank, last = self.group.rank(), self.group.size() - 1
        return frames, before if rank > 0 else None, after if rank < last else None


def latents_of_rank(num_latents: int, group: ProcessGroup) -> tuple[int, int]:
    """(start, stop) of this process's latents, as even as possible. `tiling.frame_span` gives their frames.

    Raises:
        ValueError: fewer than two for each process.
    """
    size, rank = group.size(), group.rank()
    if num_latents < MIN_LATENTS * size and size > 1:
        raise ValueError(
            f"{num_latents} latent frames cannot be shared by {size} processes: each needs at least {MIN_LATENTS}; use "
            f"{num_latents // MIN_LATENTS} processes or longer videos"
        )
    return rank * num_latents // size, (rank + 1) * num_latents // size


def shards_of(group: ProcessGroup) -> FrameShards:
    """This process's place, for `encoder`, `decoder`, `encode_tiled` and `decode_patch`."""
    return FrameShards(position=group.rank(), group=group)
