"""Layers of the video autoencoder: pixel norm, causal convolution, residual space-time shuffles (paper section 2.2).

Letters: b batch, c channels, t frames, h height, w width. Everything takes and gives [b, c, t, h, w], and takes the
stream's cache (None: the whole clip at once).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fsvideo.models.fsae.streaming import StreamCache, is_stream_start, replicate_first, with_past

KERNEL = 3


class PixelNorm(nn.Module):
    """x / rms(x) over the channels of each position, with gain and bias unless `affine` is off.

    It sees one position only, so the result depends on neither the resolution nor the number of frames.
    """

    def __init__(self, channels: int, epsilon: float, affine: bool, gain: float = 1.0) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.full((channels,), gain)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        # The sum of squares is accumulated in (at least) fp32 without a copy of x in fp32.
        wide = torch.promote_types(x.dtype, torch.float32)
        mean_square = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide).square() / x.shape[1]
        y = x * torch.rsqrt(mean_square + self.epsilon).to(x.dtype)
        if self.weight is None:
            return y
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return torch.addcmul(self.bias.to(y.dtype).view(shape), y, self.weight.to(y.dtype).view(shape))


class CausalConv3d(nn.Module):
    """3x3x3 convolution that sees the frame and the two before it; zero padding in space, frame 0 repeated in time."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, KERNEL, padding=(0, 1, 1), bias=bias, groups=groups)

    def forward(self, x: Tensor, cache: StreamCache | None) -> Tensor:
        return self.conv(with_past(self, x, cache, first=KERNEL - 1, later=KERNEL - 1))


class ResBlock(nn.Module):
    """x + norm(conv(silu(conv(x)))) (DC-AE's ResBlock, post-norm)."""

    def __init__(self, channels: int, norm: nn.Module) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(channels, channels)
        self.conv2 = CausalConv3d(channels, channels, bias=False)
        self.norm = norm

    def forward(self, x: Tensor, cache: StreamCache | None) -> Tensor:
        return x + self.norm(self.conv2(F.silu(self.conv1(x, cache)), cache))


class Down(nn.Module):
    """Halve height and width, and the frames where `temporal_factor` is 2 (4k+1 -> 2k+1 -> k+1).

    Strided causal convolution + the group mean of the space-time-to-channel shuffle. Half-rate frame 0 is frame 0,
    half-rate frame j >= 1 is frames 2j-1, 2j.
    """

    def __init__(self, in_channels: int, out_channels: int, temporal_factor: int) -> None:
        super().__init__()
        shuffled = in_channels * 4 * temporal_factor
        _check_groups("Down", in_channels, out_channels, shuffled, out_channels)
        self.temporal_factor = temporal_factor
        self.out_channels = out_channels
        self.conv = nn.Conv3d(in_channels, out_channels, KERNEL, stride=(temporal_factor, 2, 2), padding=(0, 1, 1))

    def forward(self, x: Tensor, cache: StreamCache | None) -> Tensor:
        # The window of output i ends at frame 2i: one frame less of the past is needed than without a stride.
        past = KERNEL - self.temporal_factor
        main = self.conv(with_past(self, x, cache, first=KERNEL - 1, later=past))
        return main + self.shortcut(x, is_stream_start(cache))

    def shortcut(self, x: Tensor, at_start: bool) -> Tensor:
        """Mean over groups of consecutive channels of the shuffled input; frame 0 is duplicated to make a pair."""
        if self.temporal_factor == 2 and at_start:
            x = replicate_first(x, 1)
        return group_mean(space_time_to_channel(x, self.temporal_factor), self.out_channels)


class SubpixelUp(nn.Module):
    """Double height and width, and the frames where `temporal_factor` is 2: channel-to-time-spatial.

    The convolution runs at the low rate. At a stream's start the first of the two frames made from latent 0 is dropped:
    k+1 -> 2k+1 -> 4k+1.
    """

    def __init__(self, in_channels: int, out_channels: int, temporal_factor: int) -> None:
        super().__init__()
        shuffled = out_channels * 4 * temporal_factor
        _check_groups("Up", in_channels, out_channels, shuffled, in_channels)
        self.temporal_factor = temporal_factor
        self.conv = CausalConv3d(in_channels, shuffled)

    def forward(self, x: Tensor, cache: StreamCache | None) -> Tensor:
        main = self.conv(x, cache)
        y = channel_to_space_time(main + repeat_channels(x, main.shape[1]), self.temporal_factor)
        drop = self.temporal_factor == 2 and is_stream_start(cache)
        return y[:, :, 1:] if drop else y


class InterpolateUp(nn.Module):
    """Double height and width: nearest neighbour, causal convolution, + the channel-to-space shuffle of the input."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        _check_groups("Up", in_channels, out_channels, out_channels * 4, in_channels)
        self.out_channels = out_channels
        self.conv = CausalConv3d(in_channels, out_channels)

    def forward(self, x: Tensor, cache: StreamCache | None) -> Tensor:
        main = self.conv(x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4), cache)
        return main + channel_to_space_time(repeat_channels(x, self.out_channels * 4), 1)


def space_time_to_channel(x: Tensor, temporal_factor: int) -> Tensor:
    """[b, c, t*pt, h*2, w*2] -> [b, c*2*2*pt, t, h, w], channel order (c, ph, pw, pt).

    pt changes fastest: the group averages then reduce exactly to DC-AE's 2D shortcuts on images and static clips.
    """
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t // temporal_factor, temporal_factor, h // 2, 2, w // 2, 2)
    # (b, c, t, pt, h, ph, w, pw) -> (b, c, ph, pw, pt, t, h, w)
    x = x.permute(0, 1, 5, 7, 3, 2, 4, 6)
    return x.reshape(b, c * 4 * temporal_factor, t // temporal_factor, h // 2, w // 2)


def channel_to_space_time(x: Tensor, temporal_factor: int) -> Tensor:
    """The inverse of `space_time_to_channel`."""
    b, c, t, h, w = x.shape
    x = x.reshape(b, c // (4 * temporal_factor), 2, 2, temporal_factor, t, h, w)
    # (b, c, ph, pw, pt, t, h, w) -> (b, c, t, pt, h, ph, w, pw)
    x = x.permute(0, 1, 5, 4, 6, 2, 7, 3)
    return x.reshape(b, c // (4 * temporal_factor), t * temporal_factor, h * 2, w * 2)


def group_mean(x: Tensor, out_channels: int) -> Tensor:
    """Mean over groups of consecutive channels: [b, c, t, h, w] -> [b, out_channels, t, h, w]."""
    b, c, t, h, w = x.shape
    return x.reshape(b, out_channels, c // out_channels, t, h, w).mean(dim=2)


def repeat_channels(x: Tensor, out_channels: int) -> Tensor:
    """Each channel repeated, copies side by side: [b, c, t, h, w] -> [b, out_channels, t, h, w]."""
    return x.repeat_interleave(out_channels // x.shape[1], dim=1)


def _check_groups(what: str, in_channels: int, out_channels: int, shuffled: int, divisor: int) -> None:
    if shuffled % divisor:
        raise ValueError(
            f"{what} from {in_channels} to {out_channels} channels: the shortcut shuffles to {shuffled} channels, "
            f"which {divisor} does not divide; choose widths that divide each other"
        )
