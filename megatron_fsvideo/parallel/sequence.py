"""Cutting and joining the token stream over ranks, with the gradients that go with each move.

Tokens are cut contiguously: first over the context-parallel group, then (with sequence parallelism) each part over the
tensor-parallel group. This model attends in both directions, so the zig-zag order of causal models is not needed.
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup


def local_slice(tensor: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This rank's contiguous part of `tensor`, which every rank of the group holds whole. No gradient is gathered.

    Raises:
        ValueError: the size is not a multiple of the group's.
    """
    size = tensor.shape[dim]
    if size % group.size():
        raise ValueError(f"{size} tokens cannot be shared evenly by {group.size()} ranks")
    part = size // group.size()
    return tensor.narrow(dim, group.rank() * part, part)


def all_gather_slices(tensor: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Join the ranks' parts along `dim` in rank order: the whole tensor, on every rank. No gradient flows."""
    if group.size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def scatter_tokens(tensor: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This rank's part of a tensor that every rank holds whole. Backward: every rank gets the whole gradient."""
    return local_slice(tensor, dim, group) if group.size() == 1 else _Scatter.apply(tensor, dim, group)


def gather_tokens(tensor: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Join the ranks' parts, where all ranks go on to the same loss. Backward: each rank takes its own slice."""
    return tensor if group.size() == 1 else _GatherForSameLoss.apply(tensor, dim, group)


def all_gather_each(tensors: list[Tensor], dims: list[int], group: ProcessGroup) -> list[Tensor]:
    """Join the ranks' parts of many tensors of one type in one collective. No gradient flows."""
    sizes = [tensor.numel() for tensor in tensors]
    ranks = [flat.split(sizes) for flat in _all_gather_flat(torch.cat([t.flatten() for t in tensors]), group)]
    return [
        torch.cat([parts[k].view(tensor.shape) for parts in ranks], dim=dim)
        for k, (tensor, dim) in enumerate(zip(tensors, dims, strict=True))
    ]


def share_in_turn(made: list[Tensor], like: list[Tensor], group: ProcessGroup) -> list[Tensor]:
    """All ranks' results, on every rank, in one collective: rank r has `made` those of like[r], like[r + size], ..."""
    sizes = [[tensor.numel() for tensor in like[rank :: group.size()]] for rank in range(group.size())]
    flat = like[0].new_zeros(max(sum(of_rank) for of_rank in sizes))
    for target, tensor in zip(flat[: sum(sizes[group.rank()])].split(sizes[group.rank()]), made, strict=True):
        target.copy_(tensor.flatten())
    shared = list(like)
    for rank, received in enumerate(_all_gather_flat(flat, group)):
        parts = received[: sum(sizes[rank])].split(sizes[rank])
        for k, part in zip(range(rank, len(like), group.size()), parts, strict=True):
            shared[k] = part.view(like[k].shape)
    return shared


def exchange_parts(sent: list[list[Tensor]], filled: list[list[Tensor]], like: Tensor, group: ProcessGroup) -> None:
    """Send `sent[r]` to each rank r, and copy what it sends into `filled[r]`: flat parts, in the same order on both.

    Args:
        like: a tensor of the parts' type; a rank may have none.
    """
    outgoing = torch.cat([like.new_empty(0), *(part for parts in sent for part in parts)])
    sizes = [[sum(part.numel() for part in parts) for parts in side] for side in (filled, sent)]
    incoming = like.new_empty(sum(sizes[0]))
    dist.all_to_all_single(incoming, outgoing, *sizes, group=group)
    targets = [part for parts in filled for part in parts]
    for target, values in zip(targets, incoming.split([target.numel() for target in targets]), strict=True):
        target.copy_(values)


def enter_tensor_parallel(hidden_states: Tensor, sequence_parallel: bool, group: ProcessGroup) -> Tensor:
    """Prepare the input of column-parallel linears that are built without a reduction of their own.

    One collective serves all linears that read `hidden_states` [s, b, h]: with sequence parallelism the tokens are
    gathered (backward: reduce-scatter), without it they are copied (backward: all-reduce).
    """
    if group.size() == 1:
        return hidden_states
    if sequence_parallel:
        return gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True, group=group)
    return copy_to_tensor_model_parallel_region(hidden_states, group=group)


def gather_output_tokens(hidden_states: Tensor, group: ProcessGroup) -> Tensor:
    """All tokens [s, b, h] from sequence-parallel parts, where every rank goes on to compute the same loss.

    The gradients are then equal on all ranks: each takes its part of them. (Megatron's default sums them, which would
    multiply every gradient by the size of the group.)
    """
    return gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False, group=group)


def sum_over_ranks(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Sum over a group whose ranks each go on with the sum in a computation of their own (backward: sum)."""
    return tensor if group.size() == 1 else _SumOverRanks.apply(tensor, group)


def sum_for_same_loss(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Sum over a group whose ranks all go on to the same loss (backward: identity)."""
    return tensor if group.size() == 1 else _SumForSameLoss.apply(tensor, group)


def tokens_to_heads(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Ulysses all-to-all: all heads of some tokens [s/p, b, n, d] -> some heads of all tokens [s, b, n/p, d]."""
    return tensor if group.size() == 1 else _AllToAll.apply(tensor, 2, 0, group)


def heads_to_tokens(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Ulysses all-to-all: some heads of all tokens [s, b, n/p, d] -> all heads of some tokens [s/p, b, n, d]."""
    return tensor if group.size() == 1 else _AllToAll.apply(tensor, 0, 2, group)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.cut = dim, group
        return local_slice(tensor, dim, group)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return all_gather_slices(gradient, *ctx.cut), None, None


class _GatherForSameLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.cut = dim, group
        return all_gather_slices(tensor, dim, group)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return local_slice(gradient, *ctx.cut).contiguous(), None, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _SumForSameLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, group: ProcessGroup) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, cut_dim: int, join_dim: int, group: ProcessGroup) -> Tensor:
        ctx.moves = cut_dim, join_dim, group
        return _exchange(tensor, cut_dim, join_dim, group)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        cut_dim, join_dim, group = ctx.moves
        return _exchange(gradient, join_dim, cut_dim, group), None, None, None


def _exchange(tensor: Tensor, cut_dim: int, join_dim: int, group: ProcessGroup) -> Tensor:
    """Cut along one dimension, send part i to rank i, join what arrives along the other, in rank order."""
    send = torch.stack(tensor.chunk(group.size(), dim=cut_dim))
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return torch.cat(received.unbind(), dim=join_dim)


def _all_gather_flat(flat: Tensor, group: ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(flat) for _ in range(group.size())]
    dist.all_gather(parts, flat, group=group)
    return parts
