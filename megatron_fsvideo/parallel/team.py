"""Independent work dealt to any number of processes, and its results brought together. No model is split here.

For tools that judge or encode: each rank does its share alone, and they meet when each has finished, however long the
slowest takes. Objects travel over gloo, with GPUs too.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# A rank that dies ends its job (torchrun, srun --kill-on-bad-exit), so nobody needs to give up waiting.
_PATIENCE = timedelta(days=30)
T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """This process's place among those that share the work.

    Attributes:
        rank: 0 writes what is written.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes logs and files."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Iterator[tuple[int, T]]:
        """(index, item) of every item that is this process's: the items are dealt like cards."""
        return ((k, items[k]) for k in range(self.rank, len(items), self.size))

    def gather(self, found: dict[int, T]) -> dict[int, T]:
        """Results of all processes, by index in rising order, on every process. Only for objects this job made."""
        if self.size == 1:
            return dict(sorted(found.items()))
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, found)
        return dict(sorted(pair for part in parts for pair in part.items()))

    def device(self, name: str | None) -> torch.device:
        """The device of that name; None is this process's GPU, or the CPU where there is none."""
        if name is not None:
            return torch.device(name)
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def join_team() -> Team:
    """Join the processes that torchrun (or RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) started; else be alone."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=_PATIENCE, rank=rank, world_size=size)
    return Team(rank, size)


def leave_team(team: Team) -> None:
    """Leave after the last rank has come here, so that none loses its connection while it works."""
    if team.size > 1:
        dist.barrier()
        dist.destroy_process_group()
