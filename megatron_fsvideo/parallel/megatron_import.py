"""Imports megatron-core 0.16.1 without torch.compile where there is no CUDA, and without known warnings.

megatron-core decorates its fused functions with `jit_fuser`, which is `torch.compile` from its import on. That import
alone loads TorchInductor: more than a second of every process, for functions that a CPU would compile for minutes.
`megatron.core.jit.disable_jit_fuser()` is Megatron's own switch, but most of its functions are decorated by the time
that anybody could call it. So the switch is thrown while `megatron.core.jit` itself is imported, by an import hook.

This module imports nothing heavy: `megatron_fsvideo/__init__.py` installs the hook before anything can import Megatron.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

JIT_MODULE = "megatron.core.jit"

# Warnings that say nothing a user could act on, as (message, module that warns), both regular expressions.
_KNOWN_WARNINGS = (
    ("Transformer Engine and Apex are not installed", r"megatron\.core\."),
    ("Apex is not installed", r"megatron\.core\."),
    # Megatron asks every parameter for its gradient, the distributed optimizer's views included.
    (r"The \.grad attribute of a Tensor that is not a leaf", r"megatron\.core\.optimizer"),
    # Newer torch than Megatron was written for.
    (r"`torch\.distributed\.\w+` is deprecated", r"torch\.distributed\.c10d_logger"),
    ("`load_state_dict` is deprecated", r"megatron\.core\.dist_checkpointing"),
)
# Of CUDA's work queues, which a CPU does not have.
_KNOWN_WARNINGS_ON_CPU = (("When using .* CUDA_DEVICE_MAX_CONNECTIONS to 1", r"megatron\.core\."),)


def install() -> None:
    """Install the hook and the filters of known warnings, once."""
    if not any(isinstance(finder, _JitFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _JitFinder())
    _silence(_KNOWN_WARNINGS)


def _silence(known: Sequence[tuple[str, str]]) -> None:
    for message, module in known:
        warnings.filterwarnings("ignore", message=message, module=module)


class _JitFinder(importlib.abc.MetaPathFinder):
    """Finds `megatron.core.jit` as everybody else does, and gives it a loader that throws the switch."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != JIT_MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _JitLoader(name, spec.origin)
        return spec


class _JitLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        import torch

        if not torch.cuda.is_available():
            module.disable_jit_fuser()
            _silence(_KNOWN_WARNINGS_ON_CPU)
