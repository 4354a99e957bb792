"""Classes that megatron-core derives others from, which no layer of ours is made of."""

from torch import nn


class LayerNormLinear(nn.Module):
    """Norm and linear in one."""


class GroupedLinear(nn.Module):
    """The linears of several experts."""


class RMSNorm(nn.Module):
    """RMS norm."""
