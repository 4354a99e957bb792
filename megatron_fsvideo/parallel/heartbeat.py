"""Last message of every rank in the job's key-value store, which works while a collective hangs."""

import json
import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_fsvideo.parallel.groups import ProcessGroups

_PREFIX = "heartbeat"
# What gloo, NCCL and torch's store say when the other end of a connection is gone.
_PEER_LOSS = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Connection refused",
    "closed the connection",
    "remote process exited",
    "failed to recv",
    "recvValue failed",
    "sendBytes failed",
)
T = TypeVar("T")


def is_peer_loss(error: BaseException | None) -> bool:
    """Whether an error of a collective says that another rank's process has gone."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _PEER_LOSS)


class Heartbeats:
    """A board on which each rank has one place. For one thread: it has a connection of its own.

    Args:
        patience: seconds to wait for the store's host before it counts as unreachable. Every call ends by then: a host
            that is stopped keeps its connections open, and the store's own time-out does not cover that.
    """

    def __init__(self, pgs: ProcessGroups, patience: float) -> None:
        self.rank = pgs.rank
        self.world_size = pgs.world_size
        store = dist.distributed_c10d._get_default_store().clone()
        store.set_timeout(timedelta(seconds=patience))
        self._store = dist.PrefixStore(_PREFIX, store)
        self._patience = patience
        self._call: threading.Thread | None = None

    def publish(self, message: dict[str, Any]) -> None:
        """Replace what this rank says.

        Raises:
            RuntimeError: the store cannot be reached.
        """
        self._bounded(lambda: self._store.set(str(self.rank), json.dumps(message)))

    def read_all(self) -> list[dict[str, Any] | None]:
        """Last message of each rank; None for a rank that has sent none.

        Raises:
            RuntimeError: the store cannot be reached.
        """
        names = [str(rank) for rank in range(self.world_size)]
        return self._bounded(
            lambda: [json.loads(self._store.get(name)) if self._store.check([name]) else None for name in names]
        )

    def _bounded(self, action: Callable[[], T]) -> T:
        """The action's result; a thread that does not bring it in time is left behind."""
        if self._call is not None and self._call.is_alive():
            raise RuntimeError("the store has not answered the call before")
        results: queue.SimpleQueue = queue.SimpleQueue()

        def run() -> None:
            try:
                results.put((action(), None))
            except RuntimeError as error:
                results.put((None, error))

        self._call = threading.Thread(target=run, name="heartbeat", daemon=True)
        self._call.start()
        try:
            value, error = results.get(timeout=self._patience)
        except queue.Empty:
            raise RuntimeError(f"the store does not answer within {self._patience} s") from None
        if error is not None:
            raise error
        return value
