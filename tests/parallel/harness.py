"""Runs a function on several gloo processes forked from the test process, and brings home what each returns.

Forking saves the 11 s that importing megatron-core costs. A forked child must not use a thread pool that the parent has
started: the first statement of a worker is `torch.set_num_threads(1)`, and every wait has a time-out.
"""

import multiprocessing
import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

import megatron.core  # noqa: F401  imported before the fork, once
import torch

from megatron_fsvideo.parallel import groups  # noqa: F401

TIMEOUT_SECONDS = 120


def run_workers(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = TIMEOUT_SECONDS) -> list:
    """Call `function(*args)` on `world_size` ranks with torchrun's environment; the results in rank order.

    Raises:
        AssertionError: a rank raised (with its traceback), died or did not end in time.
    """
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    port = _free_port()
    workers = [
        context.Process(target=_work, args=(function, rank, world_size, port, results, args))
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    try:
        return _collect(results, world_size, timeout)
    finally:
        for worker in workers:
            worker.join(timeout=5)
            if worker.is_alive():
                worker.kill()
                worker.join(timeout=5)


def _work(function: Callable, rank: int, world_size: int, port: int, results: Any, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        value, error = function(*args), None
    except BaseException:
        value, error = None, traceback.format_exc()
    # Tensors go by value: a shared-memory handle would not outlive this process.
    results.put((rank, _to_numpy(value), error))
    results.close()
    results.join_thread()
    os._exit(0)


def _collect(results: Any, world_size: int, timeout: float) -> list:
    values: dict[int, Any] = {}
    while len(values) < world_size:
        try:
            rank, value, error = results.get(timeout=timeout)
        except queue.Empty:
            missing = sorted(set(range(world_size)) - set(values))
            raise AssertionError(f"ranks {missing} returned nothing within {timeout} s") from None
        assert error is None, f"rank {rank} failed:\n{error}"
        values[rank] = _to_torch(value)
    return [values[rank] for rank in range(world_size)]


def _to_numpy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().float().numpy() if value.dtype == torch.bfloat16 else value.detach().numpy()
    if isinstance(value, dict):
        return {key: _to_numpy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_numpy(item) for item in value)
    return value


def _to_torch(value: Any) -> Any:
    import numpy

    if isinstance(value, numpy.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {key: _to_torch(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_torch(item) for item in value)
    return value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
