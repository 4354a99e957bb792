"""Operators of the video autoencoder (paper section 2.2.1): pixel norm, space-time shuffles, causal convolution.

Shapes: b batch, c channels, t frames at the layer's own rate, h, w rows and columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fsvideo.models.fsae.streaming import StreamCache

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
        wide = x if x.dtype == torch.float64 else x.float()
        y = wide * torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + self.epsilon)
        if self.weight is not None:
            shape = (-1,) + (1,) * (x.ndim - 2)
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


def space_to_channels(x: Tensor, factor: Factor) -> Tensor:
    """[b, c, t*pt, h*ph, w*pw] -> [b, c*ph*pw*pt, t, h, w], pt fastest.

    Time is fastest so that group means over an image or a static clip equal DC-AE's 2D ones (fsae_spec section 0).
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


class CausalConv3d(nn.Module):
    """3x3x3 convolution that sees the present and two past frames; before the start, frame 0 repeats.

    With `stride` 2 in time, output i sees frames 2i-2 .. 2i: a first chunk has an odd number of frames, later ones an
    even number, and only one frame is carried over. Space is padded with zeros.

    Args:
        stride: stride in time and in space.
        depthwise: one filter per channel (`in_channels` must equal `out_channels`).
    """

    kernel_size = 3

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: tuple[int, int] = (1, 1),
        depthwise: bool = False,
        bias: bool = True,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.groups = in_channels if depthwise else 1
        self.stride = stride
        k = self.kernel_size
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // self.groups, k, k, k))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        with torch.no_grad():
            self.weight.mul_(init_scale)

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """[b, c, t, h, w] -> [b, out_channels, t / time stride (rounded up at the start), h', w']."""
        carried = self.kernel_size - self.stride[0]
        before = cache.continue_from(self, x, carried) if cache is not None else None
        if before is None and x.shape[2] == 1:
            return self._single_frame(x)
        if before is None:
            before = x[:, :, :1].expand(-1, -1, self.kernel_size - 1, -1, -1)
        time_stride, stride = self.stride
        return F.conv3d(
            torch.cat([before, x], dim=2),
            self.weight,
            self.bias,
            stride=(time_stride, stride, stride),
            padding=(0, 1, 1),
            groups=self.groups,
        )

    def _single_frame(self, x: Tensor) -> Tensor:
        """The same result for a video's only or first frame at a third of the work: every tap sees that frame."""
        y = F.conv2d(
            x.squeeze(2), self.weight.sum(dim=2), self.bias, stride=self.stride[1], padding=1, groups=self.groups
        )
        return y.unsqueeze(2)


class ResBlock(nn.Module):
    """DC-AE's residual block with causal convolutions: x + norm(conv(silu(conv(x))))."""

    def __init__(self, channels: int, norm: PixelNorm) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(channels, channels)
        self.conv2 = CausalConv3d(channels, channels, bias=False)
        self.norm = norm

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """[b, c, t, h, w] -> the same shape."""
        h = self.conv2(F.silu(self.conv1(x, cache)), cache)
        return x + self.norm(h)
