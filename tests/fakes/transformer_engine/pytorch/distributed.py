"""Recomputation that knows FP8."""

from collections.abc import Callable
from typing import Any

import torch.utils.checkpoint

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, fp8_autocast


def checkpoint(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """`function(*args)`, computed again in the backward pass as it was computed first: in FP8 or not."""
    use_reentrant = kwargs.pop("use_reentrant", True)
    enabled, recipe = FP8GlobalStateManager.enabled, FP8GlobalStateManager.recipe

    def again(*args: Any) -> Any:
        with fp8_autocast(enabled, fp8_recipe=recipe):
            return function(*args)

    return torch.utils.checkpoint.checkpoint(again, *args, use_reentrant=use_reentrant, **kwargs)


class CudaRNGStatesTracker:
    """megatron-core derives its own from it."""


class activation_recompute_forward:
    """megatron-core imports it."""
