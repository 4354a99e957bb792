"""Process groups: made once at the start, passed to everyone as `ProcessGroups`.

Ranks are dealt out as Megatron-LM does, fastest first: tensor, context, data, pipeline. The named operations at the end
are what other packages use instead of torch.distributed.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fsvideo.config import ParallelConfig
from megatron_fsvideo.parallel import cpu_backend

# The watchdog (watchdog.py) ends a hanging run after the same time and names the missing ranks: it goes first.
_GRACE_MINUTES = 1
T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroups:
    """This rank's place in the layout.

    Attributes:
        collection: the groups as Megatron's modules take them.
        tp, cp, pp, dp: one group per axis; dp_cp joins data and context, over which gradients are reduced.
        tp_host: the ranks of `tp` for what stays in host memory; of its own, so that a thread may use it beside `tp`.
        tp_host_thread: the one thread that uses it while a step is computed. It works in the order of submission, which
            must be the same on all ranks.
        device: where this rank's tensors live.
    """

    collection: ProcessGroupCollection
    tp: ProcessGroup
    cp: ProcessGroup
    pp: ProcessGroup
    dp: ProcessGroup
    dp_cp: ProcessGroup
    tp_host: ProcessGroup
    tp_host_thread: ThreadPoolExecutor
    device: torch.device

    @property
    def rank(self) -> int:
        """Rank in the whole job."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """Ranks of the whole job."""
        return dist.get_world_size()

    @property
    def is_rank_zero(self) -> bool:
        """Whether this rank writes logs and files."""
        return self.rank == 0

    @property
    def tp_rank(self) -> int:
        """Rank in the tensor-parallel group."""
        return self.tp.rank()

    @property
    def tp_size(self) -> int:
        """Size of the tensor-parallel group."""
        return self.tp.size()

    @property
    def cp_rank(self) -> int:
        """Rank in the context-parallel group."""
        return self.cp.rank()

    @property
    def cp_size(self) -> int:
        """Size of the context-parallel group."""
        return self.cp.size()

    @property
    def pp_rank(self) -> int:
        """Pipeline stage."""
        return self.pp.rank()

    @property
    def pp_size(self) -> int:
        """Number of pipeline stages."""
        return self.pp.size()

    @property
    def dp_rank(self) -> int:
        """Rank in the data-parallel group."""
        return self.dp.rank()

    @property
    def dp_size(self) -> int:
        """Size of the data-parallel group."""
        return self.dp.size()

    @property
    def dp_cp_rank(self) -> int:
        """Rank among all copies of the weights: data and context parallel."""
        return self.dp_cp.rank()

    @property
    def dp_cp_size(self) -> int:
        """Number of copies of the weights."""
        return self.dp_cp.size()

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds the input."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the head and the loss."""
        return self.pp_rank == self.pp_size - 1

    def any_rank(self, flags: list[bool]) -> list[bool]:
        """Which of these flags any rank of the job has set: the same answer on every rank."""
        if self.world_size == 1:
            return flags
        counts = torch.tensor(flags, dtype=torch.int32, device=self.device)
        return [count > 0 for count in all_reduce_sum(counts).tolist()]

    def on_rank_zero(self, action: Callable[[], T]) -> T:
        """Let rank 0 alone look at the disk or decide; every rank gets its result.

        Raises:
            ValueError, OSError: what the action raised, on every rank.
        """
        result = error = None
        if self.is_rank_zero:
            try:
                result = action()
            except (ValueError, OSError) as raised:
                error = raised
        result, error = broadcast_object((result, error))
        if error is not None:
            raise error
        return result


def initialize(parallel: ParallelConfig) -> ProcessGroups:
    """Join the job and make its groups; under torchrun, or alone in one process.

    Raises:
        ValueError: the number of processes is not a multiple of TP x CP x PP.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    sizes = parallel.group_sizes
    if world_size % sizes.model:
        raise ValueError(
            f"{world_size} processes cannot hold tensor_model_parallel_size {sizes.tensor} x "
            f"context_parallel_size {sizes.context} x pipeline_model_parallel_size {sizes.pipeline} = {sizes.model}; "
            f"start a multiple of {sizes.model} processes"
        )
    device = _local_device()
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes + _GRACE_MINUTES)
    if not dist.is_initialized():
        _join(device, world_size, timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual_stages,
        context_parallel_size=sizes.context,
        hierarchical_context_parallel_sizes=list(sizes.hierarchical_context) or None,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes + _GRACE_MINUTES,
        create_gloo_process_groups=True,
    )
    collection = ProcessGroupCollection.use_mpu_process_groups()
    return ProcessGroups(
        collection=collection,
        tp=collection.tp,
        cp=collection.cp,
        pp=collection.pp,
        dp=collection.dp,
        dp_cp=collection.dp_cp,
        tp_host=_host_group(collection.tp, sizes.tensor, world_size, timeout),
        tp_host_thread=ThreadPoolExecutor(1),
        device=device,
    )


def shutdown() -> None:
    """Leave the job, so that `initialize` may be called again."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for every rank of the job."""
    dist.barrier()


def all_reduce_sum(tensor: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Sum over the ranks of a group, in place; of the whole job without a group. No gradient flows."""
    dist.all_reduce(tensor, group=group)
    return tensor


def all_reduce_max(tensor: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Greatest over the ranks of a group, in place; of the whole job without a group. No gradient flows."""
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def broadcast_tensor(tensor: Tensor, group: ProcessGroup, source: int) -> Tensor:
    """Overwrite a tensor with that of the group's rank `source`. No gradient flows."""
    # gloo and NCCL take contiguous memory only; a kernel may be kept channels last.
    sent = tensor.contiguous()
    dist.broadcast(sent, src=_global_rank(group, source), group=group)
    return tensor if sent is tensor else tensor.copy_(sent)


def broadcast_object(value: Any, group: ProcessGroup | None = None, source: int = 0) -> Any:
    """A Python object of the group's rank `source`, on every rank of it. Only for objects this job made itself."""
    box = [value]
    dist.broadcast_object_list(box, src=_global_rank(group, source), group=group)
    return box[0]


def gather_objects(value: Any, group: ProcessGroup | None = None) -> list[Any]:
    """Every rank's object, in rank order, on every rank. Only for objects this job made itself."""
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _global_rank(group: ProcessGroup | None, rank: int) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)


def _local_device() -> torch.device:
    if cpu_backend.needed():
        cpu_backend.install()
        # Vanishing moments and activations become denormal numbers, which slow a CPU down several times.
        torch.set_flush_denormal(True)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _host_group(tp: ProcessGroup, tp_size: int, world_size: int, timeout: timedelta) -> ProcessGroup:
    """A gloo group of the ranks of `tp`, which are neighbours; `tp` itself where it has one rank."""
    if tp_size == 1:
        return tp
    ranks = [list(range(first, first + tp_size)) for first in range(0, world_size, tp_size)]
    group, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timeout, backend="gloo")
    assert dist.get_process_group_ranks(group) == dist.get_process_group_ranks(tp), (
        "tensor-parallel ranks follow one another"
    )
    return group


def _join(device: torch.device, world_size: int, timeout: timedelta) -> None:
    backend = "gloo" if device.type == "cpu" else "nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout, world_size=world_size, rank=int(os.environ["RANK"]))
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), world_size=1, rank=0)
