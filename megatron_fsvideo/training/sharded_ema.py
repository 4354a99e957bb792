"""The moving average of the weights in Megatron's shards and checkpoints.

With the distributed optimizer each data-parallel rank keeps the average of the shard it steps. In a checkpoint that
lies under the same keys as a whole average, cut into the rectangles that make up each shard: any layout reads it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_fsvideo.parallel.cpu_backend import megatron_on_cpu
from megatron_fsvideo.training.ema import EMA, warm_decay

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset and shape


class ReplicatedEMA(EMA):
    """An average that every data-parallel rank keeps whole, in checkpoints."""

    def sharded_state(self, weights: dict[str, ShardedTensor]) -> dict[str, ShardedTensor]:
        """What a checkpoint holds of the average.

        Args:
            weights: the model's sharded tensors by name; they are changed.
        """
        for name, tensor in weights.items():
            tensor.key = f"ema.{tensor.key}"
            tensor.data, tensor.dtype = self.weights[name], torch.float32
        return weights

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take in what `load_checkpoint` made of `sharded_state`."""
        self.load(state)


@dataclass(frozen=True)
class _Shard:
    """This rank's range of one flattened parameter.

    Attributes:
        master: the fp32 weights that the optimizer steps [n].
        target: the same range of the parameter itself, in its own dtype [n].
        start: of the range; `shape` is the whole parameter's.
    """

    master: Tensor
    target: Tensor
    start: int
    shape: tuple[int, ...]


class ShardedEMA:
    """As `EMA`, of this data-parallel rank's shards of the fp32 master weights.

    Args:
        chunks: this rank's model chunks, made with the distributed optimizer.
        names: parameter -> its name in checkpoints' contents.

    Attributes:
        weights: name -> average [n], fp32.
    """

    def __init__(
        self,
        chunks: list[DistributedDataParallel],
        optimizer: ChainedOptimizer,
        names: dict[torch.nn.Parameter, str],
        decay: float,
    ) -> None:
        self.decay = decay
        self._chunks = chunks
        self._shards: dict[str, _Shard] = {}
        for link in optimizer.chained_optimizers:
            assert isinstance(link, DistributedOptimizer), "made with the distributed optimizer"
            for parameter, (group, place) in link.model_param_group_index_map.items():
                span = link._get_model_param_range_map(parameter)["param"]
                self._shards[names[parameter]] = _Shard(
                    link.optimizer.param_groups[group]["params"][place].detach().view(-1),
                    parameter.detach().view(-1)[span.start : span.end],
                    span.start,
                    tuple(parameter.shape),
                )
        self.weights = {name: shard.master.float().clone() for name, shard in self._shards.items()}

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Take in the weights after optimizer step `iteration` (from 1)."""
        decay = warm_decay(self.decay, iteration)
        for name, shard in self._shards.items():
            self.weights[name].lerp_(shard.master.float(), 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Start again from the optimizer's present weights."""
        for name, shard in self._shards.items():
            self.weights[name].copy_(shard.master)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the model has the averaged weights, gathered from all data-parallel ranks."""
        trained = {name: shard.target.clone() for name, shard in self._shards.items()}
        self._write(self.weights)
        try:
            yield
        finally:
            self._write(trained)

    def sharded_state(self, weights: dict[str, ShardedTensor]) -> dict[str, Any]:
        """What a checkpoint holds of the average.

        Args:
            weights: the model's sharded tensors by name.
        """
        state = {}
        for name, shard in self._shards.items():
            average, begin, parts = self.weights[name], 0, {}
            for number, (offset, shape) in enumerate(boxes(shard.shape, shard.start, shard.start + len(average))):
                part = average[begin : begin + prod(shape)].view(shape)
                parts[str(number)] = _sharded_box(weights[name], part, offset)
                begin += prod(shape)
            state[name] = parts
        return state

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Take in what `load_checkpoint` made of `sharded_state`."""
        for name, average in self.weights.items():
            parts = [state[name][str(number)].reshape(-1) for number in range(len(state[name]))]
            average.copy_(torch.cat(parts))

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, shard in self._shards.items():
            shard.target.copy_(values[name])
        with megatron_on_cpu():
            for chunk in self._chunks:
                chunk.start_param_sync(force_sync=True)


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The range [start, stop) of a flattened tensor as rectangles of the tensor, in order."""
    if start == stop:
        return []
    if len(shape) <= 1:
        return [((start,) * len(shape), (stop - start,) * len(shape))]
    row = prod(shape[1:])
    head, tail = -(-start // row), stop // row  # the whole rows are [head, tail)
    if head > tail:  # inside one row
        return _in_row(shape, tail, start - tail * row, stop - tail * row)
    found = _in_row(shape, head - 1, start - (head - 1) * row, row) if start % row else []
    if tail > head:
        found.append(((head, *[0] * (len(shape) - 1)), (tail - head, *shape[1:])))
    return found + _in_row(shape, tail, 0, stop - tail * row)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[Box]:
    return [((row, *offset), (1, *size)) for offset, size in boxes(shape[1:], start, stop)]


def _sharded_box(weight: ShardedTensor, part: Tensor, offset: tuple[int, ...]) -> ShardedTensor:
    assert weight.prepend_axis_num == 0, "each layer has its own key"
    return ShardedTensor(
        key=f"ema.{weight.key}",
        data=part,
        dtype=torch.float32,
        local_shape=tuple(part.shape),
        global_shape=weight.global_shape,
        global_offset=tuple(a + b for a, b in zip(weight.global_offset, offset, strict=True)),
        axis_fragmentations=None,  # no regular grid
        # The last is the place in the data-parallel group, each of which has another part.
        replica_id=(*weight.replica_id[:-1], 0),
    )
