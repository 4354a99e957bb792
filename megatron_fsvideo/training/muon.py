"""Muon as the autoencoder's optimizer runs it, outside Megatron's data parallelism."""

from collections.abc import Iterable

import torch
from torch import nn

from megatron_fsvideo.optim.muon import scaled_orthogonal


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum on weights of two or more axes; convolution kernels count as [out, in * taps]."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                buffer = state["momentum_buffer"]
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(buffer, group["momentum"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                step = scaled_orthogonal(update, torch.bfloat16).to(weight.dtype)
                weight.add_(step, alpha=-group["lr"])
