"""What every rank last said about itself, in the job's key-value store: it works when a collective hangs."""

import json
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_fsvideo.parallel.groups import ProcessGroups

_PREFIX = "heartbeat"


class Heartbeats:
    """A board on which each rank has one place. For one thread: it has a connection of its own.

    Args:
        patience: seconds to wait for the store's host before it counts as unreachable.
    """

    def __init__(self, pgs: ProcessGroups, patience: float) -> None:
        self.rank = pgs.rank
        self.world_size = pgs.world_size
        store = dist.distributed_c10d._get_default_store().clone()
        store.set_timeout(timedelta(seconds=patience))
        self._store = dist.PrefixStore(_PREFIX, store)

    def publish(self, message: dict[str, Any]) -> None:
        """Replace what this rank says.

        Raises:
            RuntimeError: the store cannot be reached.
        """
        self._store.set(str(self.rank), json.dumps(message))

    def read_all(self) -> list[dict[str, Any] | None]:
        """What each rank said last; None for one that has said nothing yet.

        Raises:
            RuntimeError: the store cannot be reached.
        """
        names = [str(rank) for rank in range(self.world_size)]
        return [json.loads(self._store.get(name)) if self._store.check([name]) else None for name in names]
