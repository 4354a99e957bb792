"""Activations that are made again in the backward pass: of parts of a layer (selective recomputation), of layers."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.checkpoint import checkpoint


def run_part(config: TransformerConfig, name: str, function: Callable, *args: Any) -> Any:
    """`function(*args)`, recomputed if `--recompute-modules` names this part; nothing in it may be random."""
    if config.recompute_granularity == "selective" and name in config.recompute_modules and torch.is_grad_enabled():
        return recomputed(config, function, *args)
    return function(*args)


def recomputed(config: TransformerConfig, function: Callable, *args: Any) -> Any:
    """`function(*args)`, of whose activations none are kept. Nothing in it is random: no generator state is restored.

    In FP8 it is Transformer Engine's checkpointing, which makes them again in FP8 and under the same scales.
    """
    if config.fp8 is None:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    from megatron_fsvideo.models.transformer_engine import checkpoint_in_fp8

    return checkpoint_in_fp8(function, *args)
