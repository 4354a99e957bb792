"""The part of a network's optimizer state on this rank: for each parameter a range of it, or nothing.

Without the distributed optimizer every data-parallel rank holds all of every parameter. With it a rank holds ranges of
AdamW's parameters, wherever Megatron's buffers are cut, and whole matrices of Muon's. What a checkpoint keeps of the
optimizer and the moving average follow from this list.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from math import prod

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor, nn

from megatron_fsvideo.optim.muon import OwnedMuon
from megatron_fsvideo.parallel.cpu_backend import megatron_on_cpu

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset and shape of a box


@dataclass(frozen=True)
class Held:
    """A range of a flattened parameter that the optimizer of this rank steps.

    Attributes:
        master: fp32 tensor that the optimizer steps: the range of the parameter, or a copy of it if that is bf16.
        start, stop: bounds of the range in the flattened parameter.
        is_cut: the range is a shard of the distributed optimizer, which may begin and end inside a row.
        is_alone: no other rank of the data-parallel group holds the range.
        optimizer: optimizer that has the state of `master`.
    """

    parameter: nn.Parameter
    master: Tensor
    start: int
    stop: int
    is_cut: bool
    is_alone: bool
    optimizer: torch.optim.Optimizer

    @property
    def target(self) -> Tensor:
        """This range of the parameter itself, in its own type; it has the length or the shape of `master`."""
        whole = self.parameter.detach()
        return whole.view(-1)[self.start : self.stop] if self.is_cut else whole

    def sharded(self, weight: ShardedTensor, values: Tensor, key: str) -> dict[str, ShardedTensor]:
        """Values of the range as sharded tensors of the whole weight, numbered: one, or the boxes that make up a shard.

        Args:
            weight: the parameter's own sharded tensor.
            values: tensor of the shape of `master`.
        """
        assert weight.prepend_axis_num == 0, "each layer has its own key"
        # The last entry of a replica id is the rank in the data-parallel group.
        replica_id = (*weight.replica_id[:-1], 0) if self.is_alone else weight.replica_id
        if not self.is_cut:
            return {"0": replace(weight, key=key, data=values, dtype=values.dtype, replica_id=replica_id)}
        parts, begin = {}, 0
        for number, (offset, shape) in enumerate(boxes(weight.local_shape, self.start, self.stop)):
            part = values[begin : begin + prod(shape)].view(shape)
            begin += prod(shape)
            parts[str(number)] = replace(
                weight,
                key=key,
                data=part,
                dtype=part.dtype,
                local_shape=shape,
                global_offset=tuple(a + b for a, b in zip(weight.global_offset, offset, strict=True)),
                axis_fragmentations=None,  # the boxes form no regular grid
                replica_id=replica_id,
            )
        return parts


def held_by_this_rank(optimizer: ChainedOptimizer) -> list[Held]:
    """All ranges that the optimizer steps on this rank."""
    return [held for link in optimizer.chained_optimizers for held in _held(link)]


@torch.no_grad()
def fill(target: Tensor, parts: dict[str, Tensor]) -> None:
    """Overwrite values with those that a checkpoint has for the sharded tensors of `Held.sharded`."""
    if len(parts) == 1:
        target.copy_(parts["0"].view(target.shape))
    else:
        target.copy_(torch.cat([parts[str(number)].flatten() for number in range(len(parts))]))


def spread_weights(optimizer: ChainedOptimizer) -> None:
    """Gather the whole weights on every data-parallel rank, after each rank has written the ranges that it holds."""
    with megatron_on_cpu():
        for link in optimizer.chained_optimizers:
            if isinstance(link, OwnedMuon):
                link.exchange.weights_to_shards()
        for chunk in optimizer.model_chunks:  # only links of the chain that are Megatron's distributed optimizer
            chunk.start_param_sync(force_sync=True)


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Split the range [start, stop) of a flattened tensor into rectangular boxes of the tensor, in order."""
    if start == stop:
        return []
    if len(shape) <= 1:
        return [((start,) * len(shape), (stop - start,) * len(shape))]
    row = prod(shape[1:])
    head, tail = -(-start // row), stop // row  # the whole rows are [head, tail)
    if head > tail:  # the range lies inside one row
        return _in_row(shape, tail, start - tail * row, stop - tail * row)
    found = _in_row(shape, head - 1, start - (head - 1) * row, row) if start % row else []
    if tail > head:
        found.append(((head, *[0] * (len(shape) - 1)), (tail - head, *shape[1:])))
    return found + _in_row(shape, tail, 0, stop - tail * row)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[Box]:
    return [((row, *offset), (1, *size)) for offset, size in boxes(shape[1:], start, stop)]


def _held(link: MegatronOptimizer) -> Iterator[Held]:
    if isinstance(link, DistributedOptimizer):
        pairs = _zipped(link.model_float16_groups, link.shard_fp32_from_float16_groups)
        for parameter, master in chain(pairs, _zipped(link.model_fp32_groups, link.shard_fp32_groups)):
            span = link._get_model_param_range_map(parameter)["param"]
            yield Held(parameter, master, span.start, span.end, True, True, link.optimizer)
        return
    if isinstance(link, Float16OptimizerWithFloat16Params):
        pairs = _zipped(link.float16_groups, link.fp32_from_float16_groups)
        pairs = chain(pairs, _zipped(link.fp32_from_fp32_groups, link.fp32_from_fp32_groups))
    else:
        pairs = ((parameter, parameter) for parameter in link.get_parameters())
    is_alone = isinstance(link, OwnedMuon)
    for parameter, master in pairs:
        yield Held(parameter, master, 0, parameter.numel(), False, is_alone, link.optimizer)


def _zipped(models: list[list[nn.Parameter]], masters: list[list[Tensor]]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    for ours, theirs in zip(models, masters, strict=True):
        yield from zip(ours, theirs, strict=True)
