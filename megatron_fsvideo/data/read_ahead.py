"""Reading what will be asked for before it is, in threads: decoders and image libraries leave Python free."""

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

READY_PER_WORKER = 2
"""Results that wait, for each thread: so many stay in memory."""


class ReadAhead(Generic[K, T]):
    """Results of `read`, computed in the order in which they are expected.

    Args:
        read: a function of its key alone, safe to call from several threads.
        num_workers: threads; 0 reads when a result is taken.
    """

    def __init__(self, read: Callable[[K], T], num_workers: int) -> None:
        self._read = read
        self._limit = READY_PER_WORKER * num_workers
        self._pool = ThreadPoolExecutor(num_workers, "read-ahead") if num_workers else None
        self._expected: deque[K] = deque()
        self._begun: dict[K, Future[T]] = {}

    def expect(self, keys: Iterable[K]) -> None:
        """Replace the list of keys that will be taken next, in order."""
        if self._pool is None:
            return
        keys = list(dict.fromkeys(keys))
        for key in set(self._begun).difference(keys):
            self._begun.pop(key).cancel()
        self._expected = deque(key for key in keys if key not in self._begun)
        self._begin()

    def take(self, key: K) -> T:
        """Return the result for a key; an error of `read` is raised here."""
        future = self._begun.pop(key, None)
        if future is None:
            if key in self._expected:
                self._expected.remove(key)
            return self._read(key)
        self._begin()
        return future.result()

    def _begin(self) -> None:
        while self._pool is not None and self._expected and len(self._begun) < self._limit:
            key = self._expected.popleft()
            self._begun[key] = self._pool.submit(self._read, key)
