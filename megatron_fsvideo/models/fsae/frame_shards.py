"""One video's frames shared by several processes (context parallelism of the autoencoder).

Attention is per frame and norms are per position, so only convolutions look at other frames: each asks its neighbours'
processes for the one or two frames that it needs. The results and the gradients of weights, summed over the processes,
are those of one process.

Losses that treat frames alone are computed where the frames are, weighted so that the mean over the processes is the
loss of the clip. Losses of the whole clip are computed from its joined pixels or latents, which are few.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_fsvideo.models.fsae.streaming import Stream
from megatron_fsvideo.models.fsae.tiling import frame_span
from megatron_fsvideo.parallel.neighbours import exchange_frames, join_frames

MIN_LATENTS = 2
"""Latent frames per process: a causal convolution looks two frames back, and not past its neighbour."""


@dataclass
class FrameShards(Stream):
    """This process's part of a clip, among those of the processes that hold the others, in rank order.

    Attributes:
        group: the processes.
        num_frames: of the whole clip, 4k+1.
    """

    group: ProcessGroup | None = None
    num_frames: int = 1

    @classmethod
    def of_clip(cls, group: ProcessGroup, num_frames: int) -> "FrameShards":
        """This process's part of a clip of `num_frames` frames that the processes of a group share."""
        return cls(position=group.rank(), group=group, num_frames=num_frames)

    @property
    def first_latent(self) -> int:
        """Latent frames before those that this process decodes. Only the first process knows it: `position` is a rank.

        Raises:
            ValueError: on all processes but the first.
        """
        if self.group.rank() == 0:
            return 0
        raise ValueError(
            "noise_shape full draws by frame, and processes that share a clip do not know theirs: use spatial"
        )

    @property
    def num_latents(self) -> int:
        """Latent frames of the whole clip."""
        return (self.num_frames - 1) // 4 + 1

    @property
    def frames(self) -> slice:
        """This process's frames."""
        return slice(*frame_span(*latents_of_rank(self.num_latents, self.group)))

    @property
    def weight(self) -> float:
        """Weight of a mean over this process's frames. The mean of the weighted means is the mean over all frames."""
        return (self.frames.stop - self.frames.start) * self.group.size() / self.num_frames

    def of(self, video: Tensor) -> Tensor:
        """This process's frames of the whole clip [b, c, f, h, w]."""
        return video[:, :, self.frames]

    def join(self, frames: Tensor) -> Tensor:
        """The whole clip from each process's frames, with gradients."""
        return join_frames(frames, self.frames.start, self.num_frames, self.group)

    def join_latents(self, latents: Tensor) -> Tensor:
        """The whole clip's latents from each process's, with gradients."""
        start, _ = latents_of_rank(self.num_latents, self.group)
        return join_frames(latents, start, self.num_latents, self.group)

    def look_back(self, module: nn.Module, frames: Tensor, length: int) -> tuple[Tensor, Tensor | None]:
        """Return `frames`, and the `length` frames before them from the previous process (None on the first)."""
        frames, before, _ = exchange_frames(frames, length, 0, self.group)
        return frames, before if self.group.rank() > 0 else None

    def look_around(self, frames: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return `frames`, with the frame before and the frame after them from the neighbouring processes."""
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
