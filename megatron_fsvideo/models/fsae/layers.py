"""Operators of the video autoencoder (paper section 2.2.1): pixel norm, space-time shuffles, residual block.

Shapes: b batch, c channels, t frames at the layer's own rate, h, w rows and columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fsvideo.models.fsae.convolutions import CausalConv3d, ConvKind
from megatron_fsvideo.models.fsae.streaming import Stream

Factor = tuple[int, int, int]
"""Time, height, width."""


class PixelNorm(nn.Module):
    """RMS over the channels of each position: no statistics over time or space, so slicing a video changes nothing.

    With gain and bias it is DC-AE's `trms2d`. Without, it is LTX-Video's, but a residual branch cannot start small.
    """

    def __init__(self, channels: int, epsilon: float = 1e-5, affine: bool = True, gain: float = 1.0) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.full((channels,), gain)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, ...] -> the same shape and type; computed in at least fp32."""
        # One name and one operation for gain and bias: these maps are the largest there are, twice as wide as x.
        y = x if x.dtype == torch.float64 else x.float()
        y = y * torch.rsqrt(y.square().mean(dim=1, keepdim=True) + self.epsilon)
        if self.weight is not None:
            weight, bias = (p.to(y.dtype).view(-1, *(1,) * (x.ndim - 2)) for p in (self.weight, self.bias))
            y = torch.addcmul(bias, y, weight)
        return y.to(x.dtype)


def space_to_channels(x: Tensor, factor: Factor) -> Tensor:
    """[b, c, t*pt, h*ph, w*pw] -> [b, c*ph*pw*pt, t, h, w], pt fastest.

    Time is fastest so that group means over an image or a static clip equal DC-AE's 2D ones.
    """
    b, c, frames, height, width = x.shape
    pt, ph, pw = factor
    x = x.reshape(b, c, frames // pt, pt, height // ph, ph, width // pw, pw)
    x = x.permute(0, 1, 5, 7, 3, 2, 4, 6)  # (b, c, ph, pw, pt, t, h, w)
    return x.reshape(b, c * ph * pw * pt, frames // pt, height // ph, width // pw)


def channels_to_space(x: Tensor, factor: Factor) -> Tensor:
    """[b, c*ph*pw*pt, t, h, w] -> [b, c, t*pt, h*ph, w*pw]: the inverse of `space_to_channels`."""
    b, channels, t, h, w = x.shape
    pt, ph, pw = factor
    c = channels // (pt * ph * pw)
    x = x.reshape(b, c, ph, pw, pt, t, h, w).permute(0, 1, 5, 4, 6, 2, 7, 3)  # (b, c, t, pt, h, ph, w, pw)
    return x.reshape(b, c, t * pt, h * ph, w * pw)


def group_mean(x: Tensor, channels: int) -> Tensor:
    """[b, c, ...] -> [b, channels, ...]: the mean of each c / channels consecutive channels."""
    return x if x.shape[1] == channels else x.unflatten(1, (channels, -1)).mean(dim=2)


def repeat_channels(x: Tensor, channels: int) -> Tensor:
    """[b, c, ...] -> [b, channels, ...]: each channel channels / c times in a row."""
    return x if x.shape[1] == channels else x.repeat_interleave(channels // x.shape[1], dim=1)


class ResBlock(nn.Module):
    """DC-AE's residual block with convolutions over time: x + norm(conv(silu(conv(x)))).

    Args:
        noise_weight: of the noise that is added to the branch (paper section 2.2.3). The norm before it makes the
            branch's unit, so a weight of 0.05 is 5 %.
    """

    def __init__(
        self, channels: int, norm: PixelNorm, conv: ConvKind = CausalConv3d, noise_weight: float = 0.0
    ) -> None:
        super().__init__()
        self.conv1 = conv(channels, channels)
        self.conv2 = conv(channels, channels, bias=False)
        self.norm = norm
        self.noise_weight = noise_weight

    def forward(self, x: Tensor, stream: Stream | None = None, noise: Tensor | None = None) -> Tensor:
        """[b, c, t, h, w] -> the same shape; `noise` broadcasts to it and is unscaled."""
        h = self.norm(self.conv2(F.silu(self.conv1(x, stream)), stream))
        if noise is not None:
            h = h + self.noise_weight * noise.to(h.dtype)
        return x + h
