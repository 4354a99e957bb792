"""Measures the peak memory of a call: the allocator's bytes, and the process's pages."""

import gc
import resource
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


def peak_allocation(function: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """(what `function` returns, bytes of torch's allocator at its worst moment beyond those before the call).

    On a CPU torch's profiler counts them, which slows the call down: never time it. Scratch space of convolution
    libraries is not in it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    result, _, peak = profiled_allocation(function)
    return result, peak


def profiled_allocation(function: Callable[[], T]) -> tuple[T, int, int]:
    """(what `function` returns, bytes that it left allocated on the CPU, bytes that it had allocated at most).

    What it frees of earlier allocations counts as less than nothing. Freeing in threads that the profiler does not know
    (gloo's) is not seen.
    """
    gc.collect()  # what was left before must not be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return result, current, peak


def reset_process_peak() -> None:
    """Let `process_peak` count from now on, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # `process_peak` is then the greatest since the process began


def process_peak() -> int:
    """Bytes of memory that this process held at most: weights, libraries, scratch space and all."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
