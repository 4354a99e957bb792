"""Frames at the edges of a rank's part of a video: sent to the ranks that hold the frames before and after."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup


def exchange_frames(frames: Tensor, num_before: int, num_after: int, group: ProcessGroup) -> tuple[Tensor, ...]:
    """Give the neighbours what they ask for, and get the same from them; their gradients go the other way.

    Every rank of the group calls it with the same numbers, and the forward and backward passes of all ranks must call
    in the same order. Go on with the returned `frames`: through them the gradients of the neighbours' copies come back.

    Args:
        frames: [b, c, t, h, w], this rank's part.
        num_before: frames wanted from the end of the previous rank's part.
        num_after: frames wanted from the beginning of the next rank's part.

    Returns:
        (frames, the frames before, the frames after); zeros where there is no neighbour.

    Raises:
        ValueError: this rank has fewer frames than a neighbour wants.
    """
    if frames.shape[2] < max(num_before, num_after):
        raise ValueError(
            f"rank {group.rank()} has {frames.shape[2]} frames at a layer that needs {max(num_before, num_after)} of "
            "its neighbour: give each rank at least 2 latent frames"
        )
    return _ExchangeFrames.apply(frames, num_before, num_after, group)


def join_frames(frames: Tensor, start: int, num_frames: int, group: ProcessGroup) -> Tensor:
    """All ranks' parts of a video, on every rank, in at least fp32; the gradient is the sum over the ranks' gradients.

    Args:
        frames: [b, c, t, h, w], this rank's part.
        start: which frame of the video it begins with.
        num_frames: of the whole video.
    """
    missing = num_frames - start - frames.shape[2]
    wide = frames.to(torch.promote_types(frames.dtype, torch.float32))
    return _SumOverRanks.apply(F.pad(wide, (0, 0, 0, 0, start, missing)), group)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = tensor.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _ExchangeFrames(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, frames: Tensor, num_before: int, num_after: int, group: ProcessGroup) -> tuple[Tensor, ...]:
        ctx.group, ctx.num_before, ctx.num_after = group, num_before, num_after
        length = frames.shape[2]
        after, before = _swap(frames[:, :, :num_after], frames[:, :, length - num_before :], group)
        return frames.view_as(frames), before, after

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_before: Tensor, grad_after: Tensor) -> tuple[Tensor | None, ...]:
        from_next, from_previous = _swap(grad_before, grad_after, ctx.group)
        grad = grad.clone()
        length = grad.shape[2]
        grad[:, :, length - ctx.num_before :] += from_next
        grad[:, :, : ctx.num_after] += from_previous
        return grad, None, None, None


def _swap(to_previous: Tensor, to_next: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """(what the next rank sent to its previous one, what the previous rank sent to its next one); zeros at the ends."""
    from_next, from_previous = torch.zeros_like(to_previous), torch.zeros_like(to_next)
    rank, last = group.rank(), group.size() - 1
    from_next, from_previous = from_next.contiguous(), from_previous.contiguous()
    operations = []
    for neighbour, sent, received in ((rank - 1, to_previous, from_previous), (rank + 1, to_next, from_next)):
        if 0 <= neighbour <= last:
            peer = dist.get_global_rank(group, neighbour)
            if sent.numel():
                operations.append(dist.P2POp(dist.isend, sent.contiguous(), peer, group))
            if received.numel():
                operations.append(dist.P2POp(dist.irecv, received, peer, group))
    if operations:
        for request in dist.batch_isend_irecv(operations):
            request.wait()
    return from_next, from_previous
