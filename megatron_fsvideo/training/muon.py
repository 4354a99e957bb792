"""Muon: momentum, orthogonalised matrix by matrix (Keller Jordan, https://kellerjordan.github.io/posts/muon/).

Its step has a size of its own, whatever the gradient's: on the autoencoder's convolutions, whose fan-in is in the
thousands, AdamW at a rate that learns in minutes diverges, and Muon does not.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Coefficients of the quintic iteration, from the reference above: singular values end in about [0.7, 1.2].
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, dtype: torch.dtype = torch.bfloat16, num_steps: int = 5) -> Tensor:
    """U V^T of a matrix's singular value decomposition, nearly: [rows, columns] -> the same shape, fp32.

    The iteration bears bf16, which is several times faster; fp32 is for comparing layouts to many digits.
    """
    a, b, c = NEWTON_SCHULZ
    x = (matrix / (matrix.norm() + 1e-7)).to(dtype)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(num_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).float()


def scaled_orthogonal(update: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The orthogonal factor, scaled so that a step moves outputs of tall and wide matrices alike."""
    rows, columns = update.shape
    return orthogonalize(update, dtype) * max(1.0, rows / columns) ** 0.5


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
                step = scaled_orthogonal(update.flatten(1)).view_as(weight).to(weight.dtype)
                weight.add_(step, alpha=-group["lr"])
