"""Whole matrices for Muon where gradients and weights are cut over the data-parallel ranks.

Megatron's distributed optimizer cuts flat buffers into one shard per rank, without regard to matrices. Muon needs whole
matrices. Each matrix is assigned to one rank, its owner, which keeps its momentum and makes its update. Before a step
the owners collect the gradients from the shards. After it they write the new weights into the shards, from which
Megatron gathers all weights. Each of the two exchanges moves about 1 / data-parallel size of the matrices per rank.
"""

from collections.abc import Callable, Iterator

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_fsvideo.parallel.sequence import exchange_parts

Spans = list[tuple[int, int]]  # ranges of a flattened parameter, by data-parallel rank
# Largest number of elements that all ranks send in one message: 1 GiB in fp32.
MOVED_AT_ONCE = 2**28


class MatrixExchange:
    """Assigns every matrix an owner, and moves matrices between owners and shards.

    Args:
        chunks: this rank's model chunks, made with the distributed optimizer.
        matrices: parameters of the chunks, the same list on every rank of the group.
        group: the data- and context-parallel ranks, which hold the same weights.
    """

    def __init__(
        self, chunks: list[DistributedDataParallel], matrices: list[nn.Parameter], group: ProcessGroup
    ) -> None:
        self.group = group
        self._owners = deal_out(matrices, group.size())
        self._spans = {
            parameter: spans
            for chunk in chunks
            for parameter, spans in shard_spans(chunk, group.size())
            if parameter in self._owners
        }
        assert len({matrix.dtype for matrix in matrices}) <= 1, "one message holds one type"
        self._batches = in_batches(matrices, MOVED_AT_ONCE)

    def owns(self, matrix: nn.Parameter) -> bool:
        """Whether this rank owns a matrix, and so computes its update."""
        return self._owners[matrix] == self.group.rank()

    @torch.no_grad()
    def gradients_to_owners(self) -> None:
        """Complete `main_grad` of this rank's own matrices with the reduced gradients that the shards hold."""
        self._move(lambda matrix: matrix.main_grad.view(-1), to_owner=True)

    @torch.no_grad()
    def weights_to_shards(self) -> None:
        """Write the owners' weights into the shards of all ranks."""
        self._move(lambda matrix: matrix.data.view(-1), to_owner=False)

    def _move(self, flat: Callable[[nn.Parameter], Tensor], to_owner: bool) -> None:
        me, ranks = self.group.rank(), range(self.group.size())
        for matrices in self._batches:
            # By peer: pieces of its matrices in this rank's shards, and of this rank's matrices in its shards.
            shards = [[flat(m)[slice(*self._spans[m][me])] for m in matrices if self._owners[m] == r] for r in ranks]
            owned = [[flat(m)[slice(*self._spans[m][r])] for m in matrices if self.owns(m)] for r in ranks]
            sent, filled = (shards, owned) if to_owner else (owned, shards)
            exchange_parts(sent, filled, flat(matrices[0]), self.group)


def deal_out(parameters: list[nn.Parameter], num_ranks: int) -> dict[nn.Parameter, int]:
    """Assign each parameter to a rank: the largest first, always to the least loaded rank."""
    held = [0] * num_ranks
    owners = {}
    for parameter in sorted(parameters, key=lambda p: -p.numel()):
        owner = held.index(min(held))
        owners[parameter] = owner
        held[owner] += parameter.numel()
    return owners


def shard_spans(chunk: DistributedDataParallel, num_ranks: int) -> Iterator[tuple[nn.Parameter, Spans]]:
    """For each parameter of Megatron's buffers, the range of it that lies in each rank's shard."""
    for buffer in chunk.buffers:
        for parameter, (start, stop, index) in buffer.param_index_map.items():
            bucket = buffer.buckets[index]
            size = bucket.grad_data.numel() // num_ranks
            cuts = [min(max(bucket.offset + rank * size, start), stop) - start for rank in range(num_ranks + 1)]
            yield parameter, list(zip(cuts[:-1], cuts[1:], strict=True))


def in_batches(parameters: list[nn.Parameter], limit: int) -> list[list[nn.Parameter]]:
    """Split parameters, in order, into lists of at most `limit` elements; a larger parameter gets a list of its own."""
    batches: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        size += parameter.numel()
        if not batches or size > limit:
            batches.append([])
            size = parameter.numel()
        batches[-1].append(parameter)
    return batches
