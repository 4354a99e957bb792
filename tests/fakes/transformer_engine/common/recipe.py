"""The recipes of FP8."""

import enum
from dataclasses import dataclass
from typing import Any


class Format(enum.Enum):
    """Number formats of the forward and the backward pass."""

    E4M3 = ("e4m3", "e4m3")
    HYBRID = ("e4m3", "e5m2")


@dataclass
class DelayedScaling:
    """Scales from earlier iterations."""

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    override_linear_precision: tuple = (False, False, False)
    fp8_dpa: bool = False
    fp8_mha: bool = False
    params_dtype: Any = None  # megatron-core passes both on
    device: Any = None


@dataclass
class Float8CurrentScaling:
    """One scale for a tensor."""

    fp8_format: Format = Format.HYBRID
    fp8_dpa: bool = False


@dataclass
class Float8BlockScaling:
    """A scale for 128 values, or 128 x 128."""

    fp8_format: Format = Format.E4M3


@dataclass
class MXFP8BlockScaling:
    """A scale for 32 values."""

    fp8_format: Format = Format.E4M3
