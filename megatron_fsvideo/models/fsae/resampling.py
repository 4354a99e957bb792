"""Down- and up-sampling with residual space-time shuffles (paper section 2.2.1, DC-AE's residual autoencoding).

The main path is a convolution; the shortcut moves pixels into channels and averages groups, or repeats channels and
moves them back. The shortcut has no weights, so deep compression starts from something that already reconstructs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fsvideo.models.fsae.convolutions import CausalConv3d, ConvKind
from megatron_fsvideo.models.fsae.layers import (
    Factor,
    channels_to_space,
    group_mean,
    repeat_channels,
    space_to_channels,
)
from megatron_fsvideo.models.fsae.streaming import Stream, at_start


class Down(nn.Module):
    """Halve height and width, and time where `factor[0]` is 2 (4k+1 -> 2k+1 -> k+1 frames).

    Args:
        shortcut: add the space-to-channel shortcut; a stem from RGB has none.
    """

    def __init__(
        self, in_channels: int, out_channels: int, factor: Factor, init_scale: float, shortcut: bool = True
    ) -> None:
        super().__init__()
        volume = factor[0] * factor[1] * factor[2]
        if shortcut and in_channels * volume % out_channels:
            raise ValueError(
                f"widths {in_channels} -> {out_channels}: {in_channels} x {volume} channels cannot be averaged to "
                f"{out_channels}; choose widths where one divides {volume} times the other"
            )
        self.factor = factor
        self.shortcut = shortcut
        self.out_channels = out_channels
        self.conv = CausalConv3d(in_channels, out_channels, stride=(factor[0], factor[1]), init_scale=init_scale)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """[b, c, t, h, w] -> [b, out_channels, t', h/2, w/2]."""
        y = self.conv(x, stream)
        if not self.shortcut:
            return y
        if self.factor[0] == 2 and at_start(stream):
            # Pairs (0, 0), (1, 2), (3, 4) ...: the first frame stands alone, as in LTX-Video.
            x = torch.cat([x[:, :, :1], x], dim=2)
        return y + group_mean(space_to_channels(x, self.factor), self.out_channels)


class SubPixelUp(nn.Module):
    """Double height and width, and time where `factor[0]` is 2, by a convolution to more channels and a shuffle.

    At the start of a stream the first of the two frames made from latent 0 is dropped: k+1 -> 2k+1 frames.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        factor: Factor,
        init_scale: float,
        shortcut: bool = True,
        conv: ConvKind = CausalConv3d,
    ) -> None:
        super().__init__()
        volume = factor[0] * factor[1] * factor[2]
        if shortcut and out_channels * volume % in_channels:
            raise ValueError(
                f"widths {in_channels} -> {out_channels}: {in_channels} channels cannot be repeated to "
                f"{out_channels} x {volume}; choose widths where one divides {volume} times the other"
            )
        self.factor = factor
        self.shortcut = shortcut
        self.conv = conv(in_channels, out_channels * volume, init_scale=init_scale)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """[b, c, t, h, w] -> [b, out_channels, t', 2h, 2w]."""
        y = self.conv(x, stream)
        if self.shortcut:
            # Each channel of x, repeated without a copy.
            y = (y.unflatten(1, (x.shape[1], -1)) + x.unsqueeze(2)).flatten(1, 2)
        y = channels_to_space(y, self.factor)
        return y[:, :, 1:] if self.factor[0] == 2 and at_start(stream) else y


class InterpolateUp(nn.Module):
    """Double height and width by repeating pixels and a convolution (DC-AE-sana's): a quarter of the weights."""

    def __init__(self, in_channels: int, out_channels: int, init_scale: float, conv: ConvKind = CausalConv3d) -> None:
        super().__init__()
        if out_channels * 4 % in_channels:
            raise ValueError(
                f"widths {in_channels} -> {out_channels}: {in_channels} channels cannot be repeated to "
                f"{out_channels} x 4; choose widths where one divides 4 times the other"
            )
        self.out_channels = out_channels
        self.conv = conv(in_channels, out_channels, init_scale=init_scale)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """[b, c, t, h, w] -> [b, out_channels, t, 2h, 2w]."""
        y = self.conv(F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest"), stream)
        return y + channels_to_space(repeat_channels(x, 4 * self.out_channels), (1, 2, 2))
