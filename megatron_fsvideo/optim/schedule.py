"""The learning-rate schedule: a pure function of the iteration."""

import math
from collections.abc import Iterable
from typing import Any

from megatron_fsvideo.config import OptimizerConfig


def learning_rate(iteration: int, train_iters: int, optimizer: OptimizerConfig, max_lr: float, min_lr: float) -> float:
    """The rate of optimizer step `iteration`, from 1 to `train_iters`: warm-up, plateau, decay.

    In a warm-up of 4 steps the first step has 1/4 of the peak rate, the last all of it. The last step of the run has
    `min_lr` exactly, unless the style is constant. A warm-up that is not shorter than the run ends one step before it.
    """
    warmup = min(optimizer.lr_warmup_iters, train_iters - 1)
    if iteration <= warmup:
        return max_lr * iteration / warmup
    begin = max(optimizer.lr_decay_start * train_iters, warmup)
    progress = (iteration - begin) / (train_iters - begin)
    if progress <= 0.0 or optimizer.lr_decay_style == "constant":
        return max_lr
    progress = min(progress, 1.0)
    share = 1.0 - progress if optimizer.lr_decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_lr + share * (max_lr - min_lr)


def set_learning_rates(
    groups: Iterable[dict[str, Any]], iteration: int, train_iters: int, optimizer: OptimizerConfig
) -> None:
    """Set each parameter group's rate of step `iteration` (from 1), between its own `max_lr` and `min_lr`."""
    for group in groups:
        group["lr"] = learning_rate(iteration, train_iters, optimizer, group["max_lr"], group["min_lr"])
