"""FP8 as a state of the process and as rounding."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class FP8GlobalStateManager:
    """Whether linears multiply in FP8 now, and by which recipe."""

    enabled = False
    recipe: Any = None
    group: Any = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """Whether they do."""
        return cls.enabled


@contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Any = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    """Linears inside multiply in FP8."""
    state = FP8GlobalStateManager
    before = state.enabled, state.recipe, state.group
    state.enabled, state.recipe, state.group = enabled, fp8_recipe, fp8_group
    try:
        yield
    finally:
        state.enabled, state.recipe, state.group = before


def fp8_model_init(enabled: bool = True, recipe: Any = None, preserve_high_precision_init_val: bool = False) -> None:
    """Parameters in FP8, which we never have."""
    raise NotImplementedError


def rounded(tensor: Tensor, number_format: str) -> Tensor:
    """To FP8 with one scale for the tensor, and back."""
    dtype = DTYPES[number_format]
    scale = torch.finfo(dtype).max / tensor.detach().abs().max().float().clamp(min=1e-30)
    return ((tensor.float() * scale).to(dtype).float() / scale).to(tensor.dtype)


def check_shape(tensor: Tensor) -> None:
    """FP8's matrix products want multiples of 16 (32 by the recipe of the 32s), forwards and backwards."""
    multiple = 32 if type(FP8GlobalStateManager.recipe).__name__ == "MXFP8BlockScaling" else 16
    rows = tensor.numel() // tensor.shape[-1]
    assert rows % multiple == 0 and tensor.shape[-1] % multiple == 0, (
        f"FP8 needs multiples of {multiple}: {tensor.shape}"
    )
