"""Selective recomputation: parts of a layer whose activations are made again in the backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.checkpoint import checkpoint


def run_part(config: TransformerConfig, name: str, function: Callable, *args: Any) -> Any:
    """`function(*args)`, recomputed if `--recompute-modules` names this part; nothing in it may be random."""
    if config.recompute_granularity == "selective" and name in config.recompute_modules and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)
