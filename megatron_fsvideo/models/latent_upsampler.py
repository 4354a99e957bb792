"""The latent upsampler: latents of twice the rows and columns, between base model and refiner (paper section 2.4.1).

A projection, a pixel shuffle, 16 residual blocks; what the paper leaves open follows LTX-Video's `LatentUpsampler`. It
works on normalised latents (mean 0, deviation 1 per channel) and sees both ways in time.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fsvideo.config import LatentUpsamplerConfig
from megatron_fsvideo.config.latent_upsampler import GROUPS
from megatron_fsvideo.models.fsae.convolutions import CenterConv3d
from megatron_fsvideo.models.fsae.layers import PixelNorm

FACTOR = 2
"""How many times the rows and columns; frames stay."""


class LatentUpsampler(nn.Module):
    """Latents of a clip to those of the same clip at twice its sides."""

    def __init__(self, config: LatentUpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        channels, before, after = config.mid_channels, *config.blocks
        self.conv_in = _conv(config, config.latent_channels, channels)
        self.norm_in = _norm(config)
        self.blocks_before = nn.ModuleList(UpsamplerBlock(config) for _ in range(before))
        self.up = nn.Conv2d(channels, FACTOR**2 * channels, 3, padding=1)
        self.blocks_after = nn.ModuleList(UpsamplerBlock(config) for _ in range(after))
        self.conv_out = _conv(config, channels, config.latent_channels)

    def forward(self, latents: Tensor) -> Tensor:
        """[b, c, t, h, w] -> [b, c, t, 2h, 2w].

        Raises:
            ValueError: another number of axes or channels.
        """
        if latents.ndim != 5 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"latents must be [batch, {self.config.latent_channels}, frames, height, width], "
                f"got {list(latents.shape)}"
            )
        x = F.silu(self.norm_in(self.conv_in(latents)))
        for block in self.blocks_before:
            x = block(x)
        x = self._double(x)
        for block in self.blocks_after:
            x = block(x)
        return self.conv_out(x)

    def _double(self, x: Tensor) -> Tensor:
        """[b, c, t, h, w] -> [b, c, t, 2h, 2w], frame by frame."""
        frames = F.pixel_shuffle(self.up(x.transpose(1, 2).flatten(0, 1)), FACTOR)
        return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class UpsamplerBlock(nn.Module):
    """LTX-Video's residual block: silu(x + norm(conv(silu(norm(conv(x))))))."""

    def __init__(self, config: LatentUpsamplerConfig) -> None:
        super().__init__()
        self.conv1 = _conv(config, config.mid_channels, config.mid_channels)
        self.norm1 = _norm(config)
        self.conv2 = _conv(config, config.mid_channels, config.mid_channels)
        self.norm2 = _norm(config)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, t, h, w] -> the same shape."""
        h = F.silu(self.norm1(self.conv1(x)))
        return F.silu(x + self.norm2(self.conv2(h)))


def _conv(config: LatentUpsamplerConfig, in_channels: int, out_channels: int) -> nn.Module:
    if config.time_padding == "zero":
        return nn.Conv3d(in_channels, out_channels, 3, padding=1)
    return CenterConv3d(in_channels, out_channels)


def _norm(config: LatentUpsamplerConfig) -> nn.Module:
    if config.norm == "group":
        return nn.GroupNorm(GROUPS, config.mid_channels, config.norm_epsilon)
    return PixelNorm(config.mid_channels, config.norm_epsilon)
