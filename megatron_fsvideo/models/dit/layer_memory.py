"""Layer memory: keys and values read a mix of all earlier layers' inputs (paper section 2.3, eq. 6-8).

X_0 is the patch embedding, X_l the output of layer l. Layer l >= 2 has a router that weighs X_0 .. X_{l-1} for each
token, for all heads alike:

    a = LN(X_{l-1}) (1 + scale) + shift      layer l's modulated input: the queries' source
    w = softmax(W_l a + c_l)                 eq. 6; the router sees the time through the modulation
    m = sum_i w_i X_i                        eq. 7
    keys' and values' source = LN(m) (1 + scale) + shift

Queries and the residual still come from X_{l-1} (eq. 8). Our choices where the paper leaves them open: what keys
and values get is normed and modulated as queries are; the variant `normalized` norms each X_i instead of m; logits,
softmax and sum are in fp32; the bias makes X_{l-1} weigh `layer_memory_init` at the start, and W starts at zero.

The states and their gradients are kept in a bank (memory_bank.py); the arithmetic is in `kernels/`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_fsvideo.models.dit.memory_bank import MemoryBank

# exp(-60) of the other states vanishes beside 1 in fp32: the mix is X_{l-1} to the last bit.
IDENTITY_BIAS = 60.0
FROZEN_WEIGHT = 1e-6


class LayerMemory(nn.Module):
    """The router of one layer. `layer_number` counts from 1; layer 1 has nothing to remember and no router."""

    def __init__(self, layer_number: int, hidden_size: int) -> None:
        super().__init__()
        assert layer_number >= 2
        self.num_states = layer_number
        self.router = nn.Linear(hidden_size, layer_number)  # fp32: its logits are

    def weights(self, query_source: Tensor) -> Tensor:
        """Mixing weights [s, b, l], fp32, from the layer's modulated input [s, b, h] (eq. 6)."""
        return torch.softmax(self.router(query_source.float()), dim=-1)

    def forward(self, query_source: Tensor, latest: Tensor, bank: MemoryBank, shift: Tensor, scale: Tensor) -> Tensor:
        """The keys' and values' source [s, b, h].

        Args:
            query_source: the layer's modulated input a [s, b, h].
            latest: X_{l-1} [s, b, h], the last state in the bank.
            shift, scale: the modulation [b, h], fp32.
        """
        logits = _RouterLogits.apply(query_source, self.router.weight, self.router.bias)  # eq. 6, before its softmax
        return bank.read(logits, latest, shift, scale)  # softmax; eq. 7: m = sum_i w_i X_i; norm and modulation


class _RouterLogits(torch.autograd.Function):
    """W a + c in fp32 [s, b, l]. torch's own linear would keep a copy of `a` in fp32 for the backward pass."""

    @staticmethod
    def forward(ctx, query_source: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(query_source, weight)
        return F.linear(query_source.to(weight.dtype), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        query_source, weight = ctx.saved_tensors
        query_gradient = (gradient @ weight).to(query_source.dtype)
        if not ctx.needs_input_grad[1]:
            return query_gradient, None, None
        flat = gradient.flatten(0, 1)  # (s * b, l)
        return query_gradient, flat.t() @ query_source.flatten(0, 1).to(flat.dtype), flat.sum(0)


def count_frozen_routers(network: nn.Module) -> int:
    """Routers that can hardly learn: without regard to the token, they give all states but one less than 1e-6 together.

    The gradient of a weight of the softmax is proportional to it.
    """
    return sum(
        1.0 - torch.softmax(module.router.bias.detach().double(), dim=0).max().item() < FROZEN_WEIGHT
        for module in network.modules()
        if isinstance(module, LayerMemory)
    )


def identity_leaning_bias(num_states: int, initial_weight: float) -> float:
    """The last logit that gives the last of `num_states` states this softmax weight when all other logits are 0."""
    if initial_weight == 1.0:
        return IDENTITY_BIAS
    return math.log((num_states - 1) * initial_weight / (1 - initial_weight))
