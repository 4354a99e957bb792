"""Learning-rate schedule as a pure function of the iteration."""

import math

from megatron_fsvideo.config import OptimizerConfig


def learning_rate_factor(iteration: int, train_iters: int, optimizer: OptimizerConfig) -> float:
    """Factor on the peak rates in optimizer step `iteration` (from 1): warm-up, plateau, decay to min_lr / lr."""
    if iteration <= optimizer.lr_warmup_iters:
        return iteration / optimizer.lr_warmup_iters
    floor = optimizer.min_lr / optimizer.lr if optimizer.lr else 0.0
    begin = max(optimizer.lr_decay_start * train_iters, optimizer.lr_warmup_iters)
    progress = min(1.0, max(0.0, (iteration - begin) / max(1.0, train_iters - begin)))
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[optimizer.lr_decay_style]
    return floor + (1.0 - floor) * shape
