"""Lets megatron-core 0.16.1, unmodified, run on CPU with gloo.

megatron-core assumes CUDA in three ways, and each has one answer here:

| where | assumption | answer |
|---|---|---|
| p2p_communication, tensor allocation | `torch.cuda.current_device()` is a device | it returns `cpu` |
| schedules, p2p_communication, checkpointing | `torch.cuda.synchronize()` works | it does nothing |
| schedules, clip_grads, optimizer | `device="cuda"`, `.cuda()`, `.to("cuda")` | the mode reads cuda as cpu |
| clip_grads, optimizer, distrib_optimizer | `tensor.type() == "torch.cuda.FloatTensor"` | the mode spells it so |

`install()` makes the first two, for the process. The others are made by a mode, `megatron_on_cpu()`: it
lies to every library that looks at a tensor, costs about 1.3 us per operation and stops torch.compile, so it holds in
one thread, only around calls of Megatron's schedule, optimizer and checkpointing.

That Megatron's functions are not compiled here is `megatron_import.py`'s business: it has to happen earlier.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def needed() -> bool:
    """Whether this machine has no CUDA device."""
    return not torch.cuda.is_available()


def install() -> None:
    """Patch what must hold for the whole process. Called when the process groups are made; safe to repeat.

    Raises:
        RuntimeError: there is a CUDA device, which this would hide.
    """
    if not needed():
        raise RuntimeError("the CPU backend is for machines without a CUDA device")
    torch.cuda.current_device = lambda: CPU
    torch.cuda.synchronize = lambda device=None: None


@contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Context in which Megatron's schedule, optimizer and checkpointing use `cpu` for `cuda`. No effect with CUDA."""
    if not needed():
        yield
        return
    with _CudaMeansCpu():
        yield


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _means_cuda(kwargs.get("device")):
            kwargs = kwargs | {"device": CPU}
        if func is Tensor.to and any(_means_cuda(arg) for arg in args[1:]):
            args = tuple(CPU if _means_cuda(arg) else arg for arg in args)
        return func(*args, **kwargs)


def _means_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.startswith("cuda")
